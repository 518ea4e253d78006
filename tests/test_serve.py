"""`python -m calm.serve`: a real server asked with the official client, what is refused, imports without effects."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import commands
import pytest

from calm import serve

ROOT = Path(__file__).parents[1]
PROMPT = "Once upon a time"
START_SECONDS = 180
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def why_no_server():
    try:
        serve.check_environment()
    except serve.ServeError as error:
        return str(error)


needs_server = pytest.mark.skipif(why_no_server() is not None, reason=str(why_no_server()))


def run_module(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "calm.serve", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        **options,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(process, port, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}:\n{log.read_text()}"
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        time.sleep(0.2)
    raise AssertionError(f"no answer after {START_SECONDS} s:\n{log.read_text()}")


@contextlib.contextmanager
def running_server(model, home, *options, cwd=None):
    """A server process, and a client of it; the process is ended whatever happens.

    Args:
        model: folder or Hub id.
        home: folder that becomes HF_HOME and, without `cwd`, the working directory; the log is written there.
        cwd: the working directory.
    """
    from openai import OpenAI

    home.mkdir(parents=True, exist_ok=True)
    log, port = home / "log", free_port()
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "calm.serve", str(model), "--port", str(port), *options],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
            cwd=cwd or home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_healthy(process, port, log)
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield client, log
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    from tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.update(do_sample=True, temperature=0.5)
    model.generation_config.num_candidates = 50
    tokenizer.chat_template = CHAT_TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(tiny_folder, tmp_path_factory):
    with running_server(tiny_folder, tmp_path_factory.mktemp("home")) as (client, log):
        assert "Uvicorn running on http://localhost:" in log.read_text()
        yield client


@pytest.fixture(scope="module")
def model(client):
    """The id to ask for, as the server lists it."""
    (listed,) = client.models.list().data
    return listed.id


@pytest.fixture(scope="module")
def expected(tiny_folder):
    """What `generate` writes without sampling, called here: 24 tokens, after the same ids in both endpoints."""
    from tiny import tiny_tokenizer

    from calm.modeling_calm import CALMForCausalLM

    tokenizer, model = tiny_tokenizer(), CALMForCausalLM.from_pretrained(tiny_folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def chat(text):
    return [{"role": "user", "content": text}]


@needs_server
def test_completions_are_what_generate_writes(client, model, expected):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == expected
    assert answer.usage.prompt_tokens == 1 + len(PROMPT)


@needs_server
def test_chat_completions_are_what_generate_writes(client, model, expected):
    answer = client.chat.completions.create(model=model, messages=chat(PROMPT), max_tokens=24, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"


@needs_server
def test_a_stream_is_the_answer_in_pieces(client, model, expected):
    options = {"model": model, "max_tokens": 24, "temperature": 0, "stream": True}
    chunks = list(client.completions.create(prompt=PROMPT, **options))
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 4
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 24
    chunks = list(client.chat.completions.create(messages=chat(PROMPT), **options))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 4
    assert chunks[-1].choices[0].finish_reason == "length"


@needs_server
def test_requests_at_a_clients_defaults_work(client, model):
    assert client.completions.create(model=model, prompt=PROMPT).usage.completion_tokens > 0
    assert client.chat.completions.create(model=model, messages=chat(PROMPT)).usage.completion_tokens > 0
    neutral = {"temperature": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "max_tokens": 8}
    assert client.completions.create(model=model, prompt=PROMPT, **neutral).choices[0].text
    assert client.chat.completions.create(model=model, messages=chat(PROMPT), **neutral).choices[0].message.content


@needs_server
def test_a_seed_gives_the_same_text_streamed_or_not(client, model):
    options = {"model": model, "prompt": PROMPT, "max_tokens": 32}
    first, second, other = (client.completions.create(**options, seed=seed).choices[0].text for seed in (7, 7, 8))
    stream = client.completions.create(**options, seed=7, stream=True)
    assert first == second == "".join(chunk.choices[0].text for chunk in stream)
    assert first != other


@needs_server
def test_what_acts_on_token_probabilities_is_refused_in_a_sentence(client, model):
    import openai

    options = {"model": model, "prompt": PROMPT, "max_tokens": 8}
    for setting in ({"top_p": 0.9}, {"frequency_penalty": 0.5}, {"temperature": 1.5}):
        with pytest.raises(openai.BadRequestError, match="CALM has no token|needs a temperature"):
            client.completions.create(**options, **setting)
        with pytest.raises(openai.APIError) as refused:
            list(client.completions.create(**options, **setting, stream=True))
        assert "CALM has no token" in refused.value.body or "needs a temperature" in refused.value.body
    assert client.completions.create(**options).choices[0].text  # and the server goes on


@needs_server
@pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the root holds no trained model yet")
def test_the_demo_model_is_served_and_continuous_batching_falls_back(tmp_path):
    import openai

    with running_server(".", tmp_path / "home", "--continuous-batching", cwd=ROOT) as (client, log):
        assert [model.id for model in client.models.list()] == ["."]
        answer = client.completions.create(model=".", prompt=PROMPT, max_tokens=40, seed=0)
        assert answer.choices[0].text.strip() and answer.usage.completion_tokens == 40
        assert "does not support continuous batching" in log.read_text()
        with pytest.raises(openai.BadRequestError, match="chat_template is not set"):
            client.chat.completions.create(model=".", messages=chat("Hello"))
        with pytest.raises(openai.BadRequestError):  # upstream's server answers for the one model only
            client.completions.create(model="another", prompt=PROMPT)


@needs_server
def test_help_lists_upstreams_options():
    done = run_module(".", "--help")
    assert done.returncode == 0 and "--enable-cors" in done.stdout
    assert "MODEL --help" in run_module("--help").stdout


@needs_server
def test_upstream_refuses_an_option_that_it_does_not_know():
    done = run_module(".", "--no-such-option", cwd=ROOT)
    assert done.returncode == 2 and "--no-such-option" in done.stderr


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs `main` in this process; it must end with code 2 and one line before it registers or starts anything."""

    def too_late(*_):
        raise AssertionError("went on in place of refusing")

    monkeypatch.setattr(serve, "register_classes", too_late)
    monkeypatch.setattr(serve, "start_upstream", too_late)

    def run(*arguments):
        return commands.refusal(capsys, serve.main, *arguments)

    return run


