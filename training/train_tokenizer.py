"""Trains a byte-level BPE tokenizer: `python -m calm.training.train_tokenizer --recipe demo-tokenizer`."""

import sys

from calm.command_line import InputError
from calm.training.command import training_command
from calm.training.documents import documents
from calm.training.recipe import Recipe
from calm.training.tokenizer import save_tokenizer, train_bpe

VOCAB_SIZE = 4096  # where a recipe states none


def train(recipe: Recipe, resume: str) -> None:
    """From the start, whatever `resume` says: it takes seconds."""
    texts, _ = documents(recipe.data, "train", "Counting words")
    try:
        tokenizer = train_bpe(texts, recipe.model.get("vocab_size", VOCAB_SIZE))
        save_tokenizer(tokenizer, recipe.output_dir)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    print(f"wrote {recipe.output_dir}, {len(tokenizer)} entries")


def dry_run(recipe: Recipe) -> None:
    print(f"byte-level BPE, vocab_size {recipe.model.get('vocab_size', VOCAB_SIZE)}")


def main(argv: list[str] | None = None) -> int:
    return training_command("tokenizer", __doc__, train, argv, dry_run)


if __name__ == "__main__":
    sys.exit(main())
