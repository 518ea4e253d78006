"""The web page: streamed texts and errors, the page in a browser, and the folder of a Space."""

import configparser
import contextlib
import html
import importlib.util
import re
import socket
import sys
import threading
import time
from unittest.mock import Mock

import pytest
import torch
from browser import complaints, needs_browser, requests, set_width
from commands import ROOT, refusal
from evaluation_folder import tiny_llama
from model_copies import CODE_FILES
from published import BUNDLE_FILES
from server_process import free_port, running, wait_for, wait_until_healthy
from tiny import BOS, seeded, tiny_model, tiny_tokenizer

from calm_transformers.pages import app, app_page
from calm_transformers.pages.app_page import PageModel, Settings, render, stream_html

HAS_GRADIO = importlib.util.find_spec("gradio") is not None
needs_gradio = pytest.mark.skipif(not HAS_GRADIO, reason="gradio (extra [app]) is not installed")
SHORT = Settings(num_candidates=30, max_new_tokens=10, seed=3)
# Runs a Space without this package and logs the hosts that it looks up.
SPACE = """
import runpy, socket, sys

def logged(host, *args, **kwargs):
    if host not in (None, "localhost", "127.0.0.1"):
        print("looked up", host, flush=True)
    return lookup(host, *args, **kwargs)

lookup, socket.getaddrinfo = socket.getaddrinfo, logged
sys.modules["calm_transformers"] = None
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def calm():
    return PageModel("tiny", tiny_model(), tiny_tokenizer())


@pytest.fixture(scope="module")
def llama():
    """A Llama with enough positions for the page's longest text."""
    return PageModel("llama", tiny_llama(max_position_embeddings=2048), tiny_tokenizer())


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(app_page, "UPDATE_INTERVAL_SECONDS", 0)


def streamed_texts(model, prompt, settings):
    texts = []
    for state in model.stream(prompt, settings):
        texts.append("".join(step.text for step in state.steps))
    return texts, state


def generated(model, **options):
    """Returns what `generate` writes after "Hello": the text, and its number of tokens."""
    ids = model.tokenizer("Hello", return_tensors="pt")["input_ids"]
    new = model.model.generate(ids, do_sample=True, **options)[0, ids.shape[1] :]
    return model.tokenizer.decode(new), len(new)


def test_a_calm_streams_the_text_of_generate_with_the_candidates_of_each_patch(calm, eager):
    texts, state = streamed_texts(calm, "Hello", SHORT)
    options = {"temperature": 0.5, "num_candidates": 30, "sampling_method": "batch", "generator": seeded(3)}
    assert (texts[-1], state.num_tokens) == generated(calm, max_new_tokens=10, **options)
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))
    assert len(set(texts)) > 3 and state.is_done
    assert len(state.steps) == -(-state.num_tokens // 4)
    for step in state.steps:
        assert 1 <= len(step.candidates) <= min(step.num_candidates, app_page.MAX_SHOWN_CANDIDATES)
        (chosen,) = [candidate for candidate in step.candidates if candidate.is_chosen]
        assert len(step.text) < 4 or chosen.text == step.text
        weights = [candidate.weight for candidate in step.candidates if candidate is not chosen]
        assert weights == sorted(weights, reverse=True) and all(candidate.count for candidate in step.candidates)


def test_candidates_are_optional(calm):
    _, state = streamed_texts(calm, "Hello", Settings(0.5, 30, 8, show_candidates=False))
    assert state.steps and all(step.candidates == [] for step in state.steps)


def test_another_causal_lm_streams_the_text_of_generate(llama, eager):
    texts, state = streamed_texts(llama, "Hello", Settings(0.7, max_new_tokens=6, top_p=0.8, seed=1))
    torch.manual_seed(1)
    expected = generated(llama, max_new_tokens=6, temperature=0.7, top_p=0.8, top_k=0, pad_token_id=0)
    assert (texts[-1], state.num_tokens) == expected and len(state.steps) == state.num_tokens


def test_closing_the_stream_ends_generation(calm, eager):
    stream = calm.stream("Hello", Settings(0.5, 30, 4000))
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if "_generate" in thread.name]


