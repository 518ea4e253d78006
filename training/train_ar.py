"""Trains an ordinary Llama, for comparison: `python -m calm.training.train_ar --recipe transformer-s`."""

import sys

from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from calm.training.cost import print_cost
from calm.training.recipe import Recipe, RecipeError
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


def config_of(recipe: Recipe, tokenizer) -> LlamaConfig:
    """The configuration that the recipe states, or that of the model to go on from.

    Args:
        tokenizer: `None` only in a dry run, where it is not there yet.

    Raises:
        RecipeError: no model to go on from, or a value that makes no sense.
    """
    if recipe.init_from:
        model_type = read("init_from", recipe.init_from, "train_ar", PretrainedConfig.get_config_dict)[0]["model_type"]
        if model_type != LlamaConfig.model_type:
            raise RecipeError(f"init_from {recipe.init_from}: is a model of type {model_type!r}, not a Llama.")
        return LlamaConfig.from_pretrained(recipe.init_from)
    return make_config(
        LlamaConfig, {"max_position_embeddings": recipe.data.block_size, **recipe.model, **tokenizer_fields(tokenizer)}
    )


def work(recipe: Recipe, options) -> None:
    if options.dry_run:
        notes: list[str] = []
        tokenizer = if_there(tokenizer_of, recipe, recipe.tokenizer, ["vocab_size"], notes)
        return print_cost(recipe, config_of(recipe, tokenizer), [] if recipe.init_from else notes)
    tokenizer = tokenizer_of(recipe)
    config = config_of(recipe, tokenizer)
    args = training_arguments(recipe)
    start(args)
    model = LlamaForCausalLM.from_pretrained(recipe.init_from) if recipe.init_from else LlamaForCausalLM(config)
    fit(recipe, model, tokenizer, 1, args, options.resume)


def main(arguments: list[str] | None = None) -> int:
    return command("ar", __doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
