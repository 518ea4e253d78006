"""Random JSON schemas and values: llguidance accepts what jsonschema does, and a random walk ends in a valid text."""

import functools
import json

import jsonschema
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_grammars import MAKERS, walk

from calm_transformers.grammars import Grammar

pytestmark = pytest.mark.fuzz

NAMES = ["a", "b", "ab", "", "é", 'q"', "not", "minProperties"]
UNSUPPORTED = [  # what llguidance can't enforce or is invalid
    *({"uniqueItems": True}, {"not": {"type": "null"}}, {"contains": {}}, {"propertyNames": {"maxLength": 1}}),
    *({"type": "strin"}, {"minLength": -1}, {"pattern": "("}, {"$ref": "#/$defs/none"}, {"minProperties": 2}),
    *({"if": {"type": "null"}, "then": {"const": 1}}, {"dependentRequired": {"a": ["b"]}}),
]
texts = st.text('ab] é"\\\t☃', max_size=4)  # no newline, before which Python's $ matches, too
numbers = st.integers(-30, 30) | st.integers(-300, 300).map(
    lambda n: n / 8 if n % 8 else n // 8
)  # not 1.0, which is 1
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)


def bounded(kind, bounds):
    """A schema of numbers with the bounds that are given, and values around them."""
    names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    schema = {"type": kind} | {name: bound for name, bound in zip(names, bounds, strict=True) if bound is not None}
    near = [bound + step for bound in bounds if bound is not None for step in (-1, 0, 1)]
    return schema, st.sampled_from(near or [0]) | numbers


def leaves():
    """Pairs of a schema and a strategy of values, most of which match it."""
    lengths = st.tuples(st.none() | st.integers(0, 3), st.none() | st.integers(0, 4))
    lengths = lengths.map(
        lambda pair: {n: v for n, v in zip(("minLength", "maxLength"), pair, strict=True) if v is not None}
    )
    patterns = st.sampled_from(["^a+$", "^(a|é)b?$", "]", "^[^a]*$", "a?]|☃{2}"]).map(
        lambda pattern: {"pattern": pattern}
    )
    bounds = st.tuples(*[st.none() | st.integers(-9, 12)] * 4)
    return st.one_of(
        st.sampled_from([({}, scalars), ({"type": "object"}, st.just({}) | scalars)]),
        st.sampled_from(["null", "boolean"]).map(lambda kind: ({"type": kind}, st.none() | st.booleans())),
        (lengths | patterns).map(lambda more: ({"type": "string", **more}, texts)),
        st.builds(bounded, st.sampled_from(["integer", "number"]), bounds),
        st.lists(scalars, min_size=1, max_size=3).map(lambda each: ({"enum": each}, st.sampled_from(each) | scalars)),
        scalars.map(lambda value: ({"const": value}, st.just(value) | scalars)),
    )


@st.composite
def containers(draw, children):
    kind = draw(st.sampled_from(["array", "tuple", "object", "object", "anyOf", "allOf"]))
    pairs = draw(st.lists(children, min_size=1, max_size=3))
    schemas, values = [schema for schema, _ in pairs], [value for _, value in pairs]
    if kind in ("anyOf", "allOf"):
        return {kind: schemas}, st.one_of(values)
    limits = {"array": "Items", "tuple": "Items"}.get(kind)
    sizes = (
        {f"{way}{limits}": draw(st.integers(0, 3)) for way in draw(st.sets(st.sampled_from(["min", "max"])))}
        if limits
        else {}
    )
    if kind == "array":
        return {"type": "array", "items": schemas[0], **sizes}, st.lists(values[0], max_size=4)
    if kind == "tuple":
        more = draw(st.sampled_from([{}, {"items": False}, {"items": schemas[0]}]))
        rest = st.lists(values[0], max_size=2)
        found = st.tuples(st.integers(0, 3), st.tuples(*values), rest).map(lambda t: [*t[1], *t[2]][: t[0] or None])
        return {"type": "array", "prefixItems": schemas, **more, **sizes}, found
    names = draw(st.lists(st.sampled_from(NAMES), min_size=len(pairs), max_size=len(pairs), unique=True))
    required = [name for name in names if draw(st.booleans())]
    more = draw(st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": schemas[0]}]))
    known = st.fixed_dictionaries({}, optional=dict(zip(names, values, strict=True)))
    rest = st.dictionaries(st.sampled_from(["x", "y"]), values[0] | scalars, max_size=1)
    found = st.tuples(known, rest).map(lambda t: {**{n: t[0][n] for n in names if n in t[0]}, **t[1]})
    schema = {"type": "object", "properties": dict(zip(names, schemas, strict=True)), "required": required, **more}
    return schema, found


pairs = st.recursive(leaves(), containers, max_leaves=6)


@functools.cache
def tokenizer_of(name):
    return MAKERS[name]()


def compiled(tokenizer, schema):
    """The grammar of a schema, or None if it is refused in one line."""
    try:
        return Grammar(tokenizer, json_schema=schema)
    except ValueError as error:
        assert str(error).startswith("The json_schema can't be compiled") and "\n" not in str(error)
        return None


def accepts(tokenizer, grammar, text):
    ids, processor = (
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
        grammar.after_prompt(0),
    )
    steps = (
        processor(torch.tensor([ids[:i]], dtype=torch.long), torch.zeros(1, len(tokenizer))) for i in range(len(ids))
    )
    return all(scores[0, token] == 0 for token, scores in zip(ids, steps, strict=True))


@given(pairs, st.sampled_from(sorted(MAKERS)), st.data())
def test_walks_are_valid_and_verdicts_agree(pair, name, data):
    (schema, values), tokenizer = pair, tokenizer_of(name)
    grammar = compiled(tokenizer, schema)
    assume(grammar is not None)
    ids = walk(tokenizer, grammar, data.draw(st.integers(0, 99)), length=data.draw(st.integers(1, 30)))
    assert not set(ids) & set(tokenizer.all_special_ids)
    value = json.loads(tokenizer.decode(ids))
    jsonschema.validate(value, schema)
    for value in data.draw(st.lists(values, min_size=3, max_size=5)):
        text = json.dumps(value, ensure_ascii=False)
        valid = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert accepts(tokenizer, grammar, text) == valid, (schema, text)


@given(pairs, st.sampled_from(UNSUPPORTED), st.sampled_from(["here", "properties", "items"]))
def test_what_is_not_enforced_is_refused(pair, unsupported, place):
    places = {"properties": {"b": pair[0], "a": unsupported}, "items": unsupported}
    assert compiled(tokenizer_of("bytes"), {place: places[place]} if place in places else unsupported) is None