def test_errors_are_shown_in_place_of_the_text(calm):
    for settings, message in (
        (Settings(num_candidates="many"), "Candidates: must be a number between 1 and 1000."),
        (Settings(max_new_tokens=0), "Tokens: must be a number at least 1."),
        (Settings(temperature=0.1, num_candidates=5), "num_candidates=5 is too few for temperature=0.1"),
        (Settings(max_new_tokens=9_000_000), "6 prompt tokens + 9000000 new tokens exceed the "),
    ):
        *_, (shown,) = stream_html([calm], "Hello", settings)
        (error,) = re.findall('<p class="error" role="alert">(.*?)</p>', shown)
        assert html.unescape(error).startswith(message)


def test_an_empty_prompt_needs_a_bos_token():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.backend_tokenizer.post_processor = None
    page_model = PageModel("tiny", model, tokenizer)
    model.generation_config.bos_token_id = None
    *_, (shown,) = stream_html([page_model], "", SHORT)
    assert "tiny needs a prompt: it has no bos_token_id" in shown
    model.generation_config.bos_token_id = BOS
    texts, _ = streamed_texts(page_model, "", SHORT)
    assert texts[-1]


def test_an_exception_in_one_model_does_not_stop_the_other(calm, llama, monkeypatch, caplog):
    monkeypatch.setattr(calm.model, "generate", Mock(side_effect=RuntimeError("out of something")))
    *_, (ours, other) = stream_html([calm, llama], "Hello", SHORT)
    assert "tiny failed to generate: RuntimeError." in ours and "out of something" not in ours
    assert "out of something" in caplog.text
    assert "tokens/s" in other and "error" not in other


def test_generated_text_is_escaped(calm):
    state = app_page.GenerationState("<script>", calm.tokenizer, [], 4)
    state.steps = [app_page.Step("<b>&", [app_page.Candidate("<i>\n", 1.0, 3, True)], 1)]
    shown = render(calm, state).replace('<i style="', "")
    assert "<script>" not in shown and "<b>&" not in shown and "<i>" not in shown
    assert "&lt;b&gt;&amp;" in shown and "&lt;i&gt;↵" in shown


def test_special_tokens_and_line_breaks_are_visible():
    state = app_page.GenerationState("", app_page.AutoTokenizer.from_pretrained(ROOT), [], 2)
    ids = state.detokenizer.tokenizer("a\nb<|eos|>", add_special_tokens=False).input_ids
    for token in ids:
        state.update("token", token)
    assert "".join(step.text for step in state.steps) == "a\nb<|eos|>"
    shown = "".join(app_page._render_step(number, step) for number, step in enumerate(state.steps))
    assert '<i class="break"></i>\n' in shown and "&lt;|eos|&gt;" in shown
    assert app_page.visible("a\n\tb") == "a↵⇥b" and app_page.visible("") == "∅"


def test_incomplete_characters_are_held_back():
    state = app_page.GenerationState("", app_page.AutoTokenizer.from_pretrained(ROOT), [], 1)
    ids = state.detokenizer.tokenizer("a ☃ b", add_special_tokens=False).input_ids
    for token in ids:
        state.update("token", token)
    state.update("end", None)
    assert len(ids) > 5 and [step.text for step in state.steps if step.text][:2] == ["a", " "]
    assert "".join(step.text for step in state.steps) == "a ☃ b"


# The command and the Space


def test_the_demo_s_folder_has_a_name_of_its_own(monkeypatch, tiny_folder):
    for folder in (ROOT, tiny_folder):
        monkeypatch.chdir(folder)
        assert app.display_name(".") == app.display_name(str(folder)) == ("CALM demo", folder.name)[folder != ROOT]
    assert app.display_name("someone/CALM-M") == "someone/CALM-M"


def test_command_errors_are_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # gradio is checked before the model
    for options, message in (
        ([".", "--space", "no/such/place"], "no/such is not a folder"),
        ([".", "--space", str(ROOT)], "exists already and is not an empty folder"),
        (["{tmp}", "--space", "{tmp}/s"], "the folder holds no config.json, so no model"),
        (["no/such/place", "--port", "{taken}"], "127.0.0.1:{taken} can't be listened on"),  # checked before loading
    ):
        with socket.create_server(("127.0.0.1", 0)) as server:
            taken = server.getsockname()[1]
            words = [word.format(tmp=tmp_path, taken=taken) for word in ["--port", "0", *options]]
            assert message.format(taken=taken) in refusal(capsys, app.main, *words)
        assert list(tmp_path.iterdir()) == []


