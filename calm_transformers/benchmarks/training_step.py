"""Speed of a training step by part.

    calm bench training --shape calm-m transformer-s --device cuda --dtype bfloat16 --compile \\
        --batch_size 8 --block_size 8192 --repetitions 5 --json figures.json

A step is loss, gradients, clipping to norm 1 and AdamW on rows of random tokens, with random weights in float32;
bfloat16 means autocast, as in the recipes. A shape is a recipe, `demo`, a folder or a Hub id; the shapes take turns.
All times are medians, in ms.

- autoencoder: encoding the targets. backbone: patch embedding and layers. head: the net that draws the samples (the
  output matrix of an ordinary model). loss: the rest of the forward pass: posterior draws and score.
- The backward pass is told apart by when gradients arrive: that of the head's output ends the loss's part, that of the
  backbone's output the head's. The frozen autoencoder has none.
- optimiser: clipping and AdamW; the gradients are set to None.
- MFU: FLOPs of a step by the formula of `--dry_run` ÷ time ÷ the measured rate of a large matrix product.
- memory: weights, optimiser state and what the worst step needed beyond them.
- --compile: backbone, head and encoder are compiled each by itself, so that they can be told apart.
"""

# B rows, L tokens of a row

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median

import torch
import transformers
from torch import Tensor

from calm_transformers.benchmarks.meters import (
    Meter,
    Parts,
    PeakMemory,
    device_name,
    flop_rate,
    synchronise,
    weight_bytes,
    wrapped,
)
from calm_transformers.benchmarks.workloads import random_model, shape_config
from calm_transformers.command_line import InputError, Parser, command, known_errors, positive, writable
from calm_transformers.evaluation.report import markdown, write_json
from calm_transformers.loading import is_calm
from calm_transformers.training.cost import ar_cost, calm_cost

PARTS = (
    *("autoencoder", "backbone_forward", "head_forward", "loss_forward"),
    *("loss_backward", "head_backward", "backbone_backward", "optimiser"),
)
WARM_UP_STEPS = 2  # the first makes the optimiser's state, and compiles
COMPILE_BACKEND = "inductor"


class TrainingStep:
    """A model, its optimiser and one batch; call it to make a step.

    Args:
        shape: name of the model's shape.
        options: of the command line.
    """

    def __init__(self, shape: str, options: argparse.Namespace):
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.model = random_model(shape_config(shape), self.device, torch.float32).train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trainable, lr=1e-5, fused=self.device.type == "cuda")
        generator = torch.Generator().manual_seed(0)
        size = (options.batch_size, options.block_size)
        self.ids_BL = torch.randint(self.model.config.vocab_size, size, generator=generator).to(self.device)
        if options.compile:
            for owner, name in self.methods().values():
                setattr(owner, name, torch.compile(getattr(owner, name), backend=COMPILE_BACKEND))
        self.clock = Meter.clock(self.device)
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self.extra_bytes: list[int | None] = []

    def methods(self) -> dict[str, tuple[object, str]]:
        """Part of the forward pass → the method that does it."""
        model = self.model
        if not is_calm(model):
            return {"backbone": (model.model, "forward"), "head": (model.lm_head, "forward")}
        head = (model.head.net, "forward") if hasattr(model.head, "net") else (model.head, "draw")
        return {
            "autoencoder": (model.autoencoder.encoder, "forward"),
            "backbone": (model.model, "forward"),
            "head": head,
        }

    def __call__(self) -> None:
        """One step, its readings added to `seconds` and `extra_bytes`."""
        marks, methods = {}, self.methods()
        parts = Parts(self.clock, methods)
        with ExitStack() as stack, PeakMemory(self.device) as memory:
            stack.enter_context(parts.measured())
            for part in ("backbone", "head"):
                mark = functools.partial(self._mark_gradient, marks, part)
                stack.enter_context(wrapped(*methods[part], mark))
            self._step(marks)
        synchronise(self.device)
        self.extra_bytes.append(memory.extra)
        self._book(parts, marks)

    def _step(self, marks: dict[str, object]) -> None:
        synchronise(self.device)
        marks["start"] = self.clock.read()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.model(input_ids=self.ids_BL, labels=self.ids_BL).loss
        marks["forward"] = self.clock.read()
        loss.backward()
        marks["backward"] = self.clock.read()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        marks["end"] = self.clock.read()

    def _mark_gradient(self, marks: dict[str, object], part: str, method: Callable) -> Callable:
        """Notes when the gradient of the method's output arrives."""

        @functools.wraps(method)
        def call(*args, **kwargs):
            output = method(*args, **kwargs)
            tensor = output if isinstance(output, Tensor) else output.last_hidden_state
            tensor.register_hook(lambda _: marks.__setitem__(part, self.clock.read()))
            return output

        return call

    def _book(self, parts: Parts, marks: dict[str, object]) -> None:
        forward = {part: sum(parts.calls(part)) for part in ("autoencoder", "backbone", "head")}
        values = {
            "autoencoder": forward["autoencoder"],
            "backbone_forward": forward["backbone"],
            "head_forward": forward["head"],
            "loss_forward": self.clock.difference(marks["start"], marks["forward"]) - sum(forward.values()),
            "loss_backward": self.clock.difference(marks["forward"], marks["head"]),
            "head_backward": self.clock.difference(marks["head"], marks["backbone"]),
            "backbone_backward": self.clock.difference(marks["backbone"], marks["backward"]),
            "optimiser": self.clock.difference(marks["backward"], marks["end"]),
        }
        for part, value in values.items():
            self.seconds[part].append(value)

    def forget(self) -> None:
        """The readings of the steps so far."""
        self.seconds = {part: [] for part in PARTS}
        self.extra_bytes = []

    def figures(self, flop_rate: float) -> dict:
        """Medians over the steps since `forget`."""
        steps = [sum(values) for values in zip(*self.seconds.values(), strict=True)]
        seconds, tokens = median(steps), self.ids_BL.numel()
        cost = (calm_cost if is_calm(self.model) else ar_cost)(self.model.config, self.ids_BL.shape[1])
        flops = tokens * sum(cost.train_flops.values())
        state = [value for values in self.optimiser.state.values() for value in values.values()]
        extra = [num_bytes for num_bytes in self.extra_bytes if num_bytes is not None]
        known = weight_bytes(self.model) + sum(s.numel() * s.element_size() for s in state)
        return {
            "step_ms": 1000 * seconds,
            "step_ms_range": [1000 * min(steps), 1000 * max(steps)],
            **{f"{part}_ms": 1000 * median(values) for part, values in self.seconds.items()},
            "tokens_per_second": tokens / seconds,
            "flops": flops,
            "mfu": flops / seconds / flop_rate,
            "peak_memory_bytes": known + max(extra) if len(extra) == len(self.extra_bytes) else None,
        }


