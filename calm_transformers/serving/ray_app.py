"""The API of `calm serve` on a Ray cluster: replicas on many machines, replaced when they fail, more under load.

    serve run calm_transformers.serving.ray_app:app model=. min_replicas=2 max_replicas=8 num_gpus=1

What waits does so in Ray's proxy, so a replica that dies loses no more than the texts that it was generating.
"""

from __future__ import annotations

from typing import Any

from ray import serve  # pyright: ignore[reportMissingImports]  # of the extra [cluster]
from ray.serve import Application  # pyright: ignore[reportMissingImports]
from starlette.applications import Starlette

from calm_transformers.command_line import InputError, Parser
from calm_transformers.serving.app import create_app
from calm_transformers.serving.serve import load_batcher, parse, server_options


@serve.deployment(name="CALM")
@serve.ingress()
class Replica:
    """A model with its batcher, and the API in front of it; `words` are the arguments of `calm serve`."""

    def __init__(self, words: list[str]):
        options = parse(words)
        self.server_options = server_options(options)
        self.batcher = load_batcher(options)

    def __serve_build_asgi_app__(self) -> Starlette:
        return create_app(self.batcher, self.server_options)

    def check_health(self) -> None:
        """Called by Ray, which replaces the replica when this raises `Unhealthy`."""
        self.batcher.check_healthy()


def app(args: dict[str, Any]) -> Application:
    """Returns the application that `serve run` or a Serve config file deploys.

    Args:
        args: `model`; `min_replicas` (1) and `max_replicas` (the same); a replica's `num_cpus` (1), which are its
            PyTorch threads, and `num_gpus` (0); options of `calm serve` without host and port, which are Ray's.

    Raises:
        InputError: an option is unknown or invalid.
    """
    args = dict(args)
    words = [str(args.pop("model"))] if "model" in args else []
    for name, value in args.items():
        if name in ("host", "port"):
            raise InputError(f"{name}: is an option of `serve start --http-{name}`, or of http_options in a file.")
        each = value if isinstance(value, list) else [value]
        words += [f"--{name}" if str(item).lower() == "true" else f"--{name}={item}" for item in each]
    parser = Parser("calm serve", None, add_help=False)
    parser.add_argument("--min_replicas", type=int, default=1)
    parser.add_argument("--max_replicas", type=int)
    parser.add_argument("--num_cpus", type=float, default=1)
    parser.add_argument("--num_gpus", type=float, default=0)
    for_ray, words = parser.parse_known_args(words)
    options = parse(words)
    return Replica.options(  # pyright: ignore[reportAttributeAccessIssue]
        ray_actor_options={"num_cpus": for_ray.num_cpus, "num_gpus": for_ray.num_gpus},
        autoscaling_config={
            "min_replicas": for_ray.min_replicas,
            "max_replicas": for_ray.max_replicas or for_ray.min_replicas,
            "target_ongoing_requests": options.max_rows,
        },
        max_ongoing_requests=options.max_rows,
        max_queued_requests=options.max_waiting,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=options.grace,
    ).bind(words)
