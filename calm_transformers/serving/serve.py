"""Serves a CALM over the OpenAI API: `calm serve MODEL`, then any client of that API.

Requests are generated in one batch (serving/batcher.py). The model runs with this package's code; remote code is not
loaded.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from argparse import ArgumentTypeError, Namespace
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jinja2 import TemplateSyntaxError

from calm_transformers.command_line import Parser, bind_socket, command, known_errors, positive, require_package, utf8
from calm_transformers.loading import load_calm
from calm_transformers.serving.batcher import Batcher

if TYPE_CHECKING:
    from calm_transformers.serving.middleware import ServerOptions

PROGRAM = "calm serve"
SERVING_PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client")
KEY_VARIABLE = "CALM_API_KEY"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@command
def main(argv: list[str] | None = None) -> None:
    """Loads the model and serves it until SIGINT or SIGTERM."""
    options = parse(argv)
    require_package(SERVING_PACKAGES, "serve", "the server")
    with known_errors(OSError):
        server_socket = bind_socket(options.host, options.port)
    with server_socket:
        from calm_transformers.serving.app import create_app

        settings = server_options(options, ip_address(server_socket.getsockname()[0]).is_loopback)
        batcher = load_batcher(options)
        try:
            run(create_app(batcher, settings), batcher, server_socket, options)
        finally:
            batcher.close(cancel=True)


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("model", type=utf8, help="folder or Hub id; `.` is the demo model in this repository")
    parser.add_argument("--model_name", type=utf8, help="the model's id in the API (default: MODEL as given)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free port (default: 8000)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, … (default: as saved)")
    parser.add_argument("--max_rows", type=positive, default=16, help="most running texts (default: 16)")
    parser.add_argument("--max_waiting", type=positive, default=64, help="most in the queue, else 429 (default: 64)")
    parser.add_argument("--max_length", type=positive, help="of prompt and text, in tokens (default: the model's)")
    parser.add_argument("--max_draws", type=positive, default=1000, help="most candidates per step (default: 1000)")
    parser.add_argument("--prefill_chunk_size", type=positive, default=512, help="prompt tokens a step (default: 512)")
    parser.add_argument("--max_request_bytes", type=positive, default=2**20, help="larger: 413 (default: 1 MiB)")
    parser.add_argument("--timeout", type=seconds, default=600, help="seconds per request, 0: no limit (default: 600)")
    parser.add_argument("--grace", type=positive, default=30, help="seconds to finish after a signal (default: 30)")
    parser.add_argument("--api_key", help=f"key that clients must send (default: ${KEY_VARIABLE}, or none)")
    parser.add_argument("--api_key_file", type=Path, help="a file of such keys, one per line")
    parser.add_argument("--ignore_unknown_fields", action="store_true", help="of requests, instead of a 400")
    parser.add_argument("--chat_template", type=Path, help="a Jinja file, used instead of the tokenizer's template")
    help_text = "origin of web pages that may send requests, * for any (repeatable)"
    parser.add_argument("--allow_origin", action="append", default=[], help=help_text)
    return parser.parse_args(argv)


def seconds(text: str) -> float:
    """Parses a number of seconds, for `type=` of an option."""
    if not 0 <= (number := float(text)) < float("inf"):
        raise ArgumentTypeError(f"{text}: must be a number of seconds that is not negative.")
    return number


def read_keys(options: Namespace) -> tuple[str, ...]:
    """Returns the API keys of the options or of the environment.

    Raises:
        ValueError: one is empty.
        OSError: their file can't be read.
    """
    single = os.environ.get(KEY_VARIABLE) if options.api_key is None else options.api_key
    keys = [] if single is None else [single]
    if options.api_key_file is not None:
        keys += options.api_key_file.read_text(encoding="utf-8-sig").splitlines() or [""]
    if not all(keys):
        raise ValueError(f"an API key is empty: --api_key, {KEY_VARIABLE} or a line of --api_key_file.")
    if any(key.split() != [key] or key.startswith("#") for key in keys):
        raise ValueError("an API key has spaces or begins with #: a file of keys has one per line and nothing else.")
    return tuple(keys)


def server_options(options: Namespace, is_loopback: bool = True) -> ServerOptions:
    """Returns the options of the HTTP server; without keys and on loopback it answers to names of this machine alone.

    Raises:
        InputError: see `read_keys`.
    """
    from calm_transformers.serving.middleware import ServerOptions

    with known_errors():
        keys = read_keys(options)
    if not keys and not is_loopback:
        print(f"warning: anyone who reaches {options.host} can use this server, as it has no API key", file=sys.stderr)
    return ServerOptions(
        model_name=options.model_name or options.model,
        api_keys=keys,
        allowed_hosts=() if keys or not is_loopback else (options.host, *LOOPBACK_NAMES),
        max_request_bytes=options.max_request_bytes,
        timeout_s=options.timeout or None,
        allowed_origins=tuple(options.allow_origin),
        ignore_unknown_fields=options.ignore_unknown_fields,
    )


def load_batcher(options: Namespace) -> Batcher:
    """Loads the model and its tokenizer, and returns a `Batcher` with the limits of the options.

    Raises:
        InputError: there is no CALM, tokenizer or such device, the template can't be read, or the defaults fail.
    """
    with known_errors():
        template = options.chat_template and read_template(options.chat_template)
        dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
        if dtype != "auto" and not isinstance(dtype, torch.dtype):
            raise ValueError(f"--dtype {options.dtype}: must be auto or a dtype of torch, as float32 or bfloat16.")
        model, tokenizer = load_calm(options.model, options.device, dtype)
        if template is not None:
            tokenizer.chat_template = template
        check_chat_template(tokenizer)
        limits = ("max_rows", "max_waiting", "max_length", "max_draws", "prefill_chunk_size")
        batcher = Batcher(model, tokenizer, **{name: getattr(options, name) for name in limits})
        batcher.submit([0], max_new_tokens=1).result()  # errors that every request with default settings would have
        return batcher


def read_template(path: Path) -> str:
    """Returns the text of a file; raises `ValueError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not text in UTF-8.") from None


def check_chat_template(tokenizer) -> None:
    """Raises `ValueError` if the chat template is not valid Jinja."""
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja, in line {error.lineno}: {error.message}") from None
    except Exception:  # a template is a program: it may accept other conversations
        pass


def run(app, batcher: Batcher, server_socket: socket.socket, options: Namespace) -> None:
    """Serves until SIGINT or SIGTERM, see `GracefulServer`."""
    from calm_transformers.serving.connections import GracefulServer

    host, port = server_socket.getsockname()[:2]
    with known_errors(OSError):  # another server may have taken the port meanwhile
        server_socket.listen()
    print(f"Serving {options.model} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    with suppress(KeyboardInterrupt):  # which uvicorn raises again after the shutdown
        GracefulServer(app, batcher, options.grace).run(sockets=[server_socket])


def handle_signal(signum: int, frame) -> None:
    """Ends the process at the first signal, also while the model loads, and ignores further ones."""
    for ignored in SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(0)


if __name__ == "__main__":
    for handled in SIGNALS:  # the first process of a container has no default handlers
        signal.signal(handled, handle_signal)
    sys.exit(main())
