"""Measures how fast one process gets its batches: from tokens, from a stream, and how fast it tokenises.

    calm bench data --recipe calm-m --train_files text/ --tokenizer DIR

The last column is how much of the tokens that the recipe's model takes on an H100, at 40 % of its peak in 16 bits.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path

from torch.utils.data import DataLoader

from calm_transformers.command_line import Parser, command, known_errors, positive
from calm_transformers.documents import load_documents, tokenize_documents
from calm_transformers.evaluation.report import markdown
from calm_transformers.training.cost import recipe_cost
from calm_transformers.training.data import (
    PackedBlocks,
    PatchCollator,
    StreamedBlocks,
    Tokens,
    document_ending,
    token_manifest,
    write_shard,
)
from calm_transformers.training.recipe import Recipe, load_recipe, parse_command_line
from calm_transformers.training.speed import PEAK_TFLOPS
from calm_transformers.training.tokenizer import filler_token_id
from calm_transformers.training.train import config_with_notes, load_recipe_tokenizer

MFU = 0.4


def tokens_per_second(batches: Iterable, count: Callable, num_tokens: int) -> float:
    """Iterates until there are `num_tokens` of them."""
    seen, start = 0, time.perf_counter()
    for batch in batches:
        seen += count(batch)
        if seen >= num_tokens:
            break
    return seen / (time.perf_counter() - start)


def measure(recipe: Recipe, num_tokens: int, folder: Path) -> dict[str, float]:
    """Returns the tokens per second of each way."""
    tokenizer, config = load_recipe_tokenizer(recipe), config_with_notes(recipe)[0]
    data, patch_size = recipe.data, getattr(config, "patch_size", 1)
    documents, _ = load_documents(data, "train")
    tokenize = partial(tokenize_documents, tokenizer=tokenizer, ending=document_ending(data, patch_size))
    results = {"tokenised": tokens_per_second(tokenize(documents), len, num_tokens)}
    texts = islice(documents, 2000)
    shard = write_shard(folder, token_manifest(data, tokenizer, patch_size), 0, lambda: tokenize(texts))
    options = {"block_size": data.block_size, "patch_size": patch_size, "left_fill": data.left_fill, "seed": 0}
    options |= {"filler_token_id": filler_token_id(tokenizer), "random_phase": data.random_phase}
    num_blocks = num_tokens // data.block_size + 100
    datasets = {
        "from a folder of tokens": PackedBlocks(Tokens([shard]), num_blocks=num_blocks, **options),
        "from a stream of text": StreamedBlocks(documents, tokenize, **options),
    }
    loader_options = {
        "batch_size": recipe.training.get("per_device_train_batch_size", 8),
        "num_workers": recipe.training.get("dataloader_num_workers", 0),
        "collate_fn": PatchCollator(patch_size),
    }
    for name, dataset in datasets.items():
        batches = DataLoader(dataset, **loader_options)
        results[name] = tokens_per_second(batches, lambda batch: batch["input_ids"].numel(), num_tokens)
    return results


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm bench data", __doc__, epilog="Every field of the recipe can be given as --field value.")
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
    parser.add_argument("--num_tokens", type=positive, default=2_000_000, help="of each way")
    options, fields = parser.parse_known_args(argv)
    with known_errors(), tempfile.TemporaryDirectory(prefix="calm-data-") as folder:
        recipe = load_recipe(options.recipe, parse_command_line(fields))
        needed = MFU * 1e12 * PEAK_TFLOPS["H100"] / sum(recipe_cost(recipe).train_flops.values())
        results = measure(recipe, options.num_tokens, Path(folder) / "tokens")
    rows = [[name, f"{speed:,.0f}", f"{speed / needed:.2f}"] for name, speed in results.items()]
    print(markdown(["batches", "tokens/s", f"of {needed:,.0f}"], rows))


if __name__ == "__main__":
    sys.exit(main())
