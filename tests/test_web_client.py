"""A chat web client that was not made for this server, deep-chat, talks to it from a page of another origin.

Its reply streamed and whole, an error, the stop button, and the browser's refusal without --allow_origin.
"""

import contextlib
import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from urllib.parse import urlencode

import browser
import pytest
from browser import headless_browser, needs_browser
from server_process import running_server, save_tiny_model

CLIENT = "deep-chat@2.4.2"
BUNDLE = "node_modules/deep-chat/dist/deepChat.bundle.js"
NPM = shutil.which("npm")
NPM_SECONDS, SECONDS = 120, 120
UNREACHABLE = r"E(AI_AGAIN|NOTFOUND|CONN\w+|TIMEDOUT|NETUNREACH|HOSTUNREACH|RR_SOCKET_TIMEOUT|403|407|5\d\d)\b"
SYSTEM, QUESTION = "Be brief.", "Hello there"
SHORT = {"max_tokens": 240, "temperature": 0.5, "seed": 1, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 6000}  # written for seconds
PAGE = """<!DOCTYPE html>
<meta charset="utf-8"><link rel="icon" href="data:,">
<script type="module" src="deepChat.bundle.js"></script>
<script type="module">
    const {url, stream, fields} = JSON.parse(new URLSearchParams(location.search).get("options"));
    await customElements.whenDefined("deep-chat");
    const chat = document.createElement("deep-chat");
    chat.directConnection = {mistral: {key: "none", model: "tiny", system_prompt: SYSTEM}};
    chat.connect = {url: url + "/v1/chat/completions", stream, additionalBodyProps: fields};
    chat.errorMessages = {displayServiceErrorMessages: true};
    chat.onComponentRender = () => {
        window.chat = chat;
        window.shown = [];
        new MutationObserver(() => {
            const reply = chat.shadowRoot.querySelector(".ai-message-text:not(.deep-chat-loading-message-bubble)");
            if (reply && reply.textContent !== shown.at(-1)) shown.push(reply.textContent);
        }).observe(chat.shadowRoot, {childList: true, subtree: true, characterData: true});
    };
    document.body.append(chat);
</script>
""".replace("SYSTEM", json.dumps(SYSTEM))

pytest.importorskip("selenium", reason="selenium is not installed")
pytestmark = [
    pytest.mark.skipif(NPM is None, reason="npm is not installed"),
    needs_browser,
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("npm")
    command = [NPM, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", CLIENT]
    try:
        done = subprocess.run(
            [*command, "--fetch-retries=0"], capture_output=True, text=True, timeout=NPM_SECONDS, cwd=folder
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm fetched no {CLIENT} within {NPM_SECONDS} s")
    unreachable = re.search(UNREACHABLE, done.stderr)
    if done.returncode and unreachable:
        pytest.skip(f"npm can't reach its registry: {unreachable[0]}")
    assert done.returncode == 0, done.stderr
    return folder / BUNDLE


@pytest.fixture(scope="module")
def page(bundle, tmp_path_factory):
    """The address of a page with the client, on a port of its own: another origin than the server's."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copy(bundle, folder)
    (folder / "index.html").write_text(PAGE, encoding="utf-8")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with headless_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def wait_for(what, is_so):
    """Returns what `is_so` returns when that is true; a connection that isn't there yet is waited for, too."""

    def is_so_by_now():
        with contextlib.suppress(OSError):
            return is_so()

    return browser.wait_for(what, is_so_by_now, SECONDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    options = ("--model_name", "tiny", "--allow_origin", "*")
    with running_server(model, tmp_path_factory.mktemp("server"), *options) as server:
        yield server


def ask(driver, page, server, fields, stream=True):
    """Opens the page, and sends a message as a visitor does."""
    from selenium.webdriver.common.keys import Keys

    driver.get_log("browser")  # the last page's
    driver.get(f"{page}?{urlencode({'options': json.dumps({'url': server.url, 'stream': stream, 'fields': fields})})}")
    wait_for("the page is ready", lambda: driver.execute_script("return !!window.chat"))
    element(driver, "#text-input").send_keys(QUESTION, Keys.ENTER)


def element(driver, selector):
    return driver.execute_script("return chat.shadowRoot.querySelector(arguments[0])", selector)


def reply(driver):
    """The whole reply, when it is there: what the client keeps of it, and all texts that its page has shown."""

    def messages():
        return driver.execute_script("return chat.getMessages().filter(message => message.role === 'ai')")

    wait_for("a reply", messages)
    wait_for("its end", lambda: not element(driver, ".loading-button, #stop-icon"))
    (message,) = messages()
    return message["text"], driver.execute_script("return shown")


def error(driver):
    return wait_for("an error", lambda: element(driver, ".error-message-text")).text


def console(driver):
    """What the browser calls errors, but for the client's font, which is kept from it."""
    entries = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    return [entry for entry in entries if "fonts.googleapis" not in entry]


@pytest.fixture(scope="module")
def expected(server):
    """What the client should have been told, asked without it."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    status, answer = server.post("/v1/chat/completions", {"messages": messages, **SHORT})
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def test_a_reply_grows_while_it_is_written(driver, page, server, expected):
    ask(driver, page, server, SHORT)
    text, shown = reply(driver)
    assert text == expected
    assert len(shown) > 3 and len(shown[0]) < len(shown[-1]) / 2
    assert console(driver) == []


def test_a_reply_that_is_not_streamed(driver, page, server, expected):
    ask(driver, page, server, SHORT, stream=False)
    text, shown = reply(driver)
    assert text == expected and len(shown) == 1
    assert console(driver) == []


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_reaches_the_page(driver, page, server, stream):
    ask(driver, page, server, {"top_p": 1.5}, stream)
    assert error(driver).startswith("top_p: ")
    assert "CORS" not in "".join(console(driver))


def test_the_stop_button_frees_the_row(driver, page, server):
    before = server.metric("calm_cancelled_total")
    ask(driver, page, server, LONG)
    wait_for("the reply begins", lambda: len(driver.execute_script("return shown")) > 1)
    assert server.metric("calm_running") == 1
    element(driver, "#stop-icon").click()
    server.wait_for_metric("calm_running", 0, seconds=5)
    server.wait_for_metric("calm_cancelled_total", before + 1)


def test_the_browser_refuses_a_server_that_allows_no_origin(driver, page, model, tmp_path):
    with running_server(model, tmp_path, "--model_name", "tiny") as server:
        ask(driver, page, server, SHORT)
        assert error(driver) == "Failed to fetch"
        assert "blocked by CORS policy" in "".join(console(driver))