# the command


COLUMNS = {
    "shape": "{shape}",
    "batch": "{batch_size} × {block_size}",
    "compile": "{compile}",
    "step ms": "{step_ms:.1f} ({low:.1f} – {high:.1f})",
    **{part.replace("_", " "): f"{{{part}_ms:.1f}}" for part in PARTS},
    "tokens/s": "{tokens_per_second:.0f}",
    "MFU": "{mfu:.1%}",
    "memory GiB": "{memory}",
}


def table_row(row: dict) -> list[str]:
    memory = "–" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.2f}"
    low, high = row["step_ms_range"]
    return [column.format(**row, memory=memory, low=low, high=high) for column in COLUMNS.values()]


def measure(options: argparse.Namespace) -> dict:
    """Everything that the options ask for, as --json writes it; prints tables."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    check(options)
    rate = flop_rate(device, dtype)
    settings = {name: getattr(options, name) for name in ("batch_size", "block_size", "compile", "repetitions")}
    report = {
        **{"device": options.device, "device_name": device_name(device), "threads": torch.get_num_threads()},
        **{"dtype": options.dtype, "flop_rate": rate},
        **{"torch": torch.__version__, "transformers": transformers.__version__, "steps": []},
    }
    steps = {shape: TrainingStep(shape, options) for shape in options.shape}
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step()
        step.forget()
    for _ in range(options.repetitions):
        for step in steps.values():
            step()
    report["steps"] = [{"shape": shape, **settings, **step.figures(rate)} for shape, step in steps.items()]
    print(markdown(list(COLUMNS), map(table_row, report["steps"])))
    print(
        f"\n{report['device_name']}, {options.dtype}, {report['threads']} CPU threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {options.repetitions} repetitions; measured "
        f"{rate / 1e9:.0f} GFLOP/s"
    )
    return report


def check(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here; use --device cpu.")
    for shape in options.shape:
        K = getattr(shape_config(shape), "patch_size", 1)
        if options.block_size < 2 * K or options.block_size % K:
            raise InputError(f"--block_size {options.block_size}: {shape} needs at least two patches of {K} tokens.")


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = Parser("calm bench training", __doc__)
    parser.add_argument("--shape", nargs="+", default=["calm-m"], help="calm-m, transformer-s, demo, or a model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--batch_size", type=positive, default=1, help="rows a step")
    parser.add_argument("--block_size", type=positive, default=2048, help="tokens a row")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repetitions", type=positive, default=3)
    parser.add_argument("--json", type=writable, help="write the figures")
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
