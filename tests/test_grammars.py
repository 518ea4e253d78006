"""Grammars: JSON schemas and regular expressions, with the demo model and with random tokens."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
import torch
from commands import ROOT
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calm_transformers import grammars
from calm_transformers.grammars import Grammar
from calm_transformers.model.modeling_calm import CALMForCausalLM

needs_demo = pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the root has no trained model")
PROMPT = "Once upon a time, a girl said: "


def record(**properties):
    fields = {"properties": properties, "required": list(properties)}
    return {"type": "object", "additionalProperties": False, **fields}


NESTED = record(
    name={"type": "string", "maxLength": 12},
    age={"type": "string", "pattern": "^[1-9][0-9]?$"},
    pets={"type": "array", "items": record(kind={"enum": ["cat", "dog"]}), "minItems": 1, "maxItems": 2},
)


@pytest.fixture(scope="module")
def model():
    model = CALMForCausalLM.from_pretrained(ROOT, dtype=torch.float32).eval()
    model.generation_config.num_candidates = 40
    return model


@pytest.fixture(scope="module")
def trained():
    return AutoTokenizer.from_pretrained(ROOT)


def generate_texts(model, tokenizer, grammar, prompts=(PROMPT,), max_new_tokens=120, **sampling):
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    settings = {"generator": generators, "logits_processor": [grammar], "max_new_tokens": max_new_tokens, **sampling}
    ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings)
    ids = ids[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(ids, skip_special_tokens=True), ids.tolist()


@needs_demo
@pytest.mark.parametrize("sampling", [{"temperature": 0.5}, {"temperature": 1.0}, {"do_sample": False}], ids=str)
def test_batches_are_json_of_the_schema(model, trained, sampling):
    grammar = Grammar(trained, json_schema=json.dumps(NESTED))
    texts, ids = generate_texts(model, trained, grammar, [PROMPT, "A", "He had " * 9], **sampling)
    for text, tokens in zip(texts, ids, strict=True):
        jsonschema.validate(json.loads(text), NESTED)
        before_eos = tokens[: tokens.index(trained.eos_token_id)]
        assert not set(before_eos) & set(trained.all_special_ids)
    assert len(set(texts)) == 3


@needs_demo
def test_a_text_matches_its_regex_and_may_end_inside_a_patch(model, trained):
    """Of two lengths one ends inside a patch; text that `max_new_tokens` cuts off is a prefix of a match."""
    lengths = set()
    for regex in ("[a-z]{3}", "[a-z]{4}", "(cat|dog)s? [0-9]{1,3}!", "(é|ü|☃){2}"):
        grammar = Grammar(trained, regex=regex)
        (text,), (ids,) = generate_texts(model, trained, grammar, max_new_tokens=30, temperature=0.5)
        assert re.fullmatch(regex, text)
        lengths.add(ids.index(trained.eos_token_id) % model.config.patch_size)
    assert lengths == {0, 1}
    (text,), (ids,) = generate_texts(model, trained, Grammar(trained, regex="[a-z ]{60,}"), max_new_tokens=15)
    assert re.fullmatch("[a-z ]+", text) and len(ids) == 15


TEXTS = ["Hello, world", " a  b\n\tc", "naïve ☃ 你好 🎈", "x" * 30, "don't"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentence_piece():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["▁", "H", "e", "l", "o", "▁a", "b", "w", "x", "el"]:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("e", "l")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


MAKERS = {"demo": lambda: AutoTokenizer.from_pretrained(ROOT), "bytes": byte_level, "sentences": sentence_piece}
INTEGER, OPEN = {"type": "integer"}, {"additionalProperties": True}
TREE = record(v={**INTEGER, "minimum": 3, "maximum": 3444}, c={"type": "array", "items": {"$ref": "#/$defs/tree"}})
ALL_OF = {"allOf": [record(a=INTEGER) | OPEN, record(b={"enum": ["x", "y"]}) | OPEN]}
OTHER_NAMES = {"type": "object", "properties": {"a": INTEGER, "n": INTEGER}}
OTHER_NAMES["additionalProperties"] = {"type": "string", "maxLength": 3}
GRAMMARS = [
    *({"json_schema": each} for each in (ALL_OF, OTHER_NAMES, {"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"})),
    *({"regex": each} for each in ("(cat|dog)s? [0-9]{1,3}!", "((Hello|☃) *)+", "a{0,20}")),
]


def walk(tokenizer, grammar, seed, length=4):
    """Returns random ids that the grammar allows, ended by the first possible EOS after `length` tokens (left out)."""
    random = torch.Generator().manual_seed(seed)
    processor, eos = grammar.after_prompt(1), tokenizer.eos_token_id
    ids = [eos]  # the prompt, which the grammar ignores
    while len(ids) == 1 or ids[-1] != eos:
        assert len(ids) < 2000
        scores = processor(torch.tensor([ids]), torch.zeros(1, len(tokenizer)))[0]
        allowed = (scores == 0).nonzero()[:, 0].tolist()
        closing = [token for token in allowed if tokenizer.decode([token]).strip() in ('"', "]", "}", '"}', '"]')]
        choices = allowed if len(ids) < length else closing or allowed
        ends = eos in allowed and len(ids) >= length
        ids.append(eos if ends else choices[int(torch.randint(len(choices), (1,), generator=random))])
    return ids[1:-1]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture(scope="module", params=MAKERS)
def any_tokenizer(request):
    return MAKERS[request.param]()


@pytest.mark.parametrize("options", GRAMMARS, ids=str)
def test_random_walks_match_the_grammar(any_tokenizer, options):
    grammar = Grammar(any_tokenizer, **options)
    for seed in range(3):
        ids = walk(any_tokenizer, grammar, seed, length=4 + 12 * seed)
        text = any_tokenizer.decode(ids)
        assert not set(ids) & set(any_tokenizer.all_special_ids)
        if "regex" in options:
            assert re.fullmatch(options["regex"], text)
        else:
            jsonschema.validate(json.loads(text), options["json_schema"])


def test_candidates_are_masked_independently_of_each_other(tokenizer):
    """One processor masks candidates of any length and order as a new processor for each does."""
    grammar = Grammar(tokenizer, json_schema=ALL_OF)
    processor, prompt, random = grammar.after_prompt(2), [5, 6], torch.Generator().manual_seed(0)
    walks = [[*walk(tokenizer, grammar, seed), tokenizer.eos_token_id, tokenizer.eos_token_id] for seed in range(4)]
    for _ in range(60):
        length = int(torch.randint(min(map(len, walks)) + 1, (1,), generator=random))
        rows = [prompt + walks[int(torch.randint(4, (1,), generator=random))][:length] for _ in range(5)]
        scores = torch.randn(5, len(tokenizer) + 3, generator=random)
        alone = [grammar.after_prompt(2)(torch.tensor([row]), scores[[i]]) for i, row in enumerate(rows)]
        together = processor(torch.tensor(rows), scores)
        assert torch.equal(together, torch.cat(alone))
        assert ((together == scores) | (together == -torch.inf)).all()


@pytest.mark.parametrize("text", ["<|eos|>", "a<|pad|>b"])
def test_the_spelling_of_a_special_token_is_generated_as_text(trained, text):
    for options in ({"json_schema": {"const": text}}, {"regex": re.escape(text)}):
        processor, ids = Grammar(trained, **options).after_prompt(0), []
        while not ids or ids[-1] != trained.eos_token_id:
            allowed = processor(torch.tensor([ids], dtype=torch.long), torch.zeros(1, len(trained)))[0].isfinite()
            assert len(ids) < 40 and allowed.any()
            ids.append(int(allowed.nonzero()[-1]))
        expected = json.dumps(text) if "json_schema" in options else text
        assert trained.decode(ids[:-1]) == expected and not set(ids[:-1]) & set(trained.all_special_ids)


def test_threads_may_share_a_grammar(tokenizer):
    grammar = Grammar(tokenizer, regex="[a-z]{1,40}")
    alone = [walk(tokenizer, grammar, seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda seed: walk(tokenizer, grammar, seed), range(16))) == alone


def test_a_complete_match_may_continue_or_end_and_ends_at_eos(tokenizer):
    processor = Grammar(tokenizer, json_schema={"type": "number"}).after_prompt(0)
    ids = tokenizer("10.25e-3", add_special_tokens=False)["input_ids"]
    for end in ([], [tokenizer.eos_token_id], [tokenizer.eos_token_id] * 3):
        allowed = processor(torch.tensor([ids + end]), torch.zeros(1, len(tokenizer)))[0] == 0
        assert allowed[tokenizer.eos_token_id] and (allowed.sum() > 1) == (not end)


def test_a_text_that_does_not_match_raises_an_error(tokenizer):
    processor = Grammar(tokenizer, regex="ab").after_prompt(0)
    with pytest.raises(ValueError, match="A text doesn't match its grammar: another logits processor has forced"):
        processor(torch.tensor([tokenizer.convert_tokens_to_ids(["a", "a"])]), torch.zeros(1, len(tokenizer)))


def test_invalid_grammars_raise_an_error_of_one_line(tokenizer):
    for options, sentence in (
        ({}, "needs a json_schema or a regex: pass one of them"),
        ({"json_schema": {}, "regex": "a"}, "needs a json_schema or a regex: pass one of them"),
        ({"json_schema": "{"}, "The json_schema can't be compiled .* Expecting property name"),
        ({"json_schema": {"enum": [{1}]}}, "Object of type set is not JSON serializable"),
        ({"json_schema": {"type": "array", "contains": {}, "x-guidance": {"lenient": True}}}, '."contains"'),
        ({"json_schema": record(a={"type": "object", "minProperties": 2})}, "minProperties=2 is not supported"),
        ({"json_schema": '{"items":' * 200 + "{}" + "}" * 200}, "recursion limit exceeded"),
        ({"json_schema": {"enum": list(map(str, range(10**5)))}}, "grammar. too big"),
        ({"regex": "("}, "The regex can't be compiled to a grammar for this tokenizer: unclosed group"),
        ({"regex": 5}, "The regex can't be compiled to a grammar .* 'int'"),
    ):
        with pytest.raises(ValueError, match=sentence) as raised:
            Grammar(tokenizer, **options)
        assert "\n" not in str(raised.value)


def test_unicode_escapes_are_forbidden(tokenizer):
    """They could spell a property's name so that its schema doesn't apply."""
    processor = Grammar(tokenizer, json_schema=OTHER_NAMES).after_prompt(0)
    ids = tokenizer('{"\\', add_special_tokens=False)["input_ids"]
    scores = processor(torch.tensor([ids]), torch.zeros(1, len(tokenizer)))[0]
    newline, unicode = tokenizer.convert_tokens_to_ids(["n", "u"])
    assert scores[newline] == 0 and scores[unicode] == -torch.inf


def test_characters_outside_the_vocabulary_raise_an_error():
    """Without byte tokens some characters have no ids."""
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "▁": 2}, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    with pytest.raises(ValueError, match="The regex can't be compiled to a grammar"):
        Grammar(tokenizer, regex="b")
    with pytest.raises(ValueError, match="A text has no continuation in its grammar"):
        walk(tokenizer, Grammar(tokenizer, regex="ab"), 0)


def test_unsupported_tokenizers_raise_an_error(tokenizer):
    without_eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    for other in (".", None):
        with pytest.raises(ValueError, match="tokenizer=.*: must be the model's tokenizer, as AutoTokenizer loads it"):
            Grammar(other, regex="a")
    with pytest.raises(ValueError, match="The tokenizer has no eos_token"):
        Grammar(without_eos, regex="a")
    with pytest.raises(ValueError, match="can't determine decoder type.*Fuse"):
        Grammar(tiny_tokenizer(), regex="a")


def test_a_missing_package_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(grammars, "llguidance", None)
    with pytest.raises(ImportError, match='A grammar needs llguidance: pip install "llguidance>=1.9,<2"'):
        Grammar(tokenizer, regex="a")
