"""Trains an ordinary Llama, for comparison: `python -m calm.training.train_ar --recipe transformer-s`."""

import sys

from transformers import LlamaForCausalLM

from calm.training.recipe import Recipe
from calm.training.run import command, train_with_tokenizer


def work(recipe: Recipe, options) -> None:
    train_with_tokenizer(recipe, options, LlamaForCausalLM, {"max_position_embeddings": recipe.data.block_size})


def main(arguments: list[str] | None = None) -> int:
    return command("ar", __doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
