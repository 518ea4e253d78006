"""The command `calm`: finds the module of a subcommand and calls its `main`."""

import importlib
import sys
from collections.abc import Callable

from calm_transformers.command_line import InputError, command

COMMANDS = {  # as typed → the module in this package, what it does
    "generate": ("generate", "continue a text"),
    "app": ("pages.app", "a web page to write on"),
    "inspect": ("pages.inspect_text", "what each patch of a text was chosen from"),
    "serve": ("serving.serve", "OpenAI's API over HTTP"),
    "convert": ("conversion.convert", "published weights -> one model folder"),
    "export": ("onnx_export.export", "a model -> ONNX graphs"),
    "train": ("training.train", "tokenizer, autoencoder, calm or ar (an ordinary Llama)"),
    "tokenize": ("training.tokenize", "a recipe's text -> tokens, before its training"),
    "evaluate brier_lm": ("evaluation.brier_lm", "BrierLM on held-out text, of any causal LM"),
    "evaluate autoencoder": ("evaluation.autoencoder_report", "reconstruction, noise, posterior"),
    "evaluate calibration": ("evaluation.calibration", "BrierLM beside cross-entropy over a training"),
    "evaluate ranking": ("evaluation.ranking", "how often a score ranks the true text first"),
    "evaluate invented_words": ("evaluation.invented_words", "words that the training text never has"),
    "evaluate prompt_alignment": ("evaluation.prompt_alignment", "what cutting a prompt into patches costs"),
    "evaluate plot": ("evaluation.plot", "learning curves of a training"),
    "bench generation": ("benchmarks.generation", "tokens/s against a Llama"),
    "bench serving": ("benchmarks.serving", "tokens/s by the number of clients"),
    "bench training": ("benchmarks.training_step", "a training step"),
    "bench operations": ("benchmarks.operations", "operations and waits of a step, counted"),
    "bench gpu": ("benchmarks.gpu", "every figure wanted from a GPU"),
    "bench speed": ("benchmarks.speed", "the speed tables of the documents"),
    "experiments": ("experiments.__main__", "the paper's tables in miniature"),
}


def load(name: str) -> Callable[[list[str]], int]:
    """The `main` of a subcommand."""
    return importlib.import_module(f"calm_transformers.{COMMANDS[name][0]}").main


def overview(group: str = "") -> str:
    """The subcommands, or those of a group like "bench", a line each."""
    names = [name for name in COMMANDS if name.startswith(group)]
    lines = [f"  calm {name:27}{COMMANDS[name][1]}" for name in names]
    return "\n".join(
        [f"usage: calm {group or 'COMMAND'} [options]", "", *lines, "", "calm COMMAND --help lists its options."]
    )


@command
def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    for length in (1, 2):
        if (name := " ".join(words[:length])) in COMMANDS:
            return load(name)(words[length:])
    groups = {name.partition(" ")[0] for name in COMMANDS}
    group = words[0] if words and words[0] in groups else ""
    asked = words[1:] if group else words
    if asked and asked[0] not in ("-h", "--help"):
        typed = " ".join(words[: 2 if group else 1])
        raise InputError(f"calm {typed}: no such command (see {f'calm {group}'.strip()} --help).")
    print(overview(group))
    return 0


if __name__ == "__main__":
    sys.exit(main())
