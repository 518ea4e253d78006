"""The command `calm`: finds the module of a subcommand and calls its `main`."""

import importlib
import sys

from calm_transformers.command_line import InputError, command

COMMANDS = {  # subcommand → its module in this package, and its summary
    "generate": ("generate", "continue a text"),
    "app": ("pages.app", "a web page that continues a text"),
    "inspect": ("pages.inspect_text", "the candidates that each patch was sampled from"),
    "serve": ("serving.serve", "OpenAI's API over HTTP"),
    "convert": ("conversion.convert", "published checkpoints -> one model folder"),
    "export": ("onnx_export.export", "export a model to ONNX"),
    "train": ("training.train", "train a tokenizer, an autoencoder, a calm or an ar (a plain Llama)"),
    "tokenize": ("training.tokenize", "tokenize a recipe's text before training"),
    "evaluate brier_lm": ("evaluation.brier_lm", "BrierLM on held-out text, of any causal LM"),
    "evaluate autoencoder": ("evaluation.autoencoder_report", "reconstruction, noise, posterior"),
    "evaluate invented_words": ("evaluation.invented_words", "words that don't occur in the training text"),
    "bench generation": ("benchmarks.generation", "tokens/s compared with a Llama"),
    "bench serving": ("benchmarks.serving", "tokens/s by the number of clients"),
    "bench training": ("benchmarks.training_step", "a training step"),
    "bench operations": ("benchmarks.operations", "dispatched ops and host syncs per step"),
    "bench gpu": ("benchmarks.gpu", "all GPU benchmarks"),
    "bench speed": ("benchmarks.speed", "the speed tables of the docs"),
    "experiments": ("experiments.__main__", "the paper's tables at small scale"),
}


@command
def main(argv: list[str] | None = None) -> int:
    """Runs the subcommand that the first word or two name, or lists all, or those of a group."""
    words = sys.argv[1:] if argv is None else argv
    for length in (1, 2):
        if (name := " ".join(words[:length])) in COMMANDS:
            return importlib.import_module(f"calm_transformers.{COMMANDS[name][0]}").main(words[length:])
    groups = {name.partition(" ")[0] for name in COMMANDS}
    group = words[0] if words and words[0] in groups else ""
    rest = words[1:] if group else words
    if rest and rest[0] not in ("-h", "--help"):
        unknown = f"{group} {rest[0]}".strip()
        raise InputError(f"calm {unknown}: no such command (see {f'calm {group}'.strip()} --help).")
    lines = [f"  calm {name:27}{summary}" for name, (_, summary) in COMMANDS.items() if name.startswith(group)]
    print(f"usage: calm {group or 'COMMAND'} [options]", "", *lines, "", sep="\n")
    print("calm COMMAND --help lists its options.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
