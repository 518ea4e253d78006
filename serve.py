"""Serves a CALM over the OpenAI API: `python -m calm.serve MODEL [options of transformers serve]`.

`transformers serve` looks the architecture up among its own classes. Here the installed package's are put there first,
so no code out of the model's repository runs.
"""

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

from calm.command_line import Parser, command, known_errors

PROGRAM = "python -m calm.serve"
ARCHITECTURE = "CALMForCausalLM"
SERVING_PACKAGES = ("fastapi", "openai", "pydantic", "uvicorn")


@command
def main(argv: list[str] | None = None) -> None:
    """Checks, registers CALM's classes and runs upstream's server until it is stopped.

    Raises:
        SystemExit: with upstream's code once its server has ended.
    """
    usage = f"{PROGRAM} MODEL [options of transformers serve]"
    parser = Parser(PROGRAM, "Serves a CALM over the OpenAI API.", usage=usage)
    parser.add_argument("model", help="folder or Hub id, ID@REVISION too; `.` is the demo model in this repository")
    options = parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        help=f"those of `transformers serve`: --host, --port, --device, …; `{PROGRAM} MODEL --help` lists them",
    )
    options.required = False  # argparse would name it beside a missing model
    parsed = parser.parse_args(argv)
    wants_help = "--help" in parsed.options
    with known_errors(ServeError):
        check_environment()
        if not wants_help:
            check_model(parsed.model)
    if not wants_help:
        register_classes()
    start_upstream([parsed.model, *parsed.options])


class ServeError(Exception):
    """Why nothing can be served, in one sentence."""


def check_environment() -> None:
    """
    Raises:
        ServeError: transformers has no server that completes text, or a package that its server needs is missing.
    """
    try:
        has_server = importlib.util.find_spec("transformers.cli.serving.completion") is not None
    except ModuleNotFoundError:  # of a parent: transformers 4 keeps its server elsewhere
        has_server = False
    if not has_server:
        import transformers

        raise ServeError(
            f"transformers {transformers.__version__} has no server with text completions, which CALM needs: install "
            "a newer one (5.23.0 is tested)."
        )
    missing = [package for package in SERVING_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ServeError(f'the server needs {", ".join(missing)}: pip install "calm-transformers[serve]".')


def check_model(model: str) -> None:
    """
    Raises:
        ServeError: it is no folder and no Hub id that can be reached, or what is there is no `CALMForCausalLM`.
    """
    from transformers import PretrainedConfig

    is_folder = Path(model).is_dir()
    if is_folder and "@" in model:
        raise ServeError(f"{model}: upstream's server takes what follows an @ for a revision; rename the folder.")
    if not is_folder and looks_like_a_path(model):
        raise ServeError(f"{model} is no folder.")
    name, _, revision = model.partition("@")
    if is_folder and not (Path(model) / "config.json").is_file():
        raise ServeError(f"{model} has no config.json.")
    try:
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = "has no readable config.json" if is_folder else "is no folder, and no model on the Hub within reach"
        raise ServeError(f"{model} {where} ({reason}).") from None
    architectures = config.get("architectures") or [f"nothing (model_type {config.get('model_type')!r})"]
    if config.get("model_type") != "calm" or architectures[0] != ARCHITECTURE:
        raise ServeError(f"{model} is no {ARCHITECTURE}: its config.json names {architectures[0]}.")


def looks_like_a_path(model: str) -> bool:
    """Whether this can't be a Hub id, NAME or OWNER/NAME, so that nobody is asked about it."""
    return model.startswith((".", "/", "~")) or model.endswith("/") or "\\" in model or model.count("/") > 1


def register_classes() -> None:
    """Makes this process's transformers take CALM for one of its own models."""
    import transformers

    from calm.configuration_calm import CALMConfig
    from calm.modeling_calm import CALMForCausalLM, CALMModel

    transformers.AutoConfig.register(CALMConfig.model_type, CALMConfig, exist_ok=True)
    transformers.AutoModel.register(CALMConfig, CALMModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(CALMConfig, CALMForCausalLM, exist_ok=True)
    # Upstream's server asks for an attribute of this name.
    transformers.CALMForCausalLM = CALMForCausalLM  # pyright: ignore[reportAttributeAccessIssue]


def start_upstream(arguments: list[str]) -> None:
    """Runs `transformers serve` with these arguments, in this process."""
    import typer
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    server.build_server = with_client_errors(server.build_server)
    app = typer.Typer(add_completion=False)
    app.command()(Serve)
    app(args=arguments, prog_name=PROGRAM)


def with_client_errors(build_server: Callable) -> Callable:
    """Upstream's `build_server` with two answers changed that would be "500 Internal Server Error".

    A ValueError, which is how CALM refuses what acts on token probabilities and how a tokenizer says that it has no
    chat template, becomes a 400 with its sentence. The list of models names the one that is served: upstream looks for
    its own architectures in the Hub's cache, and fails where there is no cache.
    """

    @functools.wraps(build_server)
    def build(model_manager, *args, **kwargs):
        from fastapi.responses import JSONResponse

        app = build_server(model_manager, *args, **kwargs)

        @app.exception_handler(ValueError)
        async def refused(_request, error):
            return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

        model = {"id": model_manager.force_model, "object": "model", "created": int(time.time()), "owned_by": "calm"}
        model_manager.get_gen_models = lambda: [model]
        return app

    return build


if __name__ == "__main__":
    sys.exit(main())
