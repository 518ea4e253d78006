"""Measures the speed of a training step.

    calm bench training --shape calm-m transformer-s --device cuda --dtype bfloat16 --compile \\
        --batch_size 8 --block_size 8192 --repetitions 5 --json figures.json

A step is forward, backward, clipping to norm 1 and AdamW on blocks of random tokens, with random float32 weights;
bfloat16 means autocast, as in the recipes. A shape is a recipe, `demo`, a folder or a Hub id; their steps are
interleaved. All times are medians, in ms.

- MFU: FLOPs of a step (as in `--dry_run`) ÷ time ÷ measured FLOPs per second of a large matmul.
- memory: weights, optimiser state, and the peak of the worst step beyond them.
"""

# B blocks per batch, L tokens per block

from __future__ import annotations

import argparse
import sys
from statistics import median

import torch
import transformers

from calm_transformers.benchmarks.meters import (
    Meter,
    PeakMemory,
    device_name,
    peak_flop_rate,
    synchronise,
    weight_bytes,
)
from calm_transformers.benchmarks.workloads import add_device_options, check_device, model_config, random_model
from calm_transformers.command_line import InputError, Parser, command, known_errors, positive, writable
from calm_transformers.evaluation.report import markdown, write_json
from calm_transformers.loading import is_calm
from calm_transformers.training.cost import ar_cost, calm_cost

WARM_UP_STEPS = 2  # the first creates the optimiser state, and compiles
COMPILE_BACKEND = "inductor"


class TrainingStep:
    """A model, its optimiser and one batch; each call runs and measures one step.

    Args:
        model_name: a recipe, `demo`, a folder or a Hub id.
        options: of the command line.
    """

    def __init__(self, model_name: str, options: argparse.Namespace):
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.model = random_model(model_config(model_name), self.device, torch.float32).train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trainable, lr=1e-5, fused=self.device.type == "cuda")
        generator = torch.Generator().manual_seed(0)
        B, L = options.batch_size, options.block_size
        self.ids_BL = torch.randint(self.model.config.vocab_size, (B, L), generator=generator).to(self.device)
        self.forward = torch.compile(self.model, backend=COMPILE_BACKEND) if options.compile else self.model
        self.clock = Meter.clock(self.device)
        self.seconds: list[float] = []
        self.extra_bytes: list[int | None] = []

    def __call__(self) -> None:
        with PeakMemory(self.device) as memory:
            synchronise(self.device)
            start = self.clock.read()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss = self.forward(input_ids=self.ids_BL, labels=self.ids_BL).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()
            end = self.clock.read()
        synchronise(self.device)
        self.extra_bytes.append(memory.extra)
        self.seconds.append(self.clock.difference(start, end))

    def results(self, flop_rate: float) -> dict:
        """Returns medians over the steps after the warm-up."""
        seconds, tokens = self.seconds[WARM_UP_STEPS:], self.ids_BL.numel()
        cost = (calm_cost if is_calm(self.model) else ar_cost)(self.model.config, self.ids_BL.shape[1])
        flops = tokens * sum(cost.train_flops.values())
        states = [tensor for state in self.optimiser.state.values() for tensor in state.values()]
        static_bytes = weight_bytes(self.model) + sum(tensor.numel() * tensor.element_size() for tensor in states)
        extra = [num_bytes for num_bytes in self.extra_bytes[WARM_UP_STEPS:] if num_bytes is not None]
        return {
            "step_ms": 1000 * median(seconds),
            "step_ms_range": [1000 * min(seconds), 1000 * max(seconds)],
            "tokens_per_second": tokens / median(seconds),
            "flops": flops,
            "mfu": flops / median(seconds) / flop_rate,
            "peak_memory_bytes": static_bytes + max(extra) if len(extra) == len(seconds) else None,
        }


COLUMNS = {
    "shape": "{shape}",
    "batch": "{batch_size} × {block_size}",
    "compile": "{compile}",
    "step ms": "{step_ms:.1f} ({low:.1f} – {high:.1f})",
    "tokens/s": "{tokens_per_second:.0f}",
    "MFU": "{mfu:.1%}",
    "memory GiB": "{memory}",
}


def table_row(row: dict) -> list[str]:
    memory = "–" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.2f}"
    low, high = row["step_ms_range"]
    return [column.format(**row, memory=memory, low=low, high=high) for column in COLUMNS.values()]


def measure(options: argparse.Namespace) -> dict:
    """Measures all models (`--shape`), prints a table, and returns the report that --json writes."""
    check(options)
    device = torch.device(options.device)
    flop_rate = peak_flop_rate(device, getattr(torch, options.dtype))
    steps = {name: TrainingStep(name, options) for name in options.shape}
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step()
    for _ in range(options.repetitions):
        for step in steps.values():
            step()
    settings = {option: getattr(options, option) for option in ("batch_size", "block_size", "compile", "repetitions")}
    rows = [{"shape": name, **settings, **step.results(flop_rate)} for name, step in steps.items()]
    report = {
        **{"device": options.device, "device_name": device_name(device), "threads": torch.get_num_threads()},
        **{"dtype": options.dtype, "flop_rate": flop_rate, "torch": torch.__version__},
        **{"transformers": transformers.__version__, "steps": rows},
    }
    print(markdown(list(COLUMNS), map(table_row, rows)))
    print(
        f"\n{report['device_name']}, {options.dtype}, {report['threads']} CPU threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {options.repetitions} repetitions; measured "
        f"{flop_rate / 1e9:.0f} GFLOP/s"
    )
    return report


def check(options: argparse.Namespace) -> None:
    """Checks that the device exists and that the block size suits every model; raises InputError otherwise."""
    check_device(options.device)
    for name in options.shape:
        K = getattr(model_config(name), "patch_size", 1)
        if options.block_size < 2 * K or options.block_size % K:
            raise InputError(f"--block_size {options.block_size}: {name} needs at least two patches of {K} tokens.")


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("calm bench training", __doc__)
    parser.add_argument("--shape", nargs="+", default=["calm-m"], help="calm-m, transformer-s, demo, or a model")
    add_device_options(parser, torch.cuda.is_available())
    parser.add_argument("--batch_size", type=positive, default=1, help="blocks per step")
    parser.add_argument("--block_size", type=positive, default=2048, help="tokens per block")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=writable, help="write the report")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    transformers.logging.set_verbosity_error()
    with known_errors(ValueError, OSError):
        report = measure(options)
    write_json(options.json, report)


if __name__ == "__main__":
    sys.exit(main())
