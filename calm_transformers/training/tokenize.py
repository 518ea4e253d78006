"""Tokenises text before a training: `calm tokenize --recipe calm-m --train_files text/ --output tokens`.

The training then takes the output: `--train_files tokens`. Several machines may each write a part of it: with --shard
0/4 to 3/4, each --num_proc shards. What is there already is not written again, so that the same command resumes.
"""

import argparse
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from calm_transformers.command_line import InputError, Parser, command, known_errors, positive
from calm_transformers.documents import load_documents, tokenize_documents
from calm_transformers.progress import progress_bar
from calm_transformers.training.data import document_ending, reading_manifest, token_manifest, write_shard
from calm_transformers.training.recipe import Recipe, load_recipe, parse_command_line
from calm_transformers.training.train import config_with_notes, load_recipe_tokenizer


def shard_of(text: str) -> tuple[int, int]:
    """Parses i/n; an argparse `type=`."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text}: must be i/n with i from 0 to n - 1.")
    return int(index), int(count)


def write(recipe: Recipe, output: Path, index: int, num_shards: int, is_first: bool) -> tuple[int, int]:
    """Writes one shard of a recipe's training text, and returns its numbers of tokens and documents."""
    tokenizer, config = load_recipe_tokenizer(recipe), config_with_notes(recipe)[0]
    patch_size = getattr(config, "patch_size", 1)
    documents, source = load_documents(recipe.data, "train")
    if recipe.data.train_files:  # names and sizes: paths and times differ between machines
        source = [[Path(path).name, size] for path, size, _ in source]
    texts = itertools.chain.from_iterable(part() for part in documents.share(index, num_shards))
    if is_first:  # its bar stands for all processes
        texts = progress_bar(texts, "Tokenising", "document")
    ending = document_ending(recipe.data, patch_size)
    manifest = token_manifest(recipe.data, tokenizer, patch_size, num_shards)
    manifest |= reading_manifest(recipe.data, source)
    shard = write_shard(output, manifest, index, lambda: tokenize_documents(texts, tokenizer, ending))
    return len(shard.ids), len(shard.bounds) - 1


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm tokenize", __doc__, epilog="Every field of the recipe can be given as --field value.")
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
    parser.add_argument("--output", required=True, type=Path, help="folder of the tokens")
    parser.add_argument("--num_proc", type=positive, default=1, help="processes, which write a shard each")
    parser.add_argument("--shard", type=shard_of, default=(0, 1), metavar="I/N", help="part i of n of the shards")
    options, fields = parser.parse_known_args(argv)
    with known_errors():
        recipe = load_recipe(options.recipe, parse_command_line(fields))
        if recipe.kind == "tokenizer":
            raise InputError(f"the recipe {options.recipe!r} trains a tokenizer: nothing to tokenise.")
        part, num_parts = options.shard
        num_proc = options.num_proc
        shards = range(part * num_proc, (part + 1) * num_proc)
        arguments = [(recipe, options.output, k, num_parts * num_proc, k == shards[0]) for k in shards]
        if num_proc == 1:
            written = [write(*arguments[0])]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes use the cores
            with ProcessPoolExecutor(num_proc, get_context("spawn")) as pool:
                written = list(pool.map(write, *zip(*arguments, strict=True)))
    tokens, documents = (sum(numbers) for numbers in zip(*written, strict=True))
    which = f"{num_proc} of {num_parts * num_proc} shards of {options.output}"
    print(f"{tokens:,} tokens of {documents:,} documents in {which}")


if __name__ == "__main__":
    sys.exit(main())
