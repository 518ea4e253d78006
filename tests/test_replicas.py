"""Two replicas behind nginx with docs/nginx.conf: texts, load, streams, disconnecting clients, one stops or dies."""

import contextlib
import http.client
import json
import shutil
import signal
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import needs
from server_process import SECONDS, free_port, running, running_server, wait_for, wait_until_healthy

CONFIG = Path(__file__).parents[1] / "docs" / "nginx.conf"
NGINX = shutil.which("nginx")
PROMPT = "Once upon a time"
SHORT = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0.5, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 2000}  # takes seconds, so that a test can act meanwhile

pytestmark = [pytest.mark.slow, needs(NGINX, "nginx")]


def ask(url, seed, **options):
    data = json.dumps({**options, "seed": seed}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)["choices"][0]["text"]


@contextlib.contextmanager
def running_nginx(folder, replicas):
    """Starts nginx with the documented configuration but free ports, and yields its URL."""
    address, text = f"127.0.0.1:{free_port()}", CONFIG.read_text(encoding="utf-8")
    addresses = (address, *(replica.address for replica in replicas))
    for documented, actual in zip(("127.0.0.1:8000;", "127.0.0.1:8001;", "127.0.0.1:8002;"), addresses, strict=True):
        assert text.count(documented) == 1
        text = text.replace(documented, f"{actual};")
    (folder / "nginx.conf").write_text(text, encoding="utf-8")
    words = [NGINX, "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr", "-g", "daemon off;"]
    with running(words, folder / "output", folder) as process:
        wait_until_healthy(process, folder / "output", lambda: f"http://{address}/health")
        yield f"http://{address}"


@contextlib.contextmanager
def running_pair(model, folder):
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(2) as pool:
            starting = [running_server(model, folder / name, "--model_name", "tiny") for name in ("first", "second")]
            replicas = list(pool.map(stack.enter_context, starting))
        yield replicas, stack.enter_context(running_nginx(folder, replicas))


@pytest.fixture(scope="module")
def pair(tiny_folder, tmp_path_factory):
    with running_pair(tiny_folder, tmp_path_factory.mktemp("pair")) as pair:
        yield pair


def wait_for_busy_replica(replicas):
    (replica,) = wait_for("a busy replica", lambda: [each for each in replicas if each.metric("calm_running")])
    return replica


def num_started_texts(replica):
    """Returns how many texts the replica has started; BOS is part of a prompt."""
    return replica.metric("calm_prompt_tokens_total") / (1 + len(PROMPT))


def test_a_seed_gives_the_same_text_from_both_replicas_and_nginx_uses_both(pair):
    replicas, balancer = pair
    texts = [ask(url, 3, **SHORT) for url in (*(replica.url for replica in replicas), *[balancer] * 4)]
    assert len(texts[0]) > 20 and set(texts) == {texts[0]} and ask(balancer, 4, **SHORT) != texts[0]
    before = [num_started_texts(replica) for replica in replicas]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda seed: ask(balancer, seed, **SHORT), range(8)))
    counts = [num_started_texts(replica) - num for replica, num in zip(replicas, before, strict=True)]
    assert all(texts) and sum(counts) == 8 and min(counts) >= 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnecting_client_frees_its_slot(pair, stream):
    replicas, balancer = pair
    before = [replica.metric("calm_cancelled_total") for replica in replicas]
    connection = http.client.HTTPConnection(balancer.removeprefix("http://"), timeout=SECONDS)
    body = json.dumps({**LONG, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    with contextlib.ExitStack() as answer:
        if stream:
            assert answer.enter_context(connection.getresponse()).readline().startswith(b"data: {")
        replica = wait_for_busy_replica(replicas)
    connection.close()
    replica.wait_for_metric("calm_running", 0)
    replica.wait_for_metric("calm_cancelled_total", before[replicas.index(replica)] + 1)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_the_other_replica_takes_over_when_one_stops_or_dies(tiny_folder, tmp_path, sign):
    def refuses_connections():
        with socket.socket() as probe:
            host, port = stopped.address.split(":")
            return probe.connect_ex((host, int(port))) != 0

    with running_pair(tiny_folder, tmp_path) as (replicas, balancer), ThreadPoolExecutor(1) as pool:
        expected = ask(balancer, 3, **SHORT)
        running_request = pool.submit(ask, balancer, 5, **LONG)
        stopped = wait_for_busy_replica(replicas)
        (other,) = [replica for replica in replicas if replica is not stopped]
        before = num_started_texts(other)
        stopped.process.send_signal(sign)
        wait_for("it takes no more requests", refuses_connections)
        assert [ask(balancer, 3, **SHORT) for _ in range(6)] == [expected] * 6
        if sign == signal.SIGTERM:  # it finishes its requests
            assert running_request.result() == ask(other.url, 5, **LONG)
        else:  # the request may be what killed it: it isn't repeated
            with pytest.raises(urllib.error.HTTPError, match="502"):
                running_request.result()
        assert num_started_texts(other) == before + (7 if sign == signal.SIGTERM else 6)
