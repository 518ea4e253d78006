"""Runs all GPU measurements of this project in at most eight minutes.

    calm bench gpu --json gpu.json

- goldens: errors relative to the outputs of the published implementation (golden.py), in float32 and bfloat16;
- demo: a text of the bundled model, in bfloat16;
- generation: median tokens per second of each CALM at T = 1 and 0.5 and of its Transformer, at batch sizes 1, 8 and
  32, in bfloat16, in eager mode;
- training: a training step of CALM-M and of Transformer-S, with its MFU (calm_transformers.benchmarks.training_step);
- compiled: generation of the first pair with compiled steps (`cache_implementation="static"` and a `compile_config`);
  compilation time is excluded.

Parts run in this order; none starts after `--minutes`. Skipped parts are listed, and the same command with the same
file on the same machine continues with them. The file is written after each part.

With `--device cpu`, small `--pairs` and `--backend aot_eager` it is a dry run.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import CompileConfig

from calm_transformers.benchmarks import training_step
from calm_transformers.benchmarks.golden import HEAD_TYPES, golden_errors
from calm_transformers.benchmarks.meters import device_name, synchronise
from calm_transformers.benchmarks.workloads import (
    DEMO_FOLDER,
    add_device_options,
    check_device,
    generate_tokens,
    model_config,
    random_model,
    random_prompts,
    trained_model,
)
from calm_transformers.command_line import InputError, Parser, command, known_errors, positive, writable
from calm_transformers.evaluation.report import markdown, write_json
from calm_transformers.loading import is_calm, load_tokenizer
from calm_transformers.model.configuration_calm import CALMConfig

PAIRS = ["calm-m:transformer-s", "calm-l:transformer-m", "calm-xl:transformer-l"]
TEMPERATURES = (1.0, 0.5)
NUM_CANDIDATES = 200
NUM_TRAINING_STEPS = 5
PROMPT = "Once upon a time, there was a little girl named Lily."
GOLDEN_OUTPUTS = ["calm.hidden_states", "ae.mean", "ae.logits"]
TABLE_COLUMNS = {
    "goldens": ["head", "dtype", *GOLDEN_OUTPUTS],
    "demo": ["text"],
    "generation": ["shape", "mode", "temperature", "batch_size", "tokens_per_second", "low", "high"],
    "training": ["recipe", "blocks", "block_size", "tokens_per_second", "mfu", "memory_gib"],
}


def read_report(path: Path) -> dict[str, list[dict]]:
    """Reads the finished parts from a report file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a report of this command: choose another file.") from error


def format_tables(parts: dict[str, list[dict]]) -> Iterator[str]:
    """Yields a Markdown table for each key of `TABLE_COLUMNS`, of the rows of all parts whose name starts with it."""
    for key, columns in TABLE_COLUMNS.items():
        rows = [row for name, rows in parts.items() if name.partition(" ")[0] == key for row in rows]
        if rows:
            yield markdown(columns, ([_format(row[column]) for column in columns] for row in rows)) + "\n"


