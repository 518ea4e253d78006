"""Trains a CALM with any head over a trained autoencoder: `python -m calm.training.train_calm --recipe demo`."""

import sys
from functools import partial

from transformers import GenerationConfig

from calm.bundle_files import generation_defaults
from calm.configuration_calm import CALMConfig
from calm.modeling_calm import CALMForCausalLM
from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.training.auxiliary import WithAuxiliary
from calm.training.cost import print_cost
from calm.training.recipe import Recipe, RecipeError
from calm.training.run import command, fit, folder_or_hub_id, load_tokenizer, make_config, start, training_arguments
from calm.training.tokenizer import filler_token_id


def build(recipe: Recipe, tokenizer) -> CALMForCausalLM:
    """A model to go on from, or a new one around the trained autoencoder.

    Raises:
        RecipeError: no autoencoder, or one whose vocabulary is not the tokenizer's.
    """
    if recipe.init_from:
        where = folder_or_hub_id("init_from", recipe.init_from, "train_calm")
        return CALMForCausalLM.from_pretrained(where, **recipe.model)
    where = folder_or_hub_id("autoencoder", recipe.autoencoder, "train_autoencoder")
    autoencoder = CALMAutoencoder.from_pretrained(where)
    if autoencoder.config.vocab_size != len(tokenizer):
        raise RecipeError(
            f"the autoencoder {recipe.autoencoder} knows {autoencoder.config.vocab_size} tokens, the tokenizer "
            f"{len(tokenizer)}: both must be the ones it was trained with."
        )
    values = {
        "max_position_embeddings": recipe.data.block_size // autoencoder.config.patch_size,
        "patch_size": autoencoder.config.patch_size,
        "latent_size": autoencoder.config.latent_size,
        **recipe.model,
        "vocab_size": len(tokenizer),
        "autoencoder_config": autoencoder.config.to_dict(),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "prompt_filler_token_id": filler_token_id(tokenizer),
    }
    model = CALMForCausalLM(make_config(CALMConfig, values))
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    model.generation_config = GenerationConfig(**generation_defaults(model.config))
    return model


def work(recipe: Recipe, options) -> None:
    if options.dry_run:
        make = partial(CALMConfig.from_pretrained, recipe.init_from) if recipe.init_from else CALMConfig
        return print_cost(recipe, make_config(make, recipe.model))
    tokenizer = load_tokenizer(recipe)
    args = training_arguments(recipe)
    start(args)
    model = build(recipe, tokenizer)
    patch_size = model.config.patch_size
    if recipe.freeze_backbone:
        model.model.requires_grad_(False)
    if recipe.auxiliary_weight:
        model = WithAuxiliary(model, recipe.auxiliary_weight, recipe.head_weight)
    elif recipe.head_weight != 1:
        raise RecipeError(f"head_weight={recipe.head_weight} has no meaning without auxiliary_weight.")
    fit(recipe, model, tokenizer, patch_size, args, options.resume)


def main(arguments: list[str] | None = None) -> int:
    return command("calm", __doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
