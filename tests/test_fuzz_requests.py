"""Random requests of the server's own OpenAPI description: an answer or an error that names the field, never a 500."""

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_process import in_process
from tokenizers import decoders

pytestmark = pytest.mark.fuzz

KNOWN = {"prompt": "Once", "max_tokens": 6, "seed": 0, "num_candidates": 9}
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e-320, 1e308, float("inf"), float("nan"), 0.5, 1.0, True)
WORDS = ("", "a", "\ud800", "\0", "é\u2028", "x" * 300, "9" * 5000, "-1", "\x85", "{{ 1/0 }}", "</s>")
scalars = st.one_of(st.none(), st.booleans(), st.integers(-5, 99), st.floats(), st.sampled_from(NUMBERS + WORDS))
anything = st.recursive(
    scalars, lambda each: st.one_of(st.lists(each, max_size=3), st.dictionaries(st.sampled_from(WORDS), each, max_size=3))
)


def values(schema, definitions):
    """A strategy of values that match a JSON schema of the description."""
    if schema.get("title") == "Model":
        return st.just("tiny")
    if "$ref" in schema:
        return values(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if choices := schema.get("anyOf"):
        return st.one_of([values(each, definitions) for each in choices if each != {"type": "null"}])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    least, most = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    match schema.get("type"):
        case "integer":
            near = st.integers(0 if least is None else least, 12 if most is None else min(most, (least or 0) + 12))
            return near | st.integers(least, schema.get("exclusiveMaximum", 2**64 if most is None else most + 1) - 1)
        case "number":
            return st.floats(0.4 if least is None else least, 2 if most is None else most, exclude_min=least is None)
        case "string":
            return st.text("ab {", max_size=9) | st.text(max_size=30)
        case "boolean":
            return st.booleans()
        case "array":
            least = schema.get("minItems", 0)
            return st.lists(values(schema["items"], definitions), min_size=least, max_size=least + 3)
        case "object" if "properties" in schema:
            fields = {name: values(each, definitions) for name, each in schema["properties"].items()}
            required = {name: fields.pop(name) for name in schema.get("required", ())}
            chosen = st.lists(st.sampled_from(sorted(fields) or ["-"]), max_size=5, unique=True)
            some = chosen.flatmap(lambda names: st.fixed_dictionaries({n: fields[n] for n in names if n in fields}))
            return st.tuples(st.fixed_dictionaries(required), some).map(lambda pair: pair[0] | pair[1])
        case "object":
            more = schema.get("additionalProperties")
            each = values(more, definitions) if isinstance(more, dict) else anything
            return st.dictionaries(st.integers(0, 120).map(str), each, max_size=4)
    return anything


@pytest.fixture(scope="module")
def api(tiny_folder):
    with in_process(tiny_folder, max_rows=4, max_waiting=4, max_draws=1000, max_length=40) as client:
        tokenizer = client.batcher.tokenizer.backend_tokenizer  # llguidance knows no decoder of Fuse alone
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        client.description = client.get("/openapi.json").json()
        client.known = client.post("/v1/completions", json=KNOWN).json()["choices"]
        yield client


def bodies(schema, definitions):
    """Bodies that match the schema, and ones of which a field is replaced, added or left out."""
    names = st.sampled_from([*schema["properties"], *WORDS])
    change = st.tuples(names, st.just("set"), anything) | st.tuples(names, st.just("drop"), st.none())

    def changed(pair):
        body = dict(pair[0])
        for name, action, value in pair[1]:
            body |= {name: value}
            if action == "drop":
                del body[name]
        return body

    return st.tuples(values(schema, definitions), st.lists(change, max_size=2)).map(changed) | anything


@given(st.data())
def test_a_request_is_answered_or_its_field_is_named_and_the_next_one_served(api, data):
    definitions = api.description["components"]["schemas"]
    operations = {path: each["post"] for path, each in api.description["paths"].items() if "post" in each}
    path = data.draw(st.sampled_from(sorted(operations)))
    name = operations[path]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    body = data.draw(bodies(definitions[name], definitions))
    answer = api.post(path, content=json.dumps(body))
    if answer.status_code == 200:
        schema = json.loads(json.dumps(definitions[name]).replace("#/components/schemas", "#/$defs"))
        jsonschema.validate({k: v for k, v in body.items() if v is not None}, schema | {"$defs": definitions})
        assert '"server_error"' not in answer.text, answer.text
    else:
        error = answer.json()["error"]
        assert answer.status_code in (400, 404, 413), answer.text
        assert "\n" not in error["message"] and error["message"].endswith(".")
        if error["param"] is None:
            assert "body" in error["message"] or "fields" in error["message"], error
        else:
            assert error["param"] in error["message"], error
    assert api.post("/v1/completions", json=KNOWN).json()["choices"] == api.known
