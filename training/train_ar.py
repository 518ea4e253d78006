"""Trains an ordinary Llama, for comparison: `python -m calm.training.train_ar --recipe transformer-s`."""

import sys

from transformers import LlamaConfig, LlamaForCausalLM

from calm.training.cost import print_cost
from calm.training.recipe import Recipe
from calm.training.run import command, fit, load_tokenizer, make_config, start, training_arguments


def work(recipe: Recipe, options) -> None:
    if options.dry_run:
        return print_cost(recipe, make_config(LlamaConfig, recipe.model))
    tokenizer = load_tokenizer(recipe)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    values = {"max_position_embeddings": recipe.data.block_size, **recipe.model, **special}
    config = make_config(LlamaConfig, {**values, "vocab_size": len(tokenizer)})
    args = training_arguments(recipe)
    start(args)
    model = LlamaForCausalLM.from_pretrained(recipe.init_from) if recipe.init_from else LlamaForCausalLM(config)
    fit(recipe, model, tokenizer, 1, args, options.resume)


def main(arguments: list[str] | None = None) -> int:
    return command("ar", __doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
