"""Trains a CALM with any head over a trained autoencoder: `python -m calm.training.train_calm --recipe demo`."""

import sys

from calm.training.cost import print_cost
from calm.training.models import build, config_of, for_training
from calm.training.recipe import Recipe
from calm.training.run import command, fit, load_tokenizer, start, training_arguments


def work(recipe: Recipe, options) -> None:
    if options.dry_run:
        return print_cost(recipe, config_of(recipe))
    tokenizer = load_tokenizer(recipe)
    args = training_arguments(recipe)
    start(args)
    model = build(recipe, tokenizer)
    fit(recipe, for_training(model, recipe), tokenizer, model.config.patch_size, args, options.resume)


def main(arguments: list[str] | None = None) -> int:
    return command("calm", __doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