def test_without_gradio_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal(capsys, app.main, ".").startswith("the page needs gradio: pip install")


@pytest.fixture(scope="module")
def space(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spaces")
    llama.model.save_pretrained(folder / "llama")
    llama.tokenizer.save_pretrained(folder / "llama")
    app.write_space(folder / "space", str(ROOT), str(folder / "llama"))
    return folder / "space"


def test_a_space_contains_the_page_the_model_and_its_code(space):
    found = {str(path.relative_to(space)) for path in space.rglob("*") if path.is_file()}
    code = {"app.py", "page.py", *(f"model/{name}" for name in CODE_FILES)}
    model = {f"model/{name}" for name in BUNDLE_FILES - {"README.md"}}
    assert found >= model | {"requirements.txt", "README.md", ".gitattributes", "baseline/model.safetensors"}
    assert {name for name in found if name.endswith(".py")} == code
    assert list(space.parent.glob(".*")) == []


def test_a_space_s_card_and_requirements(space):
    yaml = pytest.importorskip("yaml")
    _, header, text = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["sdk"] == "gradio" and fields["app_file"] == "app.py" and len(fields["short_description"]) <= 60
    assert fields["sdk_version"] == app.SDK_VERSION and app.SDK_VERSION in text
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    ours = setup["options"]["install_requires"].split()
    assert set((space / "requirements.txt").read_text().split()) == set(ours) - {"tqdm", "filelock>=3.12"}
    tested = [(ROOT / name).read_text().split() for name in ("constraints.txt", "constraints-compat.txt")]
    assert f"gradio=={app.SDK_VERSION}" in sum(tested, [])


def test_a_space_needs_a_tokenizer_and_can_reference_hub_models(tmp_path):
    tiny_model().save_pretrained(tmp_path / "tiny")
    with pytest.raises(app.InputError, match="no tokenizer"):
        app.write_space(tmp_path / "space", str(tmp_path / "tiny"))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    app.write_space(tmp_path / "space", "someone/CALM-M", "someone/Llama")
    assert "'someone/CALM-M', 'someone/Llama'" in (tmp_path / "space" / "app.py").read_text()
    assert "models:\n- someone/CALM-M\n- someone/Llama\n" in (tmp_path / "space" / "README.md").read_text()
    assert not (tmp_path / "space" / "model").exists()


# Pages that run


@contextlib.contextmanager
def running_page(words, folder, log, **environment):
    """Serves the page in a process and yields its URL. A Space gets its port from Gradio's variable."""
    port = str(free_port())
    url, words = f"http://127.0.0.1:{port}/", [word.format(port=port) for word in words]
    with running(words, log, folder, GRADIO_SERVER_PORT=port, **environment) as process:
        wait_until_healthy(process, log, lambda: url)
        yield url
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def address(driver, space, tmp_path_factory):
    command = [sys.executable, "-m", "calm_transformers.pages.app", str(ROOT), "--port", "{port}"]
    command += ["--baseline", str(space / "baseline")]
    with running_page(command, tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("log") / "app.log") as url:
        yield url


@pytest.fixture
def page(driver, address):
    set_width(driver, 1200, 900)
    requests(driver), complaints(driver)
    driver.get(address)
    wait_for("the page is ready", lambda: driver.find_elements("id", "generate"))
    time.sleep(0.3)  # its event handlers
    return driver


def put(page, name, value):
    from selenium.webdriver import Keys

    (entry,) = page.find_elements("css selector", f"#{name} input[type=number], #{name} textarea")
    entry.send_keys(Keys.CONTROL, "a")
    entry.send_keys(Keys.DELETE, str(value), Keys.TAB)


def text_of(page, number=0):
    """Returns the text of the patches without their cards."""
    texts = "[...document.querySelectorAll(arguments[0])].map(span => span.firstChild?.textContent)"
    return page.execute_script(f"return {texts}.join('')", f"#text{number} .patch")


def press_generate(page):
    """Presses the button and waits until both models have finished."""
    page.execute_script("document.querySelector('#text1 .calm').replaceChildren()")  # the previous answer
    page.find_element("id", "generate").click()
    wait_for("an answer", lambda: "tokens/s" in speed_of(page, 1) or texts_of(page, ".calm .error"))
    before = None
    while before != (before := speed_of(page, 1)):
        time.sleep(0.4)


def texts_of(page, selector):
    """Returns the texts of elements, in one script, as the page is updated meanwhile."""
    return page.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector)


