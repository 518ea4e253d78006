"""Every figure that this project wants from a GPU, by one command of at most eight minutes.

    calm bench gpu --json gpu.json

- goldens: how far the outputs are from those recorded of the published implementation (golden.py), in float32 and
  bfloat16;
- demo: a text of the bundled model, in bfloat16;
- generation: tokens a second (medians) of each CALM at T = 1 and 0.5 and of its Transformer, batch 1, 8 and 32, in
  bfloat16, step by step as `generate` does it ("eager");
- training: a step of CALM-M and of Transformer-S, with its MFU (calm_transformers.benchmarks.training_step);
- compiled: the first pair again, each step one graph (`cache_implementation="static"` and a `compile_config`); the
  time to compile is not counted.

Parts come in this order. None begins when `--minutes` are over; those left out are named, and the same command with
the same file, on the same machine, goes on with them. The file is written after each part.

With `--device cpu`, small `--pairs` and `--backend aot_eager` it is a dry run.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
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
    random_model,
    random_prompts,
    shape_config,
    trained_model,
    write,
)
from calm_transformers.command_line import InputError, Parser, command, known_errors, positive, writable
from calm_transformers.evaluation.report import markdown, write_json
from calm_transformers.loading import is_calm, load_tokenizer
from calm_transformers.model.configuration_calm import CALMConfig

PAIRS = ["calm-m:transformer-s", "calm-l:transformer-m", "calm-xl:transformer-l"]
TEMPERATURES = (1.0, 0.5)
NUM_CANDIDATES = 200
PROMPT = "Once upon a time, there was a little girl named Lily."
GOLDEN_OUTPUTS = ["calm.hidden_states", "ae.mean", "ae.logits"]
KIND_COLUMNS = {
    "goldens": ["head", "dtype", *GOLDEN_OUTPUTS],
    "demo": ["text"],
    "generation": ["shape", "mode", "temperature", "batch_size", "tokens_per_second", "low", "high"],
    "training": ["shape", "batch_size", "block_size", "step_ms", "tokens_per_second", "mfu"],
}


def read_report(path: Path) -> dict[str, list[dict]]:
    """The parts that a file holds.

    Raises:
        InputError: it is no report.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is no report of this command: name another file.") from error


