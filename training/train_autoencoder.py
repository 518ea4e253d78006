"""Trains the autoencoder: `python -m calm.training.train_autoencoder --recipe demo-autoencoder`."""

import sys

from calm.configuration_calm import CALMAutoencoderConfig
from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.training.cost import print_cost
from calm.training.recipe import Recipe
from calm.training.run import command, fit, load_tokenizer, make_config, start, training_arguments


def work(recipe: Recipe, options) -> None:
    if options.dry_run:
        return print_cost(recipe, make_config(CALMAutoencoderConfig, recipe.model))
    tokenizer = load_tokenizer(recipe)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = make_config(CALMAutoencoderConfig, {**recipe.model, **special, "vocab_size": len(tokenizer)})
    args = training_arguments(recipe)
    start(args)
    model = CALMAutoencoder.from_pretrained(recipe.init_from) if recipe.init_from else CALMAutoencoder(config)
    fit(recipe, model, tokenizer, model.config.patch_size, args, options.resume)


def main(arguments: list[str] | None = None) -> int:
    return command("autoencoder", __doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