@pytest.mark.parametrize("package", serve.SERVING_PACKAGES)
def test_a_missing_package_is_named(monkeypatch, refusal, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: sys if name.startswith("transformers.") else find(name)
    )
    monkeypatch.setitem(sys.modules, package, None)
    assert f'needs {package}: pip install "calm-transformers[serve]"' in refusal(ROOT)


def test_a_transformers_without_this_server_is_refused(monkeypatch, refusal):
    import transformers

    find = importlib.util.find_spec

    def find_in_transformers_4(name):
        if name.startswith("transformers."):
            raise ModuleNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_in_transformers_4)
    assert f"transformers {transformers.__version__} has no server" in refusal(ROOT)


FOLDERS = {
    "no config.json": (None, "has no config.json."),
    "no JSON": ("{", "has no readable config.json"),
    "another model": ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "names LlamaForCausalLM"),
    "the backbone alone": ({"model_type": "calm", "architectures": ["CALMModel"]}, "names CALMModel"),
    "no architecture": ({"model_type": "bert"}, "names nothing (model_type 'bert')"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_without_a_calm_is_refused(monkeypatch, refusal, tmp_path, case):
    monkeypatch.setattr(serve, "check_environment", lambda: None)
    content, reason = FOLDERS[case]
    if content is not None:
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    message = refusal(tmp_path, "--port", "1")
    assert str(tmp_path) in message and reason in message


def test_a_folder_that_is_not_there_is_refused(monkeypatch, refusal, tmp_path):
    monkeypatch.setattr(serve, "check_environment", lambda: None)
    for missing in (tmp_path / "missing", "./missing", "a/b/c"):
        assert f"{missing} is no folder." in refusal(missing)
    (tmp_path / "a@b").mkdir()
    assert "rename the folder" in refusal(tmp_path / "a@b")


@needs_server
def test_a_hub_id_out_of_reach_is_refused_by_the_command(tmp_path):
    done = run_module("nobody/nothing", "--port", "1", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "nobody/nothing is no folder, and no model on the Hub within reach" in done.stderr


@needs_server
def test_importing_it_registers_nothing():
    code = (
        "import sys, calm.serve; assert 'transformers' not in sys.modules\n"
        "import transformers; from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "assert 'calm' not in CONFIG_MAPPING and not hasattr(transformers, 'CALMForCausalLM')\n"
        "calm.serve.register_classes(); calm.serve.register_classes()  # twice does no harm\n"
        "assert 'calm' in CONFIG_MAPPING and transformers.CALMForCausalLM.__module__ == 'calm.modeling_calm'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode == 0, done.stderr
