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
numbers = st.integers(-30, 30) | st.integers(-99, 99).filter(lambda n: n % 8).map(lambda n: n / 8)  # 1 is never 1.0
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
STRINGS = [{"pattern": pattern} for pattern in ("^a+$", "^(a|é)b?$", "]", "^[^a]*$", "a?]|☃{2}")]


@st.composite
def schemas(draw, children=None):
    """A schema, and a strategy of values of which most match it."""

    def limits(*names, **bounds):
        return {name: draw(st.integers(*bounds["of"])) for name in draw(st.lists(st.sampled_from(names), unique=True))}

    leaves, kinds = "any boolean string integer number enum", "array tuple object object anyOf allOf"
    kind = draw(st.sampled_from((leaves if children is None else kinds).split()))
    if children is None:
        values = {"any": scalars, "boolean": st.booleans() | st.none(), "string": texts}.get(kind, numbers)
        if kind == "enum":
            each = draw(st.lists(scalars, min_size=1, max_size=3))
            return draw(st.sampled_from([{"enum": each}, {"const": each[0]}])), st.sampled_from(each) | scalars
        schema = {} if kind == "any" else {"type": draw(st.sampled_from([kind, kind, [kind, "null"]]))}
        if kind == "string":
            schema |= draw(st.sampled_from([limits("minLength", "maxLength", of=(0, 4)), *STRINGS]))
        elif kind in ("integer", "number"):
            found = limits("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", of=(-9, 12))
            near = [bound + step for bound in found.values() for step in (-1, 0, 1)]
            schema, values = schema | found, st.sampled_from(near or [0]) | values
        return schema, values
    inner, values = zip(*draw(st.lists(children, min_size=1, max_size=3)), strict=True)
    if kind in ("anyOf", "allOf"):
        return {kind: [*inner]}, st.one_of(values)
    sizes, more = limits("minItems", "maxItems", of=(0, 3)), draw(st.sampled_from([None, False, inner[0]]))
    if kind == "array":
        return {"type": "array", "items": inner[0], **sizes}, st.lists(values[0], max_size=4)
    if kind == "tuple":
        more = {} if more is None else {"items": more}
        found = st.tuples(st.integers(0, 3), st.tuples(*values), st.lists(values[0], max_size=2))
        found = found.map(lambda drawn: [*drawn[1], *drawn[2]][: drawn[0] or None])
        return {"type": "array", "prefixItems": [*inner], **more, **sizes}, found
    names = draw(st.permutations(NAMES))[: len(inner)]
    schema = {"type": "object", "properties": dict(zip(names, inner, strict=True))}
    schema["required"] = draw(st.lists(st.sampled_from(names), unique=True))
    known = st.fixed_dictionaries({}, optional=dict(zip(names, values, strict=True)))
    unknown = st.dictionaries(st.sampled_from(["x", "y"]), values[0] | scalars, max_size=1)
    found = st.tuples(known, unknown).map(lambda pair: {n: pair[0][n] for n in names if n in pair[0]} | pair[1])
    return schema | ({} if more is None else {"additionalProperties": more}), found


pairs = st.recursive(schemas(), schemas, max_leaves=6)
tokenizer_of = functools.cache(lambda name: MAKERS[name]())


def compiled(tokenizer, schema):
    """The grammar of a schema, or None if it is refused in one line."""
    try:
        return Grammar(tokenizer, json_schema=schema)
    except ValueError as error:
        assert str(error).startswith("The json_schema can't be compiled") and "\n" not in str(error)


def accepts(tokenizer, grammar, text):
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    processor, scores = grammar.after_prompt(0), torch.zeros(1, len(tokenizer))
    scored = (processor(torch.tensor([ids[:i]], dtype=torch.long), scores) for i in range(len(ids)))
    return all(scores[0, token] == 0 for scores, token in zip(scored, ids, strict=True))


@given(pairs, st.sampled_from(sorted(MAKERS)), st.data())
def test_walks_are_valid_and_verdicts_agree(pair, name, data):
    (schema, values), tokenizer = pair, tokenizer_of(name)
    grammar = compiled(tokenizer, schema)
    assume(grammar is not None)
    ids = walk(tokenizer, grammar, data.draw(st.integers(0, 99)), length=data.draw(st.integers(1, 30)))
    assert not set(ids) & set(tokenizer.all_special_ids)
    jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)
    for value in data.draw(st.lists(values, min_size=3, max_size=5)):
        text = json.dumps(value, ensure_ascii=False)
        valid = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert accepts(tokenizer, grammar, text) == valid, (schema, text)


@given(pairs, st.sampled_from(UNSUPPORTED), st.sampled_from(["here", "properties", "items"]))
def test_what_is_not_enforced_is_refused(pair, unsupported, place):
    places = {"properties": {"b": pair[0], "a": unsupported}, "items": unsupported}
    assert compiled(tokenizer_of("bytes"), {place: places[place]} if place in places else unsupported) is None