def _format(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class ModelCache:
    """Keeps one random model at a time on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.name, self.model = "", None

    def get(self, name: str):
        if name != self.name:
            self.drop()
            self.name, self.model = name, random_model(model_config(name), self.device, self.dtype)
        return self.model

    def drop(self) -> None:
        self.name, self.model = "", None
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def golden_rows(device: torch.device) -> list[dict]:
    return [
        {"head": head_type, "dtype": str(dtype).removeprefix("torch."), **golden_errors(head_type, device, dtype)}
        for head_type in HEAD_TYPES
        for dtype in (torch.float32, torch.bfloat16)
    ]


def demo_rows(device: torch.device, dtype: torch.dtype, length: int) -> list[dict]:
    """Generates a text with the bundled model, and returns it as the only row."""
    model, tokenizer = trained_model("demo", device, dtype), load_tokenizer(DEMO_FOLDER)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]], device=device)
    torch.manual_seed(0)
    ids = generate_tokens(model, ids, length, temperature=0.5, num_candidates=NUM_CANDIDATES)
    return [{"text": " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())}]


def generation_row(
    models: ModelCache, shape: str, temperature: float, batch_size: int, options: argparse.Namespace, compiled: bool
) -> dict:
    """Measures tokens per second of one model, temperature and batch size: median and range of several calls."""
    model = models.get(shape)
    prompts = random_prompts(model, batch_size, options.prompt_length)
    own: dict[str, Any] = {"num_candidates": NUM_CANDIDATES} if is_calm(model) else {"top_k": 0}
    settings = {"temperature": temperature, **own}
    if compiled:
        mode: Any = "reduce-overhead" if options.backend == "inductor" else None
        settings["cache_implementation"] = "static"
        settings["compile_config"] = CompileConfig(backend=options.backend, mode=mode)
    seconds = []
    for repetition in range(1 + options.repetitions):  # the first warms up or compiles, and is excluded
        torch.manual_seed(repetition)
        synchronise(models.device)
        start = time.perf_counter()
        generate_tokens(model, prompts, options.output_length, **settings)
        synchronise(models.device)
        seconds.append(time.perf_counter() - start)
    speeds = [batch_size * options.output_length / call_seconds for call_seconds in seconds[1:]]
    return {
        **{"shape": shape, "mode": "compiled" if compiled else "eager", "temperature": temperature},
        **{"batch_size": batch_size, "prompt_length": options.prompt_length, "output_length": options.output_length},
        **{"num_candidates": NUM_CANDIDATES if is_calm(model) and temperature < 1 else 1},
        **{"tokens_per_second": median(speeds), "low": min(speeds), "high": max(speeds), "first_seconds": seconds[0]},
    }


def training_rows(recipes: list[str], options: argparse.Namespace) -> list[dict]:
    fields = {"block_size": options.block_size, "per_device_train_batch_size": options.train_batch_size}
    fields |= {"bf16": options.dtype == "bfloat16", "gradient_accumulation_steps": 1}
    rows = []
    for name in recipes:
        with tempfile.TemporaryDirectory(prefix="calm-training-") as folder:
            rows.append(training_step.measure(name, fields, NUM_TRAINING_STEPS, Path(folder)))
    return rows


def parts(options: argparse.Namespace, models: ModelCache) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """Yields the name of each part, which starts with its table's key, and a function that measures its rows."""
    pairs = [pair.split(":") for pair in options.pairs]
    yield "goldens", lambda: golden_rows(models.device)
    yield "demo", lambda: demo_rows(models.device, models.dtype, options.output_length)
    for compiled in (False, True):
        mode = "compiled" if compiled else "eager"
        for calm, llama in pairs[:1] if compiled else pairs:
            for shape, temperatures in ((calm, TEMPERATURES), (llama, TEMPERATURES[:1])):
                for batch_size, T in product(options.batch_size, temperatures):
                    measure = partial(generation_row, models, shape, T, batch_size, options, compiled=compiled)
                    name = f"generation {shape}, {mode}, T={T:g}, batch {batch_size}"
                    yield name, lambda measure=measure: [measure()]
        if not compiled:
            yield "training " + " ".join(pairs[0]), lambda: training_rows(pairs[0], options)


def check(options: argparse.Namespace) -> None:
    """Checks the device and the pairs; raises InputError."""
    check_device(options.device)
    for pair in options.pairs:
        names = pair.split(":")
        is_pair = len(names) == 2 and [isinstance(model_config(name), CALMConfig) for name in names] == [True, False]
        if not is_pair:
            raise InputError(f"--pairs {pair}: must be CALM:TRANSFORMER, as in {PAIRS[0]}.")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm bench gpu", __doc__)
    parser.add_argument("--json", type=writable, default=Path("gpu.json"), help="report file, continued if it exists")
    parser.add_argument("--minutes", type=float, default=7.0, help="no part starts later than this")
    pairs_help = "recipes CALM:TRANSFORMER; the first pair also runs compiled"
    parser.add_argument("--pairs", nargs="+", default=PAIRS, help=pairs_help)
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt_length", type=positive, default=64)
    parser.add_argument("--output_length", type=positive, default=64)
    parser.add_argument("--block_size", type=positive, default=2048, help="tokens per sequence of a training step")
    parser.add_argument("--train_batch_size", type=positive, default=8, help="sequences per training step")
    add_device_options(parser, gpu=True)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options, start = parser.parse_args(argv), time.monotonic()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with known_errors(ValueError, OSError):
        check(options)
        device = torch.device(options.device)
        machine = {"device": device_name(device), "dtype": options.dtype, "torch": torch.__version__}
        machine["transformers"] = transformers.__version__
        finished = read_report(options.json)
    models, failed, skipped = ModelCache(device, getattr(torch, options.dtype)), [], []
    for name, measure in parts(options, models):
        if name in finished:
            continue
        if time.monotonic() - start > 60 * options.minutes:
            skipped.append(name)
            continue
        if not name.startswith("generation"):
            models.drop()  # the other parts load their own
        try:
            finished[name] = measure()
        except Exception as error:  # the other parts must still run: GPU time is scarce
            failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        write_json(options.json, {"machine": machine, "parts": finished})
        print(f"{time.monotonic() - start:6.1f} s  {name}", flush=True)
    print("", *format_tables(finished), sep="\n")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(*(f"skipped, out of time: {name}" for name in skipped), sep="\n")
    if failed:
        raise InputError("; ".join(failed))


if __name__ == "__main__":
    sys.exit(main())
