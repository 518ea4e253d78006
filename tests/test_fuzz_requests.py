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
containers = st.dictionaries(st.sampled_from(WORDS), scalars, max_size=3) | st.lists(scalars, max_size=3)
anything = scalars | containers | st.lists(containers, max_size=3)


def values(schema):
    """A strategy of values that match a JSON schema of the description, small ones where there is no bound."""
    if schema.get("title") == "Model":
        return st.just("tiny")
    if "anyOf" in schema:
        return st.one_of([values(each) for each in schema["anyOf"] if each != {"type": "null"}])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    low, high = schema.get("minimum"), schema.get("maximum")
    match schema.get("type"):
        case "integer":
            low = low or 0
            high = schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else 2**64 if high is None else high
            return st.integers(low, min(high, low + 12)) | st.integers(low, high)
        case "number":
            return st.floats(0.4 if low is None else low, 2 if high is None else high, exclude_min=low is None)
        case "string":
            return st.text("ab {", max_size=9) | st.text(max_size=30)
        case "boolean":
            return st.booleans()
        case "array":
            return st.lists(values(schema["items"]), min_size=(low := schema.get("minItems", 0)), max_size=low + 3)
        case "object" if "properties" in schema:
            fields = {name: values(each) for name, each in schema["properties"].items()}
            required = st.fixed_dictionaries({name: fields.pop(name) for name in schema.get("required", ())})
            some = st.lists(st.sampled_from(sorted(fields)), max_size=5, unique=True) if fields else st.just([])
            some = some.flatmap(lambda names: st.fixed_dictionaries({name: fields[name] for name in names}))
            return st.builds(dict.__or__, required, some)
        case "object":
            more = schema.get("additionalProperties")
            each = values(more) if isinstance(more, dict) else anything
            return st.dictionaries(st.integers(0, 120).map(str), each, max_size=4)
    return anything


@pytest.fixture(scope="module")
def api(tiny_folder):
    with in_process(tiny_folder, max_rows=4, max_waiting=4, max_draws=1000, max_length=40) as client:
        tokenizer = client.batcher.tokenizer.backend_tokenizer  # llguidance knows no decoder of Fuse alone
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        description = client.get("/openapi.json").json()
        schemas = {f"#/components/schemas/{name}": each for name, each in description["components"]["schemas"].items()}
        posts = {path: each["post"]["requestBody"] for path, each in description["paths"].items() if "post" in each}
        bodies = {path: each["content"]["application/json"]["schema"] for path, each in posts.items()}
        for _ in range(2):  # bodies, and what they refer to
            bodies = json.loads(json.dumps(bodies), object_hook=lambda each: schemas.get(each.get("$ref"), each))
        client.schemas = bodies
        client.known = client.post("/v1/completions", json=KNOWN).json()["choices"]
        yield client


@given(st.data())
def test_a_request_is_answered_or_its_field_is_named_and_the_next_one_served(api, data):
    path = data.draw(st.sampled_from(sorted(api.schemas)))
    schema, names = api.schemas[path], st.sampled_from([*api.schemas[path]["properties"], *WORDS])
    change = data.draw(st.sampled_from([None, None, None, "body", "add", "add", "drop"]))
    body = data.draw(anything if change == "body" else values(schema))
    if change == "add":
        body |= data.draw(st.dictionaries(names, anything, min_size=1, max_size=2))
    elif change == "drop":
        body.pop(data.draw(names), None)
    answer = api.post(path, content=json.dumps(body))
    if answer.status_code == 200:
        jsonschema.validate({name: value for name, value in body.items() if value is not None}, schema)
        assert '"server_error"' not in answer.text, answer.text
    else:
        error = answer.json()["error"]
        assert answer.status_code in (400, 404, 413), answer.text
        assert "\n" not in error["message"] and error["message"].endswith(".")
        assert (error["param"] or "") in error["message"], error
        assert error["param"] is not None or "body" in error["message"] or "fields" in error["message"], error
    assert api.post("/v1/completions", json=KNOWN).json()["choices"] == api.known
