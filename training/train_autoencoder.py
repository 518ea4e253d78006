"""Trains the autoencoder: `python -m calm.training.train_autoencoder --recipe demo-autoencoder`."""

import sys
from collections.abc import Callable

from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.training.command import training_command
from calm.training.fit import train_with_tokenizer
from calm.training.recipe import Recipe


def train(recipe: Recipe, resume: str) -> Callable[[], None]:
    return train_with_tokenizer(recipe, resume, CALMAutoencoder)


def main(argv: list[str] | None = None) -> int:
    return training_command("autoencoder", __doc__, train, argv)


if __name__ == "__main__":
    sys.exit(main())
