"""Measures the speed of a recipe's training, by the log of a few steps of it.

    calm bench training --recipe calm-m transformer-s --bf16 true --torch_compile true --per_device_train_batch_size 8

Weights and tokens are random; everything else is the recipe's, and every field of it can be given as --field value.
The columns are those of the log (see `Speed` in training/speed.py); the first step doesn't count.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from calm_transformers.benchmarks.meters import device_name
from calm_transformers.benchmarks.workloads import word_tokenizer
from calm_transformers.command_line import Parser, command, known_errors, positive, writable
from calm_transformers.evaluation.report import markdown, write_json
from calm_transformers.model.configuration_calm import CALMAutoencoderConfig
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder
from calm_transformers.training.data import token_manifest, write_shard
from calm_transformers.training.recipe import load_recipe, parse_command_line
from calm_transformers.training.train import prepare_training

COLUMNS = ("tokens_per_second", "mfu", "memory_gib", "data_wait", "tokens_per_cpu_second")
NUM_TOKENS = 2**22


def measure(name: str, fields: dict, num_steps: int, folder: Path) -> dict:
    """Trains a recipe for a few steps in `folder`, and returns its row."""
    recipe = load_recipe(name, fields)
    autoencoder = load_recipe("autoencoder").model if recipe.kind == "calm" else {}
    vocab_size = recipe.model.get("vocab_size") or autoencoder.get("vocab_size") or CALMAutoencoderConfig().vocab_size
    tokenizer = word_tokenizer(vocab_size, bos_token="w0", eos_token="w1", pad_token="w2")
    tokenizer.save_pretrained(folder / "tokenizer")
    own = {"tokenizer": str(folder / "tokenizer"), "train_files": str(folder / "tokens"), "left_fill": 0.0}
    own |= {"output_dir": str(folder / "run"), "save_strategy": "no", "eval_strategy": "no"}
    own |= {"max_steps": 1 + num_steps, "logging_steps": 1 + num_steps}
    if recipe.kind == "calm":
        sizes: dict = {field: recipe.model[field] for field in ("patch_size", "latent_size") if field in recipe.model}
        config = CALMAutoencoderConfig(**{**autoencoder, **sizes, "vocab_size": vocab_size})
        CALMAutoencoder(config).save_pretrained(folder / "autoencoder")
        own["autoencoder"] = str(folder / "autoencoder")
    recipe = load_recipe(name, fields | own)
    patch_size = recipe.model.get("patch_size", CALMAutoencoderConfig().patch_size)
    manifest = token_manifest(recipe.data, tokenizer, patch_size)
    ids = np.random.default_rng(0).integers(vocab_size, size=NUM_TOKENS)
    write_shard(folder / "tokens", manifest, 0, lambda: [ids])
    trainer = prepare_training(recipe).trainer
    trainer.train()
    [row] = [entry for entry in trainer.state.log_history if "tokens_per_second" in entry]
    args = trainer.args
    blocks = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings = {"recipe": name, "blocks": blocks, "block_size": recipe.data.block_size}
    return settings | {column: row.get(column) for column in COLUMNS}


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm bench training", __doc__, epilog="Every field of the recipes can be given as --field value.")
    parser.add_argument("--recipe", nargs="+", default=["calm-m"], help="names of recipes, or .yaml files")
    parser.add_argument("--num_steps", type=positive, default=5, help="that are measured, after the first")
    parser.add_argument("--json", type=writable, help="write the rows")
    options, fields = parser.parse_known_args(argv)
    rows = []
    for name in options.recipe:
        with known_errors(ValueError, OSError), tempfile.TemporaryDirectory(prefix="calm-training-") as folder:
            rows.append(measure(name, parse_command_line(fields), options.num_steps, Path(folder)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(markdown(list(rows[0]), [["–" if value is None else str(value) for value in row.values()] for row in rows]))
    print(f"\n{device_name(device)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    write_json(options.json, rows)


if __name__ == "__main__":
    sys.exit(main())
