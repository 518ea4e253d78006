"""Tokens per second and the time to the first token, by the number of clients, of servers that take turns.

    python -m calm.benchmarks.serving --model . --baseline transformer-s --clients 1 4 16
    python -m calm.benchmarks.serving --model calm-m --baseline transformer-s --clients 1 4 16 --max_tokens 32

A CALM is served by `python -m calm.serve`, the baseline by `transformers serve`, as it is and with its own continuous
batching. Recipes (calm-m, transformer-s) stand for random weights of their shape. Each client streams one text after
the other over HTTP; EOS ends none. Clients and servers share the machine.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

from calm.command_line import InputError, Parser, command, known_errors, positive, writable

UPSTREAM_PACKAGES = ("fastapi", "openai", "uvicorn", "rich")
START_SECONDS = 600
PROMPT_WORDS = 32


@dataclass(frozen=True)
class Load:
    """What one round sends: so many clients, each so many texts of so many tokens."""

    clients: int
    requests: int
    max_tokens: int
    temperature: float


@dataclass(frozen=True)
class Round:
    """What came back."""

    tokens: int
    seconds: float
    first_token_seconds: list[float]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Args:
        name: for the table.
        port: on loopback.
        model: the id to ask for.
        prompt: where its texts begin.
        fields: of a request, beside OpenAI's.
    """

    name: str
    port: int
    model: str
    prompt: str
    fields: dict


# servers


