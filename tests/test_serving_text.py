"""Step-by-step decoding: whole characters, and no text that may be the beginning of a stop string."""

from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calm_transformers.serving.sequence import TextAssembler


def byte_tokenizer():
    """Returns a tokenizer with a token per byte, so that characters outside ASCII take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def space_tokenizer(kind):
    """Returns a tokenizer like SentencePiece's, of words with a space before each, with either kind of decoder."""
    words = ["▁", "▁one", "▁two", "▁", "s", "▁.", *[f"<0x{byte:02X}>" for byte in range(256)]]
    vocabulary = [("<unk>", 0.0), *[(word, -1.0) for word in dict.fromkeys(words)]]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    metaspace = [decoders.ByteFallback(), decoders.Metaspace()]
    tokenizer.decoder = decoders.Sequence(llama if kind == "Llama" else metaspace)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")


def assemble(tokenizer, text, stop=(), num_tokens=None):
    assembler, pieces = TextAssembler(tokenizer, stop), []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens]:
        ended = assembler.push(token)
        pieces.append(assembler.take())
        if ended:
            break
    return [*pieces, assembler.take(is_last=True)], assembler


TOKENIZERS = {"bytes": byte_tokenizer(), "characters": tiny_tokenizer(), "added": byte_tokenizer()}
TOKENIZERS |= {kind: space_tokenizer(kind) for kind in ("Llama", "Metaspace")}
TOKENIZERS["added"].add_tokens(["one", " 日本", "<x>"])
WORDS = st.lists(st.sampled_from([*"ab .é日🙂", "one", " one", " two", "<x>", " 日本"]), max_size=9).map("".join)


@pytest.mark.fuzz
@given(st.sampled_from(sorted(TOKENIZERS)), WORDS, st.lists(WORDS.filter(bool), max_size=3), st.integers(0, 9))
def test_pieces_add_up_to_the_decoded_text_before_the_first_stop_string(kind, text, stop, length):
    """They are whole characters, and hold nothing of the stop string, whose beginning was held back."""
    tokenizer, expected = TOKENIZERS[kind], ""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(ids[:length], skip_special_tokens=True)
    assume(not before.endswith("\ufffd"))  # the prompt ends inside a character
    assembler, pieces = TextAssembler(tokenizer, stop, ids[:length]), []
    for number in range(length, len(ids)):
        has_ended = assembler.push(ids[number])
        decoded = tokenizer.decode(ids[: number + 1], skip_special_tokens=True)[len(before) :]
        expected = expected if decoded.endswith("\ufffd") else decoded
        pieces.append(assembler.take())
        starts = [expected.find(each) for each in stop if each in expected]
        assert has_ended is bool(starts) and "\ufffd" not in pieces[-1]
        if has_ended:
            expected = expected[: min(starts)]
            break
    assert "".join(pieces) + assembler.take(is_last=True) == assembler.text == expected


def test_an_incomplete_character_at_the_end_is_decoded_as_by_the_tokenizer():
    tokenizer, ids = byte_tokenizer(), byte_tokenizer()("ab日")["input_ids"]
    pieces, _ = assemble(tokenizer, "ab日", num_tokens=len(ids) - 1)
    assert "".join(pieces) == tokenizer.decode(ids[:-1]) == "ab\ufffd" and "\ufffd" not in "".join(pieces[:-1])


def test_special_tokens_are_skipped_and_only_the_end_of_a_long_prompt_is_decoded():
    tokenizer = space_tokenizer("Llama")
    one, two = tokenizer("one two")["input_ids"]
    for prompt, text in (([one, 0], " two"), ([0], "two"), ([], "two"), ([one] * 1000, " two")):
        assembler = TextAssembler(tokenizer, prompt=prompt)
        [assembler.push(token) for token in (two, 0)]
        assert assembler.take() == text


def test_invalid_bytes_do_not_change_the_text_before_them():
    tokenizer = space_tokenizer("Llama")
    ids = tokenizer("日")["input_ids"]
    assembler = TextAssembler(tokenizer, prompt=tokenizer("one 日")["input_ids"])
    for token in [*ids[1:], ids[1], *tokenizer("one two")["input_ids"]]:
        assembler.push(token)
    assert assembler.take(is_last=True) == "日\ufffd one two"


@pytest.mark.parametrize(
    "text, stop, pieces",
    [
        ("one END two", "END", ["o", "n", "e", " ", "", "", "", ""]),
        ("a ENx EN", "END", ["a", " ", "", "", "ENx", " ", "", "", "EN"]),  # returned as soon as it is decided
        ("xaabaabaac", "aabaac", ["x", "", "", "", "", "", "aab", "", "", "", ""]),
    ],
)
def test_the_beginning_of_a_stop_string_is_held_back(text, stop, pieces):
    assert assemble(tiny_tokenizer(), text, [stop])[0] == pieces


def test_a_slow_tokenizer_raises_an_error():
    with pytest.raises(ValueError, match="SimpleNamespace is not a fast tokenizer"):
        TextAssembler(SimpleNamespace(is_fast=False))
