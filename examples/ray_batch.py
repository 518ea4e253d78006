"""Continues a file of prompts on a Ray cluster with Ray Data; each worker batches its prompts continuously.

    python examples/ray_batch.py --input prompts.jsonl --output texts --workers 2

The input has a line {"prompt": …} for each text; without it, eight prompts are continued. The output is a folder of
.jsonl files. `calm generate MODEL --input … --output …` does it on one machine without Ray.
"""

import argparse
from pathlib import Path

import ray  # pyright: ignore[reportMissingImports]

from calm_transformers.loading import load_calm
from calm_transformers.serving.batcher import Batcher

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(Path(__file__).parents[1]), help="folder or Hub id of a CALM")
parser.add_argument("--input", help=".jsonl of prompts")
parser.add_argument("--output", default="texts", help="folder of the texts")
parser.add_argument("--workers", type=int, default=1, help="processes, each with a copy of the model")
parser.add_argument("--max_new_tokens", type=int, default=60)
args = parser.parse_args()


class Continue:
    """Loads the model once per worker, and adds a column `text` to each batch."""

    def __init__(self, model: str, max_new_tokens: int):
        self.batcher = Batcher(*load_calm(model, None), max_waiting=64)  # a GPU if there is one
        self.settings = {"max_new_tokens": max_new_tokens, "temperature": 0.5, "seed": 0}

    def __call__(self, batch: dict) -> dict:
        futures = [self.batcher.submit(prompt, **self.settings) for prompt in batch["prompt"]]
        return {**batch, "text": [future.result().text for future in futures]}


if args.input:
    prompts = ray.data.read_json(args.input, lines=True)
else:
    animals = ("cat", "dog", "bird", "fish", "frog", "bear", "duck", "mouse")
    prompts = ray.data.from_items([{"prompt": f"Once upon a time, there was a {animal}"} for animal in animals])

texts = prompts.map_batches(
    Continue,
    fn_constructor_args=[args.model, args.max_new_tokens],
    batch_size=64,
    concurrency=args.workers,
)
texts.write_json(args.output)
print(f"The texts are in {args.output}")
