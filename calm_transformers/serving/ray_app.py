"""The API of `calm serve` on a Ray cluster: replicas on many machines, replaced when they fail, more under load.

    serve run calm_transformers.serving.ray_app:app model=. min_replicas=2 max_replicas=8 num_gpus=1

What waits does so in Ray's proxy, so a replica that dies loses no more than the texts that it was generating.
"""

from __future__ import annotations

from typing import Any

from ray import serve  # pyright: ignore[reportMissingImports]  # of the extra [cluster]
from ray.serve import Application  # pyright: ignore[reportMissingImports]
from starlette.applications import Starlette

from calm_transformers.command_line import InputError
from calm_transformers.serving.app import create_app
from calm_transformers.serving.serve import load_batcher, parse, server_options

RAY_OPTIONS = {"min_replicas": int, "max_replicas": int, "num_cpus": float, "num_gpus": float}


@serve.deployment(name="CALM")
@serve.ingress()
class Replica:
    """A model with its batcher, and the API in front of it; `words` are the arguments of `calm serve`."""

    def __init__(self, words: list[str]):
        self.options = parse(words)
        self.batcher = load_batcher(self.options)

    def __serve_build_asgi_app__(self) -> Starlette:
        return create_app(self.batcher, server_options(self.options))

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
    for_ray = {name: convert(args.pop(name)) for name, convert in RAY_OPTIONS.items() if name in args}
    words = [str(args.pop("model"))] if "model" in args else []
    for name, value in args.items():
        if name in ("host", "port"):
            raise InputError(f"{name}: is an option of `serve start --http-{name}`, or of http_options in a file.")
        each = value if isinstance(value, list) else [value]
        words += [f"--{name}" if str(item).lower() == "true" else f"--{name}={item}" for item in each]
    options = parse(words)
    min_replicas = for_ray.pop("min_replicas", 1)
    replicas = {"min_replicas": min_replicas, "max_replicas": for_ray.pop("max_replicas", min_replicas)}
    return Replica.options(  # pyright: ignore[reportAttributeAccessIssue]
        ray_actor_options=for_ray,
        autoscaling_config={**replicas, "target_ongoing_requests": options.max_rows},
        max_ongoing_requests=options.max_rows,
        max_queued_requests=options.max_waiting,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=options.grace,
    ).bind(words)
