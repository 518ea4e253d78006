"""Measures tokens per second and time to first token of several servers, by temperature and number of clients.

    calm bench serving --model . --baseline transformer-s --clients 1 4 16
    calm bench serving --model calm-m calm-m:distilled --baseline transformer-s --temperature 1 0.5 --max_tokens 32

A CALM is served by `calm serve` with a row per client, the baseline by `transformers serve` with its continuous
batching. Recipes (calm-m, transformer-s) get random weights, with `:distilled` a head that samples at the lowest
temperature. Each client streams one completion after another over HTTP; EOS is ignored. Clients and servers share the
machine; the servers' rounds are interleaved.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from calm_transformers.command_line import (
    InputError,
    Parser,
    command,
    known_errors,
    positive,
    require_package,
    writable,
)
from calm_transformers.evaluation.report import markdown, write_json

UPSTREAM_PACKAGES = ("fastapi", "openai", "uvicorn", "rich")
DISTILLED = ":distilled"
START_SECONDS = 600
PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play with her toys."
PROMPT_WORDS = 32  # of a random model


@dataclass(frozen=True)
class RunningServer:
    name: str
    port: int  # on loopback
    model: str  # id in requests
    prompt: str
    fields: dict  # additional fields of requests


class Round(NamedTuple):
    """Results of one round of requests: total tokens, wall time, and each completion's time to first token."""

    tokens: int
    seconds: float
    first_token_seconds: list[float]


def save_model(name: str, folder: Path, lowest_temperature: float) -> Path:
    """Returns the folder of a model; for a recipe, saves random weights and a tokenizer to `folder` first."""
    import torch

    from calm_transformers.benchmarks.workloads import is_trained, model_config, random_model, word_tokenizer
    from calm_transformers.loading import load_config
    from calm_transformers.model.configuration_calm import CALMConfig

    recipe = name.removesuffix(DISTILLED)
    if is_trained(recipe):
        load_config(name)
        return Path(name)
    config = model_config(recipe)
    if recipe != name:
        if not isinstance(config, CALMConfig):
            raise InputError(f"{name}: only a CALM has a distilled head.")
        config.distilled_temperature = lowest_temperature
    model = random_model(config, torch.device("cpu"), torch.float32)
    assert model.generation_config is not None
    model.generation_config.update(do_sample=True, temperature=0.5)
    model.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running_server(arguments: list[str], port: int, log: Path) -> Iterator[None]:
    """Starts a server process, waits until it is healthy, and stops it at the end."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                output = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-500:]
                raise InputError(f"{' '.join(arguments)} did not start: … {output}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def stream_text(server: RunningServer, max_tokens: int, temperature: float, seed: int) -> tuple[int, float]:
    """Requests one completion, and returns its number of tokens and the time to first token in seconds."""
    body = {
        **{"model": server.model, "prompt": server.prompt, "max_tokens": max_tokens, "temperature": temperature},
        **{"seed": seed, "stream": True, "stream_options": {"include_usage": True}, **server.fields},
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=START_SECONDS)
    start, first_token_seconds, usage = time.perf_counter(), None, None
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise InputError(f"{server.name} returned {response.status}: {response.read().decode()[:500]}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        usage = chunk.get("usage") or usage
        if first_token_seconds is None and any(choice.get("text") for choice in chunk.get("choices", [])):
            first_token_seconds = time.perf_counter() - start
    connection.close()
    if usage is None or first_token_seconds is None:
        raise InputError(f"{server.name} returned no text, or no usage.")
    return usage["completion_tokens"], first_token_seconds


def run_round(server: RunningServer, clients: int, requests: int, max_tokens: int, temperature: float) -> Round:
    """Runs `clients` threads that each send `requests` requests one after another."""

    def client(number: int) -> list[tuple[int, float]]:
        return [stream_text(server, max_tokens, temperature, 1000 * number + i) for i in range(requests)]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        results = [result for client_results in pool.map(client, range(clients)) for result in client_results]
    return Round(sum(tokens for tokens, _ in results), time.perf_counter() - start, [first for _, first in results])


def summarise_rounds(server: str, temperature: float, clients: int, rounds: list[Round]) -> dict:
    """Summarises the rounds of a server at a temperature and number of clients; tokens/s are over all clients."""
    speeds = [finished.tokens / finished.seconds for finished in rounds]
    latencies = sorted(seconds for finished in rounds for seconds in finished.first_token_seconds)
    p99 = quantiles(latencies, n=100, method="inclusive")[98] if len(latencies) > 1 else latencies[0]
    return {
        **{"server": server, "temperature": temperature, "clients": clients, "tokens_per_second": median(speeds)},
        **{"least": min(speeds), "most": max(speeds), "first_token_p50": median(latencies), "first_token_p99": p99},
    }


def as_table(results: list[dict]) -> str:
    """Formats results of `summarise_rounds` as Markdown, with the ratio to the server's speed for one client."""
    single = {(r["server"], r["temperature"]): r["tokens_per_second"] for r in results if r["clients"] == 1}
    rows = []
    for result in results:
        key = result["server"], result["temperature"]
        ratio = f"{result['tokens_per_second'] / single[key]:.2f}" if key in single else "–"
        speed = "{tokens_per_second:.1f} ({least:.1f} – {most:.1f})".format(**result)
        latencies = f"{1000 * result['first_token_p50']:.0f}, {1000 * result['first_token_p99']:.0f}"
        rows.append([result["server"], f"{result['temperature']:g}", str(result["clients"]), speed, ratio, latencies])
    return markdown(["server", "T", "clients", "tokens/s (range)", "÷ one client", "first token, ms: p50, p99"], rows)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm bench serving", __doc__)
    parser.add_argument("--model", nargs="+", default=["."], help="CALMs: folders, or recipes such as calm-m")
    parser.add_argument("--baseline", help="a causal LM: a folder, or a recipe such as transformer-s")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=positive, default=2, help="completions per client and round")
    parser.add_argument("--max_tokens", type=positive, default=64)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.5])
    parser.add_argument("--repetitions", type=positive, default=3, help="rounds per server, interleaved")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=writable, help="write the results")
    options = parser.parse_args(argv)
    require_package(UPSTREAM_PACKAGES if options.baseline else (), "benchmark", "`transformers serve`")
    lowest = min(options.temperature)
    if any(name.endswith(DISTILLED) for name in options.model) and not 0 < lowest < 1:
        raise InputError(f"{DISTILLED} needs a --temperature between 0 and 1, not {lowest:g}.")
    with tempfile.TemporaryDirectory(prefix="calm-serving-") as folder:
        results = measure(options, Path(folder))
    print(as_table(results))
    write_json(options.json, results)


