"""Text as it comes: whole characters, and nothing that may still become a stop string."""

from types import SimpleNamespace

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calm_transformers.serving.rows import TextAssembler


def byte_tokenizer():
    """A token for each byte, so that most characters outside ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def space_tokenizer(kind):
    """Of words with a space before each, spelt as SentencePiece's tokenizers are: with a decoder of either kind."""
    words = ["▁", "▁one", "▁two", "▁", "s", "▁.", *[f"<0x{byte:02X}>" for byte in range(256)]]
    vocabulary = [("<unk>", 0.0), *[(word, -1.0) for word in dict.fromkeys(words)]]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    metaspace = [decoders.ByteFallback(), decoders.Metaspace()]
    tokenizer.decoder = decoders.Sequence(llama if kind == "Llama" else metaspace)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")


def pieces_of(tokenizer, text, stop=(), num_tokens=None):
    assembler, pieces = TextAssembler(tokenizer, stop), []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens]:
        ended = assembler.push(token)
        pieces.append(assembler.take())
        if ended:
            break
    return [*pieces, assembler.take(is_last=True)], assembler


def test_pieces_are_whole_characters_and_together_the_text():
    text = "naïve 日本 🙂!"
    pieces, assembler = pieces_of(byte_tokenizer(), text)
    assert "".join(pieces) == text == assembler.text and not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_at_the_end_is_what_the_tokenizer_makes_of_it():
    tokenizer, ids = byte_tokenizer(), byte_tokenizer()("ab日")["input_ids"]
    pieces, _ = pieces_of(tokenizer, "ab日", num_tokens=len(ids) - 1)
    assert "".join(pieces) == tokenizer.decode(ids[:-1]) == "ab\ufffd" and "\ufffd" not in "".join(pieces[:-1])


@pytest.mark.parametrize("kind", ["Llama", "Metaspace"])
@pytest.mark.parametrize("text", ["one two one twos", "one  two .", "one 日本 two", "🙂🙂 two"])
def test_a_completion_is_prompt_and_completion_without_the_prompt(kind, text):
    tokenizer = space_tokenizer(kind)
    ids = tokenizer(text)["input_ids"]
    for length in range(len(ids)):
        before = tokenizer.decode(ids[:length])
        if before.endswith("\ufffd"):  # amid a character
            continue
        assembler, pieces = TextAssembler(tokenizer, prompt=ids[:length]), []
        for token in ids[length:]:
            assembler.push(token)
            pieces.append(assembler.take())
        assert before + "".join(pieces) == before + assembler.text == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_no_text_and_a_long_prompt_is_not_decoded_whole():
    tokenizer = space_tokenizer("Llama")
    one, two = tokenizer("one two")["input_ids"]
    for prompt, text in (([one, 0], " two"), ([0], "two"), ([], "two"), ([one] * 1000, " two")):
        assembler = TextAssembler(tokenizer, prompt=prompt)
        [assembler.push(token) for token in (two, 0)]
        assert assembler.take() == text


def test_broken_bytes_spoil_nothing_before_them():
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
        ("a ENx EN", "END", ["a", " ", "", "", "ENx", " ", "", "", "EN"]),  # shown as soon as it is known
        ("xaabaabaac", "aabaac", ["x", "", "", "", "", "", "aab", "", "", "", ""]),
    ],
)
def test_what_may_become_a_stop_string_is_held_back(text, stop, pieces):
    assert pieces_of(tiny_tokenizer(), text, [stop])[0] == pieces


def test_the_earliest_of_several_stop_strings_counts():
    pieces, assembler = pieces_of(byte_tokenizer(), "abc", ["cd", "bc", "nowhere", *map(str, range(100))])
    assert "".join(pieces) == "a" and assembler.has_stopped


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="SimpleNamespace is no fast tokenizer"):
        TextAssembler(SimpleNamespace(is_fast=False))
