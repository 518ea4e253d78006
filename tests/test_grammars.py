"""Grammars: JSON of a schema and text of a regular expression from the demo model, and tokens as bytes."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calm import grammars_calm
from calm.grammars_calm import Grammar, token_bytes
from calm.modeling_calm import CALMForCausalLM
from calm.serving.batcher import Batcher

pytest.importorskip("outlines_core", reason="outlines_core (extra [clients]) is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema (extra [clients]) is not installed")

ROOT = Path(__file__).parents[1]
needs_demo = pytest.mark.skipif(
    not (ROOT / "model.safetensors").exists(), reason="the root holds no trained model yet"
)
PROMPT = "Once upon a time, a girl said: "


def record(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


SCHEMAS = {
    "string": {"type": "string", "maxLength": 20},
    "long string": {"type": "string", "minLength": 3, "maxLength": 300},
    "integer": {"type": "integer"},
    "number or nothing": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    "enum": {"enum": ["red", "green", "blue", 3, None]},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "nested": record(
        name={"type": "string", "maxLength": 12},
        age={"type": "string", "pattern": "^[1-9][0-9]?$"},
        pets={"type": "array", "items": record(kind={"enum": ["cat", "dog"]}), "minItems": 1, "maxItems": 2},
    ),
}
LAWS = [{"temperature": 0.5}, {"temperature": 1.0}, {"do_sample": False}]


@pytest.fixture(scope="module")
def model():
    model = CALMForCausalLM.from_pretrained(ROOT, dtype=torch.float32).eval()
    model.generation_config.num_candidates = 40
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


def texts(model, tokenizer, grammar, prompts=(PROMPT,), seed=0, max_new_tokens=120, **law):
    """What follows the prompts, special tokens left out, and the ids."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        logits_processor=[grammar],
        max_new_tokens=max_new_tokens,
        **law,
    )[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(ids, skip_special_tokens=True), ids.tolist()


@needs_demo
@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("name", SCHEMAS)
def test_json_is_valid_in_batches_at_every_law(model, tokenizer, name, law):
    grammar = Grammar(tokenizer, json_schema=SCHEMAS[name])
    prompts = [PROMPT, "A", "He had " * 9]
    for seed in (0, 10):
        together, ids = texts(model, tokenizer, grammar, prompts, seed, **law)
        for text, tokens in zip(together, ids, strict=True):
            jsonschema.validate(json.loads(text), SCHEMAS[name])
            written = tokens[: tokens.index(tokenizer.eos_token_id)]
            assert not set(written) & set(tokenizer.all_special_ids)
    # As alone, up to rounding, which differs between the shapes.
    alone, _ = texts(model, tokenizer, grammar, prompts[:1], 10, **law)
    jsonschema.validate(json.loads(alone[0]), SCHEMAS[name])


@needs_demo
def test_seeds_give_different_json(model, tokenizer):
    grammar = Grammar(tokenizer, json_schema=json.dumps(SCHEMAS["string"]))
    assert len(set(texts(model, tokenizer, grammar, [PROMPT] * 6, temperature=1.0)[0])) > 3


@needs_demo
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_regex_is_matched_and_its_end_may_lie_within_a_patch(model, tokenizer, law):
    """Of texts of two lengths one ends within a patch."""
    for regex in ("[a-z]{3}", "[a-z]{4}", "(cat|dog)s? [0-9]{1,3}!", "(é|ü|☃){2}"):
        grammar = Grammar(tokenizer, regex=regex)
        (text,), (ids,) = texts(model, tokenizer, grammar, max_new_tokens=30, **law)
        assert re.fullmatch(regex, text) and tokenizer.eos_token_id in ids
    lengths = set()
    for seed in range(4):
        (_,), (ids,) = texts(model, tokenizer, Grammar(tokenizer, regex="[a-z ]{1,9}"), seed=seed, **law)
        lengths.add(ids.index(tokenizer.eos_token_id) % model.config.patch_size)
    assert lengths == {0, 1} or law.get("do_sample") is False


@needs_demo
def test_what_is_cut_off_is_a_beginning_that_matches(model, tokenizer):
    grammar = Grammar(tokenizer, regex="[a-z ]{60,}")
    (text,), (ids,) = texts(model, tokenizer, grammar, max_new_tokens=15)
    assert re.fullmatch("[a-z ]+", text) and len(ids) == 15
    state = grammar.first_state
    for token in ids:
        state = grammar.state_after(state, token)
    assert state is not None


@needs_demo
def test_a_grammar_is_a_rule_of_one_text_of_a_batcher(model, tokenizer):
    grammar = Grammar(tokenizer, json_schema=SCHEMAS["nested"])
    with Batcher(model, tokenizer) as batcher:
        ask = {"max_new_tokens": 120, "temperature": 0.5}
        futures = [batcher.submit(PROMPT, seed=i, logits_processor=[grammar], **ask) for i in range(3)]
        free = batcher.submit(PROMPT, seed=0, max_new_tokens=20, temperature=0.5)
        for future in futures:
            jsonschema.validate(json.loads(future.result(60).text), SCHEMAS["nested"])
            assert future.result().finish_reason == "stop"
        assert not free.result(60).text.startswith("{")


# As a processor


@needs_demo
def test_masks_are_those_of_walking_the_automaton_token_by_token(tokenizer):
    """Any order of texts, long and short ones, equal and unequal, gives what a walk from the beginning gives."""
    grammar = Grammar(tokenizer, json_schema=SCHEMAS["nested"])
    processor, prompt = grammar.after_prompt(2), [5, 6]
    random = torch.Generator().manual_seed(0)
    whole = []
    state = grammar.first_state
    while (allowed := grammar.allowed(state)) != [tokenizer.eos_token_id]:
        whole.append(allowed[int(torch.randint(len(allowed), (1,), generator=random))])
        state = grammar.index.get_next_state(state, whole[-1])
    for _ in range(60):
        length = int(torch.randint(len(whole) + 1, (1,), generator=random))
        rows = [list(whole[:length]) for _ in range(4)]
        for row in rows[2:]:
            row[-2:] = [int(token) for token in torch.randint(3, 1024, (len(row[-2:]),), generator=random)]
        scores = torch.zeros(4, len(tokenizer))
        scores = processor(torch.tensor([prompt + row for row in rows]), scores)
        for row, scores_V in zip(rows, scores, strict=True):
            state = grammar.first_state
            for token in row:
                state = grammar.index.get_next_state(state, token) if state is not None else None
            assert (scores_V == 0).nonzero()[:, 0].tolist() == grammar.allowed(state)


# Tokens as bytes

TEXTS = ["Hello, world", " a  b\n\tc", "naïve ☃ 你好 🎈", "x" * 30, "don't"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentence_piece():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["▁", "H", "e", "l", "o", "▁a", "b", "w", "x", "el"]:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("e", "l")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_bytes_of_tokens_joined_are_the_text(make):
    tokenizer = make()
    tokenizer.add_tokens([AddedToken("[extra]", special=False), AddedToken("<tool>", special=True)])
    by_id = {number: spelt for spelt, numbers in token_bytes(tokenizer).items() for number in numbers}
    for text in [*TEXTS, "a[extra]b"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(by_id[number] for number in ids).decode() == text
        assert tokenizer.decode(ids) == text
    special = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<tool>")}
    assert set(by_id) == set(range(len(tokenizer))) - special


def test_a_text_may_go_on_from_where_it_may_end():
    tokenizer = byte_level()
    grammar = Grammar(tokenizer, json_schema={"type": "number"})
    for text in ("1", "-12", "1.5", "10.25e-3"):
        state = grammar.first_state
        for byte in text:
            (token,) = tokenizer(byte, add_special_tokens=False)["input_ids"]
            assert token in grammar.allowed(state)
            state = grammar.state_after(state, token)
        assert tokenizer.eos_token_id in grammar.allowed(state)
    nul = tokenizer.convert_tokens_to_ids("Ā")  # byte 0, of which the library makes an end
    assert nul not in grammar.allowed(state)


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_a_grammar_of_such_a_tokenizer_takes_the_tokens_of_what_matches(make):
    tokenizer = make()
    grammar = Grammar(tokenizer, regex="((Hello|☃) *)+")
    for text, is_end in (("Hello☃ ", True), ("☃ HelloHello", True), ("HelloHe", False), ("Help", None)):
        state = grammar.first_state
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            state = grammar.state_after(state, token)
        assert (state is None) == (is_end is None)
        assert (tokenizer.eos_token_id in grammar.allowed(state)) == (is_end is not False)


# Refusals


@pytest.fixture(scope="module")
def some_tokenizer():
    return byte_level()


@pytest.mark.parametrize(
    "asked, sentence",
    [
        ({}, "is a json_schema or a regex: pass one of them"),
        ({"json_schema": {}, "regex": "a"}, "is a json_schema or a regex: pass one of them"),
        ({"json_schema": {"type": "strin"}}, "The json_schema can't be made a grammar .* Unsupported type: strin"),
        ({"json_schema": "{"}, "The json_schema is no JSON: "),
        ({"json_schema": {"$ref": "#/nowhere"}}, "The json_schema can't be made .* reference"),
        ({"json_schema": {"enum": [{1}]}}, "The json_schema is no JSON: .*not JSON serializable"),
        ({"json_schema": {"type": "integer", "minimum": 3}}, "has minimum, which outlines-core doesn't heed"),
        ({"json_schema": record(a={"type": "array", "uniqueItems": True})}, "has uniqueItems, which outlines-core"),
        ({"regex": "("}, "The regex can't be made a grammar of this tokenizer's tokens: Failed to build DFA"),
        ({"regex": 5}, "regex=5: must be a text"),
    ],
    ids=str,
)
def test_what_is_no_grammar_is_refused_in_a_sentence(some_tokenizer, asked, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        Grammar(some_tokenizer, **asked)
    assert "\n" not in str(refused.value)


def test_properties_may_have_the_names_of_keywords(some_tokenizer):
    assert Grammar(some_tokenizer, json_schema=record(minimum={"enum": [{"not": 1}]})).first_state


@pytest.mark.parametrize(
    "schema", [{"type": "object"}, {"type": "string", "maxLength": 2000}, {"type": "array"}], ids=str
)
def test_what_may_begin_within_itself_is_built_soon(some_tokenizer, schema):
    """An automaton for a search would take exponential time."""
    started = time.monotonic()
    Grammar(some_tokenizer, json_schema=schema)
    assert time.monotonic() - started < 10


def test_what_takes_too_long_is_refused(some_tokenizer, monkeypatch):
    monkeypatch.setattr(grammars_calm, "BUILD_SECONDS", 1)
    with pytest.raises(ValueError, match="it takes more than 1 seconds"):
        Grammar(some_tokenizer, regex="[ab]*a[ab]{30}")  # 2³⁰ states


def test_what_the_vocabulary_cannot_spell_is_refused():
    """Without bytes as tokens there may be no way to write a character."""
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "▁": 2}, merges=[]))
    tokenizer.decoder = decoders.Replace("▁", " ")
    with pytest.raises(ValueError, match="The regex can't be made a grammar"):
        Grammar(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), regex="ab")


def test_tokenizers_that_do_not_fit_are_refused(some_tokenizer):
    for none in (".", None):
        with pytest.raises(ValueError, match="tokenizer=.*: must be the model's tokenizer, as AutoTokenizer loads it"):
            Grammar(none, regex="a")
    with pytest.raises(ValueError, match="its decoder is unknown here .*Fuse"):
        Grammar(tiny_tokenizer(), regex="a")
    without_end = PreTrainedTokenizerFast(tokenizer_object=some_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="The tokenizer has no eos_token"):
        Grammar(without_end, regex="a")


def test_a_missing_package_is_named(some_tokenizer, monkeypatch):
    monkeypatch.setattr(grammars_calm, "outlines_core", None)
    with pytest.raises(ImportError, match="A grammar needs outlines-core: pip install outlines_core"):
        Grammar(some_tokenizer, regex="a")
