"""Trains a CALM with any head over a trained autoencoder: `python -m calm.training.train_calm --recipe demo`."""

import sys
from collections.abc import Callable

from calm.training.command import training_command
from calm.training.configuration import tokenizer_of
from calm.training.fit import begin, fit
from calm.training.models import build, for_training
from calm.training.recipe import Recipe


def train(recipe: Recipe, resume: str) -> Callable[[], None]:
    tokenizer = tokenizer_of(recipe)
    stated = begin(recipe)
    model = build(recipe, tokenizer)
    return fit(recipe, stated, for_training(model, recipe, tokenizer), tokenizer, model.config.patch_size, resume)


def main(argv: list[str] | None = None) -> int:
    return training_command("calm", __doc__, train, argv)


if __name__ == "__main__":
    sys.exit(main())
