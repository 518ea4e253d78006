"""`calm serve` as a process of its own, for tests that talk to it over HTTP, and in this process."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

START_SECONDS = 180
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_tiny_model(folder, **overrides):
    """A tiny model with a tokenizer that has a chat template, saved in a folder."""
    from tiny import tiny_model, tiny_tokenizer

    model, tokenizer = tiny_model(**overrides), tiny_tokenizer()
    model.generation_config.update(do_sample=True, temperature=0.5)
    model.generation_config.num_candidates = 50
    tokenizer.chat_template = CHAT_TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def in_process(folder, options=None, **limits):
    """A client of the application in this process, and its `batcher`, whose methods a test may replace.

    Args:
        folder: of the model.
        options: fields of `ServerOptions`.
        limits: of the batcher.
    """
    from starlette.testclient import TestClient
    from tiny import tiny_tokenizer

    from calm_transformers.model.modeling_calm import CALMForCausalLM
    from calm_transformers.serving.app import ServerOptions, create_app
    from calm_transformers.serving.batcher import Batcher

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    fields = {"max_request_bytes": 20_000, "allowed_origins": ("http://page.example",), **(options or {})}
    with Batcher(CALMForCausalLM.from_pretrained(folder), tokenizer, **limits) as batcher:
        with TestClient(create_app(batcher, ServerOptions("tiny", **fields))) as client:
            client.batcher = batcher
            yield client


class ServerProcess:
    """A server that runs: `url` (http://127.0.0.1:PORT), `process`, and `log`, the file of what it prints."""

    def __init__(self, process, log):
        self.process, self.log = process, log
        self.url = self._wait_until_healthy()

    def _wait_until_healthy(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            text = self.log.read_text()
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{text}"
            said = re.search(r"Serving .* at (http://\S+)/v1", text)
            if said:
                with contextlib.suppress(OSError):
                    if self.get("/health", said[1]).status == 200:
                        return said[1]
            time.sleep(0.1)
        raise AssertionError(f"no answer after {START_SECONDS} s:\n{self.log.read_text()}")

    @property
    def address(self):
        return self.url.removeprefix("http://")

    def get(self, path, url=None):
        return urllib.request.urlopen((url or self.url) + path, timeout=30)

    def post(self, path, body, **headers):
        """Status and JSON of an answer; a body that is no bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def connect(self, body, path="/v1/completions"):
        """A connection that has sent a request and read nothing of the answer."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def metric(self, name):
        """The value of a metric without labels."""
        page = self.get("/metrics").read().decode()
        return float(re.search(rf"^{name} (\S+)$", page, re.M)[1])

    def wait_for_metric(self, name, value, seconds=60):
        deadline = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def stop(self, sign=signal.SIGTERM, seconds=30):
        self.process.send_signal(sign)
        return self.process.wait(timeout=seconds)


@contextlib.contextmanager
def running_server(model, home, *options, cwd=None, **environment):
    """A server process, which is ended whatever happens.

    Args:
        model: folder or Hub id.
        home: folder that becomes HF_HOME and, without `cwd`, the working directory; the log is written there.
        options: of the command.
        cwd: the working directory.
    """
    home.mkdir(parents=True, exist_ok=True)
    log = home / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "calm_transformers.serving.serve", str(model), "--port", "0", *options],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), **environment},
            cwd=cwd or home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield ServerProcess(process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