def tables(parts: dict[str, list[dict]]) -> Iterator[str]:
    for kind, columns in KIND_COLUMNS.items():
        rows = [row for name, rows in parts.items() if name.partition(" ")[0] == kind for row in rows]
        if rows:
            yield markdown(columns, ([_text(row[column]) for column in columns] for row in rows)) + "\n"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Models:
    """One model at a time on the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.name, self.model = "", None

    def get(self, name: str):
        if name != self.name:
            self.drop()
            self.name, self.model = name, random_model(shape_config(name), self.device, self.dtype)
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


def demo_text(device: torch.device, dtype: torch.dtype, length: int) -> list[dict]:
    model, tokenizer = trained_model("demo", device, dtype), load_tokenizer(DEMO_FOLDER)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]], device=device)
    torch.manual_seed(0)
    ids = write(model, ids, length, temperature=0.5, num_candidates=NUM_CANDIDATES)
    return [{"text": " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())}]


def generation_row(
    models: Models, shape: str, temperature: float, batch_size: int, options: argparse.Namespace, compiled: bool
):
    """Tokens a second of one model, one law and one batch size: the median of several calls, and their range."""
    model = models.get(shape)
    prompts = random_prompts(model, batch_size, options.prompt_length)
    settings: dict[str, Any] = {"temperature": temperature} | (
        {"num_candidates": NUM_CANDIDATES} if is_calm(model) else {"top_k": 0}
    )
    if compiled:
        mode: Any = "reduce-overhead" if options.backend == "inductor" else None
        settings["cache_implementation"] = "static"
        settings["compile_config"] = CompileConfig(backend=options.backend, mode=mode)
    seconds = []
    for repetition in range(1 + options.repetitions):  # the first compiles, and isn't counted
        torch.manual_seed(repetition)
        synchronise(models.device)
        start = time.perf_counter()
        write(model, prompts, options.output_length, **settings)
        synchronise(models.device)
        seconds.append(time.perf_counter() - start)
    speeds = [batch_size * options.output_length / each for each in seconds[1:]]
    return {
        **{"shape": shape, "mode": "compiled" if compiled else "eager", "temperature": temperature},
        **{"batch_size": batch_size, "prompt_length": options.prompt_length, "output_length": options.output_length},
        **{"num_candidates": NUM_CANDIDATES if is_calm(model) and temperature < 1 else 1},
        **{"tokens_per_second": median(speeds), "low": min(speeds), "high": max(speeds), "first_seconds": seconds[0]},
    }


def training_rows(shapes: list[str], options: argparse.Namespace) -> list[dict]:
    words = ["--shape", *shapes, "--device", options.device, "--dtype", options.dtype, "--block_size"]
    words += [str(options.block_size), "--batch_size", str(options.train_batch_size)]
    return training_step.measure(training_step.parse_options(words))["steps"]


def parts(options: argparse.Namespace, models: Models) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """Name, beginning with the kind, and work of each part, the most telling first."""
    pairs = [pair.split(":") for pair in options.pairs]
    yield "goldens", lambda: golden_rows(models.device)
    yield "demo", lambda: demo_text(models.device, models.dtype, options.output_length)
    for compiled in (False, True):
        mode = "compiled" if compiled else "eager"
        first_or_all = pairs[:1] if compiled else pairs
        shapes = [each for calm, llama in first_or_all for each in ((calm, TEMPERATURES), (llama, TEMPERATURES[:1]))]
        for shape, temperatures in shapes:
            for batch_size, T in product(options.batch_size, temperatures):
                work = partial(generation_row, models, shape, T, batch_size, options, compiled)
                yield f"generation {shape}, {mode}, T={T:g}, batch {batch_size}", lambda work=work: [work()]
        if not compiled:
            yield "training " + " ".join(pairs[0]), lambda: training_rows(pairs[0], options)


def check(options: argparse.Namespace) -> None:
    """Raises InputError for what can't be measured."""
    for pair in options.pairs:
        names = pair.split(":")
        is_pair = len(names) == 2 and [isinstance(shape_config(name), CALMConfig) for name in names] == [True, False]
        if not is_pair:
            raise InputError(f"--pairs {pair}: must be CALM:TRANSFORMER, as in {PAIRS[0]}.")
    training_step.check(argparse.Namespace(**vars(options) | {"shape": options.pairs[0].split(":"), "batch_size": 1}))


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm bench gpu", __doc__)
    parser.add_argument(
        "--json", type=writable, default=Path("gpu.json"), help="where the figures go, and are continued"
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no part begins")
    parser.add_argument(
        "--pairs", nargs="+", default=PAIRS, help="CALM:TRANSFORMER, recipes; the first is compiled, too"
    )
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt_length", type=positive, default=64)
    parser.add_argument("--output_length", type=positive, default=64)
    parser.add_argument("--block_size", type=positive, default=2048, help="tokens a row of a training step")
    parser.add_argument("--train_batch_size", type=positive, default=8, help="rows of a training step")
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
        done = read_report(options.json)
    models, failed, left_out = Models(device, getattr(torch, options.dtype)), [], []
    for name, work in parts(options, models):
        if name in done:
            continue
        if time.monotonic() - start > 60 * options.minutes:
            left_out.append(name)
            continue
        if not name.startswith("generation"):
            models.drop()
        try:
            done[name] = work()
        except Exception as error:  # one part's failure must not cost the others: the device is lent for minutes
            failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        write_json(options.json, {"machine": machine, "parts": done})
        print(f"{time.monotonic() - start:6.1f} s  {name}", flush=True)
    print("", *tables(done), sep="\n")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(*(f"left out, as the time was over: {name}" for name in left_out), sep="\n")
    if failed:
        raise InputError("; ".join(failed))


if __name__ == "__main__":
    sys.exit(main())
