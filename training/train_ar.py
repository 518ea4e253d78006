"""Trains an ordinary Llama, for comparison: `python -m calm.training.train_ar --recipe transformer-s`."""

import sys
from collections.abc import Callable

from transformers import LlamaForCausalLM

from calm.training.command import training_command
from calm.training.fit import train_with_tokenizer
from calm.training.recipe import Recipe


def train(recipe: Recipe, resume: str) -> Callable[[], None]:
    return train_with_tokenizer(recipe, resume, LlamaForCausalLM)


def main(argv: list[str] | None = None) -> int:
    return training_command("ar", __doc__, train, argv)


if __name__ == "__main__":
    sys.exit(main())
