"""Trains the autoencoder: `python -m calm.training.train_autoencoder --recipe demo-autoencoder`."""

import sys

from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.training.recipe import Recipe
from calm.training.run import command, train_with_tokenizer


def work(recipe: Recipe, options) -> None:
    train_with_tokenizer(recipe, options, CALMAutoencoder)


def main(arguments: list[str] | None = None) -> int:
    return command("autoencoder", __doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
