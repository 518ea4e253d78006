"""Two replicas of a server behind nginx, as docs/nginx.conf sets it up: one address, and either may go.

The text of a seed, the spread of requests, streams in pieces, clients that leave, a replica that dies.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

CONFIG = Path(__file__).parents[1] / "docs" / "nginx.conf"
NGINX = shutil.which("nginx")
SECONDS = 120  # for whatever should happen at all
SHORT = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0.5, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 6000}  # written for seconds, so a test can act meanwhile

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@dataclass
class Replica:
    process: subprocess.Popen
    address: str  # host:port

    def metric(self, name: str) -> float:
        page = get(f"http://{self.address}/metrics")
        found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
        assert found, f"no {name} in:\n{page}"
        return float(found[1])

    @property
    def running(self) -> float:
        return self.metric("calm_running")


def get(url):
    with urllib.request.urlopen(url, timeout=SECONDS) as answer:
        return answer.read().decode()


def post(address, body):
    request = urllib.request.Request(
        f"http://{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)["choices"][0]["text"]


def wait_for(what, is_so, process=None, seconds=SECONDS):
    """Returns what `is_so` returns when that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process is None or process.poll() is None, f"{what}: the process has ended with {process.returncode}"
        with contextlib.suppress(OSError):
            if result := is_so():
                return result
        time.sleep(0.02)
    raise AssertionError(f"not after {seconds} s: {what}")


@contextlib.contextmanager
def ended(process):
    """Ends a process with its block."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running_replica(model, log):
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "calm.serve", str(model), "--model_name", "tiny", "--port", "0", "--grace", "5"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    with ended(process):
        found = wait_for(log, lambda: re.search(r"at http://(\S+)/v1$", log.read_text(), re.MULTILINE), process)
        wait_for(log, lambda: get(f"http://{found[1]}/health"), process)
        yield Replica(process, found[1])


@contextlib.contextmanager
def running_nginx(folder, replicas):
    """nginx with the documented configuration, ports apart: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = CONFIG.read_text(encoding="utf-8")
    addresses = [f"127.0.0.1:{port}", *(replica.address for replica in replicas)]
    for documented, actual in zip(("127.0.0.1:8000;", "127.0.0.1:8001;", "127.0.0.1:8002;"), addresses, strict=True):
        assert text.count(documented) == 1
        text = text.replace(documented, f"{actual};")
    config = folder / "nginx.conf"
    config.write_text(text, encoding="utf-8")
    command = [NGINX, "-p", str(folder), "-c", str(config), "-e", "stderr", "-g", "daemon off;"]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    with ended(process):
        wait_for(folder / "output", lambda: get(f"http://{addresses[0]}/health"), process)
        yield addresses[0]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor() as pool:
            managers = [running_replica(folder, folder / f"log_{i}") for i in range(2)]
            yield_from = list(pool.map(stack.enter_context, managers))
        yield yield_from


@pytest.fixture(scope="module")
def balancer(replicas, tmp_path_factory):
    with running_nginx(tmp_path_factory.mktemp("nginx"), replicas) as address:
        yield address


@pytest.fixture
def client(balancer):
    from openai import OpenAI

    with OpenAI(base_url=f"http://{balancer}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client:
        yield client


def the_one_that_writes(replicas):
    def find():
        return [replica for replica in replicas if replica.running]

    (replica,) = wait_for("a replica writes", find)
    return replica


def test_a_seed_gives_the_same_text_through_either_replica_and_the_balancer(replicas, balancer, client):
    texts = [post(address, {**SHORT, "seed": 3}) for address in (*(r.address for r in replicas), *[balancer] * 4)]
    extra = {"ignore_eos": True}
    options = {**{k: v for k, v in SHORT.items() if k != "ignore_eos"}, "model": "tiny", "extra_body": extra}
    texts.append(client.completions.create(**options, seed=3).choices[0].text)
    assert len(texts[0]) > 20 and set(texts) == {texts[0]}
    assert client.completions.create(**options, seed=4).choices[0].text != texts[0]


def test_requests_at_the_same_time_go_to_both(replicas, balancer):
    before = [replica.metric("calm_finished_total") for replica in replicas]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda seed: post(balancer, {**SHORT, "seed": seed}), range(8)))
    gained = [replica.metric("calm_finished_total") - b for replica, b in zip(replicas, before, strict=True)]
    assert all(texts) and sum(gained) == 8 and min(gained) >= 2


def test_a_stream_comes_while_it_is_written(replicas, client):
    extra = {"ignore_eos": True}
    options = {**{k: v for k, v in LONG.items() if k != "ignore_eos"}, "model": "tiny", "extra_body": extra}
    with client.completions.create(**options, seed=3, stream=True) as stream:
        first = next(iter(stream)).choices[0].text
        replica = the_one_that_writes(replicas)
        rest = [chunk.choices[0].text for chunk in stream]
    assert first and len(rest) > 100 and not replica.running


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(replicas, balancer, stream):
    connection = http.client.HTTPConnection(balancer, timeout=SECONDS)
    body = json.dumps({**LONG, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    if stream:
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: {")
    replica = the_one_that_writes(replicas)
    before = replica.metric("calm_cancelled_total")
    if stream:
        answer.close()
    connection.close()
    wait_for("the row is free", lambda: not replica.running, seconds=2)
    assert replica.metric("calm_cancelled_total") == before + 1


def test_the_other_replica_answers_when_one_dies(replicas, balancer):
    """The last test: it leaves one replica."""
    expected = post(balancer, {**LONG, "seed": 5})
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, balancer, {**LONG, "seed": 5})
        gone = the_one_that_writes(replicas)
        (other,) = [replica for replica in replicas if replica is not gone]
        before = other.metric("calm_finished_total")
        gone.process.kill()
        gone.process.wait(30)
        assert asked.result() == expected  # written anew
    texts = [post(balancer, {**SHORT, "seed": 3}) for _ in range(6)]
    assert set(texts) == {texts[0]}
    assert other.metric("calm_finished_total") == before + 7
