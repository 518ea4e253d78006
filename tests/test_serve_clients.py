"""Real clients of the OpenAI API against the server, with the fields that they send by themselves."""

import pytest

pytestmark = pytest.mark.transformers  # run where the extra [clients] is installed
PROMPT = "Once upon a time"


@pytest.fixture
def settings(server):
    return {"base_url": f"{server.url}/v1", "api_key": "none", "max_tokens": 12, "seed": 3}


@pytest.fixture
def expected(server):
    return server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "seed": 3})[1]["choices"][0]["text"]


def test_langchain(settings, expected):
    langchain = pytest.importorskip("langchain_openai")
    assert langchain.OpenAI(model="tiny", temperature=0.5, **settings).invoke(PROMPT) == expected
    chat = langchain.ChatOpenAI(model="tiny", temperature=0.5, **settings)
    assert chat.invoke(PROMPT).content == expected
    assert "".join(chunk.content for chunk in chat.stream(PROMPT)) == expected


def test_litellm(settings, expected, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    litellm = pytest.importorskip("litellm")
    text = litellm.text_completion(model="text-completion-openai/tiny", prompt=PROMPT, **settings)
    assert text.choices[0].text == expected
    chat = {"model": "openai/tiny", "messages": [{"role": "user", "content": PROMPT}], **settings}
    assert litellm.completion(**chat).choices[0].message.content == expected
    chunks = litellm.completion(**chat, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