def save_model(name: str, folder: Path) -> Path:
    """The folder of a model: itself, or one made here of random weights in a recipe's shape, with a tokenizer."""
    import torch

    from calm.benchmarks.workloads import is_trained, random_model, shape_config
    from calm.evaluation.models import load_config

    if is_trained(name):
        load_config(name)
        return Path(name)
    config = shape_config(name)
    model = random_model(config, torch.device("cpu"), torch.float32)
    assert model.generation_config is not None
    model.generation_config.update(do_sample=True, temperature=0.5)
    model.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def word_tokenizer(vocab_size: int):
    """One word a token: w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", model_max_length=10**6)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(arguments: list[str], port: int, log: Path) -> Iterator[None]:
    """A server process, from its first healthy answer on.

    Raises:
        InputError: it ended, or did not answer in time.
    """
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                said = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-500:]
                raise InputError(f"{' '.join(arguments)} did not start: … {said}")
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


# clients


def stream_text(server: Served, load: Load, seed: int) -> tuple[int, float]:
    """Asks for one text: its number of tokens, and the seconds to the first of them."""
    body = {
        "model": server.model,
        "prompt": server.prompt,
        "max_tokens": load.max_tokens,
        "temperature": load.temperature,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        **server.fields,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=START_SECONDS)
    started, first, usage = time.perf_counter(), None, None
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise InputError(f"{server.name} answers {answer.status}: {answer.read().decode()[:500]}")
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        usage = chunk.get("usage") or usage
        if first is None and any(choice.get("text") for choice in chunk.get("choices", [])):
            first = time.perf_counter() - started
    connection.close()
    if usage is None or first is None:
        raise InputError(f"{server.name} sent no text, or no usage.")
    return usage["completion_tokens"], first


def run_round(server: Served, load: Load) -> Round:
    texts: list[tuple[int, float]] = []
    errors: list[Exception] = []

    def client(number: int) -> None:
        try:
            for i in range(load.requests):
                texts.append(stream_text(server, load, seed=1000 * number + i))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(load.clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    return Round(sum(tokens for tokens, _ in texts), seconds, [first for _, first in texts])


# the table


@dataclass(frozen=True)
class Line:
    """One line of the table; seconds, and tokens a second over all clients."""

    server: str
    clients: int
    tokens_per_second: float
    least: float
    most: float
    first_token_p50: float
    first_token_p99: float

    @classmethod
    def of(cls, server: str, clients: int, rounds: list[Round]) -> Line:
        speeds = [each.tokens_per_second for each in rounds]
        firsts = sorted(first for each in rounds for first in each.first_token_seconds)
        p99 = quantiles(firsts, n=100, method="inclusive")[98] if len(firsts) > 1 else firsts[0]
        return cls(server, clients, median(speeds), min(speeds), max(speeds), median(firsts), p99)


def as_table(lines: list[Line]) -> str:
    one = {line.server: line.tokens_per_second for line in lines if line.clients == 1}
    rows = [
        "| server | clients | tokens/s (range) | ÷ one client | first token, ms: p50, p99 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        ratio = f"{line.tokens_per_second / one[line.server]:.2f}" if line.server in one else "–"
        speed = f"{line.tokens_per_second:.1f} ({line.least:.1f} – {line.most:.1f})"
        firsts = f"{1000 * line.first_token_p50:.0f}, {1000 * line.first_token_p99:.0f}"
        rows.append(f"| {line.server} | {line.clients} | {speed} | {ratio} | {firsts} |")
    return "\n".join(rows)


def parse(argv: list[str] | None):
    parser = Parser("python -m calm.benchmarks.serving", __doc__)
    parser.add_argument("--model", default=".", help="a CALM: a folder, or a recipe, as calm-m")
    parser.add_argument("--baseline", help="an ordinary causal LM: a folder, or a recipe, as transformer-s")
    parser.add_argument("--no_upstream_batching", action="store_true", help="leave out upstream's continuous batching")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=positive, default=2, help="texts a client asks for in a round")
    parser.add_argument("--max_tokens", type=positive, default=64)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--repetitions", type=positive, default=3, help="rounds, in which the servers take turns")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=writable, help="file for the figures")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    missing = [package for package in UPSTREAM_PACKAGES if importlib.util.find_spec(package) is None]
    if options.baseline and missing:
        raise InputError(
            f'`transformers serve` needs {", ".join(missing)}: pip install "calm-transformers[benchmark]".'
        )
    work = Path(tempfile.mkdtemp(prefix="calm-serving-"))
    try:
        lines = measure(options, work)
    finally:
        shutil.rmtree(work)
    print(as_table(lines))
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", encoding="utf-8")


def measure(options, work: Path) -> list[Line]:
    with contextlib.ExitStack() as stack:
        servers = []
        for name, arguments in (
            ("calm.serve", ["calm.serve", options.model]),
            ("transformers serve", ["transformers.cli.transformers", "serve", options.baseline]),
            ("transformers serve, continuous batching", ["transformers.cli.transformers", "serve", options.baseline]),
        ):
            where = arguments[-1]
            if where is None or ("batching" in name and options.no_upstream_batching):
                continue
            with known_errors(ValueError, OSError):
                folder = save_model(where, work / where.replace("/", "-"))
            extra = ["--continuous-batching"] if "batching" in name else []
            port, is_ours = free_port(), name == "calm.serve"
            arguments = [*arguments[:-1], str(folder), *extra, "--dtype", options.dtype]
            stack.enter_context(running(arguments, port, work / f"{len(servers)}.log"))
            prompt = " ".join(f"w{100 + i}" for i in range(PROMPT_WORDS)) if folder != Path(where) else OPENING
            fields = {"ignore_eos": True} if is_ours else {}
            servers.append(Served(f"{name}: {where}", port, str(folder), prompt, fields))
        lines = []
        for clients in options.clients:
            load = Load(clients, options.requests, options.max_tokens, options.temperature)
            rounds: list[list[Round]] = [[] for _ in servers]
            for repetition in range(1 + options.repetitions):  # the first warms up
                for server, done in zip(servers, rounds, strict=True):
                    done.append(run_round(server, load if repetition else Load(clients, 1, 8, load.temperature)))
            for server, done in zip(servers, rounds, strict=True):
                lines.append(Line.of(server.name, clients, done[1:]))
                print(as_table(lines[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        return lines


OPENING = "Once upon a time, there was a little girl named Lily. She loved to play with her toys."


if __name__ == "__main__":
    sys.exit(main())