def measure(options: argparse.Namespace, temporary: Path) -> list[dict]:
    """Starts all servers and returns a summary per number of clients and server; `temporary` gets models and logs."""
    # name, module and its arguments, additional fields of requests
    ours = "calm serve", ["calm_transformers.serving.serve", "--max_rows", str(max(options.clients))]
    upstream = "transformers serve", ["transformers.cli.transformers", "serve", "--continuous-batching"]
    configurations = [(model, *ours, {"ignore_eos": True}) for model in options.model]
    configurations += [(options.baseline, *upstream, {})] if options.baseline else []
    with contextlib.ExitStack() as stack:
        servers = []
        for model, name, program, fields in configurations:
            with known_errors(ValueError, OSError):
                folder = save_model(model, temporary / model.replace("/", "-"), min(options.temperature))
            port = free_port()
            args = [*program, str(folder), "--dtype", options.dtype]
            stack.enter_context(running_server(args, port, temporary / f"{len(servers)}.log"))
            prompt = PROMPT if folder == Path(model) else " ".join(f"w{100 + i}" for i in range(PROMPT_WORDS))
            servers.append(RunningServer(f"{name}: {model}", port, str(folder), prompt, fields))
        results = []
        for temperature, clients in itertools.product(options.temperature, options.clients):
            rounds: list[list[Round]] = [[] for _ in servers]  # per server
            for repetition in range(1 + options.repetitions):  # the first warms up
                requests, max_tokens = (options.requests, options.max_tokens) if repetition else (1, 8)
                for server, server_rounds in zip(servers, rounds, strict=True):
                    server_rounds.append(run_round(server, clients, requests, max_tokens, temperature))
            for server, server_rounds in zip(servers, rounds, strict=True):
                results.append(summarise_rounds(server.name, temperature, clients, server_rounds[1:]))
                print(as_table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        return results


if __name__ == "__main__":
    sys.exit(main())
