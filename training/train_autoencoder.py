"""Trains the autoencoder: `python -m calm.training.train_autoencoder --recipe demo-autoencoder`."""

import sys

from calm.configuration_calm import CALMAutoencoderConfig
from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.training.cost import print_cost
from calm.training.recipe import Recipe
from calm.training.run import (
    command,
    fit,
    if_there,
    make_config,
    read,
    start,
    tokenizer_fields,
    tokenizer_of,
    training_arguments,
)


def config_of(recipe: Recipe, tokenizer) -> CALMAutoencoderConfig:
    """The configuration that the recipe states, or that of the model to go on from.

    Args:
        tokenizer: `None` only in a dry run, where it is not there yet.

    Raises:
        RecipeError: no model to go on from, or a value that makes no sense.
    """
    if recipe.init_from:
        return read("init_from", recipe.init_from, "train_autoencoder", CALMAutoencoderConfig.from_pretrained)
    return make_config(CALMAutoencoderConfig, {**recipe.model, **tokenizer_fields(tokenizer)})


def work(recipe: Recipe, options) -> None:
    if options.dry_run:
        notes: list[str] = []
        tokenizer = if_there(tokenizer_of, recipe, recipe.tokenizer, ["vocab_size"], notes)
        return print_cost(recipe, config_of(recipe, tokenizer), [] if recipe.init_from else notes)
    tokenizer = tokenizer_of(recipe)
    config = config_of(recipe, tokenizer)
    args = training_arguments(recipe)
    start(args)
    model = CALMAutoencoder.from_pretrained(recipe.init_from) if recipe.init_from else CALMAutoencoder(config)
    fit(recipe, model, tokenizer, model.config.patch_size, args, options.resume)


def main(arguments: list[str] | None = None) -> int:
    return command("autoencoder", __doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
