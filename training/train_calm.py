"""Trains a CALM with any head over a trained autoencoder: `python -m calm.training.train_calm --recipe demo`."""

import sys

from calm.configuration_calm import CALMConfig
from calm.training.cost import print_cost
from calm.training.models import autoencoder_config_of, build, config_of, for_training
from calm.training.recipe import Recipe
from calm.training.run import command, fit, if_there, start, tokenizer_of, training_arguments


def config_and_notes(recipe: Recipe) -> tuple[CALMConfig, list[str]]:
    """The configuration that a run would make of what is there already, and lines on what isn't."""
    notes: list[str] = []
    if recipe.init_from:
        return config_of(recipe), notes
    autoencoder = if_there(autoencoder_config_of, recipe, recipe.autoencoder, ["patch_size", "latent_size"], notes)
    vocabulary: list[str] = []
    tokenizer = if_there(tokenizer_of, recipe, recipe.tokenizer, ["vocab_size"], vocabulary)
    # The autoencoder's vocabulary is the tokenizer's.
    return config_of(recipe, tokenizer, autoencoder), notes + ([] if autoencoder else vocabulary)


def work(recipe: Recipe, options) -> None:
    if options.dry_run:
        return print_cost(recipe, *config_and_notes(recipe))
    tokenizer = tokenizer_of(recipe)
    args = training_arguments(recipe)
    start(args)
    model = build(recipe, tokenizer)
    fit(recipe, for_training(model, recipe), tokenizer, model.config.patch_size, args, options.resume)


def main(arguments: list[str] | None = None) -> int:
    return command("calm", __doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
