"""Trains a byte-level BPE tokenizer: `python -m calm.training.train_tokenizer --recipe demo-tokenizer`."""

import sys

from calm.training.recipe import Recipe, RecipeError
from calm.training.run import command, documents
from calm.training.tokenizer import save_tokenizer, train_bpe


def work(recipe: Recipe, options) -> None:
    vocab_size = recipe.model.get("vocab_size", 4096)
    if options.dry_run:
        print(f"byte-level BPE, vocab_size {vocab_size}")
        return
    texts, _ = documents(recipe, "train")
    try:
        tokenizer = train_bpe(texts, vocab_size)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    save_tokenizer(tokenizer, recipe.output_dir)
    print(f"wrote {recipe.output_dir}, {len(tokenizer)} entries")


def main(arguments: list[str] | None = None) -> int:
    return command("tokenizer", __doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