def speed_of(page, number):
    return " ".join(texts_of(page, f"#text{number} .name"))


@needs_gradio
@needs_browser
@pytest.mark.slow
@pytest.mark.transformers
class TestPage:
    def test_text_appears_patch_by_patch_without_requests_to_other_servers(self, page, address):
        page.execute_script(
            "window.seen = []; const count = () => document.querySelectorAll('#text0 .patch').length;"
            "new MutationObserver(() => { if (count() !== seen.at(-1)) seen.push(count()); })"
            ".observe(document.body, {childList: true, subtree: true});"
        )
        put(page, "max_new_tokens", 120)
        press_generate(page)
        seen = page.execute_script("return seen")
        assert seen[-1] == 60 and len(seen) >= 4 and 0 < seen[1] < 60 and seen == sorted(seen)
        assert re.search(r"120 tokens in 60 patches · [\d.]+ s · \d+ tokens/s", speed_of(page, 0))
        assert text_of(page, 1)
        urls = requests(page)
        assert urls and [url for url in urls if not url.startswith(address)] == []
        assert [line for line in complaints(page) if "manifest" not in line] == []

    def test_candidates_appear_on_hover(self, page):
        from selenium.webdriver import ActionChains

        put(page, "max_new_tokens", 12)
        press_generate(page)
        spans = page.find_elements("css selector", "#text0 .patch")
        card = spans[2].find_element("css selector", ".card")
        assert not card.is_displayed()
        ActionChains(page).move_to_element(spans[2]).perform()
        assert card.is_displayed()
        assert len(card.find_elements("css selector", ".chosen code")) == 1 and "%" in card.text
        background = [span.value_of_css_property("background-color") for span in spans[:3]]
        assert background[0] == background[2] != background[1]
        assert "patch of 2 tokens per step" in page.find_element("id", "intro").text
        set_width(page, 360, 740)  # a phone's
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
        for slider in page.find_elements("css selector", "#controls input[type=range], .reset-button"):
            assert slider.size["height"] >= 38 and slider.size["width"] >= 38  # a finger's

    def test_stop_ends_generation(self, page):
        put(page, "max_new_tokens", 1000)
        page.find_element("id", "generate").click()
        wait_for("some text", lambda: len(texts_of(page, "#text0 .patch")) > 3)
        page.find_element("id", "stop").click()
        time.sleep(0.5)
        before = text_of(page)
        time.sleep(0.7)
        assert text_of(page) == before
        put(page, "max_new_tokens", 8)
        page.find_element("id", "generate").click()
        wait_for("a short text", lambda: "8 tokens in 4 patches" in speed_of(page, 0))


@needs_gradio
@pytest.mark.slow
@pytest.mark.transformers
def test_a_space_runs_without_this_package_and_other_servers(space, tmp_path):
    from gradio_client import Client

    environment = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    with running_page([sys.executable, "-c", SPACE], space, tmp_path / "space.log", **environment) as url:
        client = Client(url, verbose=False, analytics_enabled=False)

        def write(temperature, seed=0):
            return client.predict("Once upon a time", temperature, 50, 12, 1, seed, True, api_name="/write")

        ours, other = write(0.5)
        assert "12 tokens in 6 patches" in ours and 'class="card"' in ours
        assert "tokens/s" in other and "error" not in ours + other
        settings = ((0.3,), (0.3,), (1.5,), (0.3, 1))
        texts = ([re.findall(r'<span class="patch.*', text) for text in write(*each)] for each in settings)
        first, repeated, *different = texts
        assert first == repeated and all(a != b for other in different for a, b in zip(first, other, strict=True))
        (error, _) = write(None)
        assert "Temperature: must be a number" in error
    assert "looked up" not in (tmp_path / "space.log").read_text()
