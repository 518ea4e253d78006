"""How many tensor operations a step of generation dispatches, and how often it waits for the device.

    calm bench operations --shape calm-m --baseline transformer-s --budget tests/operations_budget.json

Both are exact, the same on every machine, and what eager generation at small batches on a GPU costs. A step is one
patch of one row, from `generate`'s loop down, with an EOS token to look for and a prompt without padding. The models
are tiny, with the layers of the shape: sizes don't matter, but that no candidate may come twice.

- An operation is what PyTorch's dispatcher is called for, views left out.
- A wait is a value or a shape that the host must know to go on: `.item()`, `.tolist()`, `bool(…)`, `nonzero`, a mask
  as an index, and so on.
- At T < 1 no candidate is accepted, so that the whole pool of N = 200 is told apart in the end. It is drawn in one
  block, where not said otherwise.
- Products are PyTorch's own, and nothing is screened (`CALM_PRODUCTS=plain`).
- The baseline writes the K tokens of a step; ÷ baseline: operations, of its own at T = 1.

`--budget` names a file of figures: the command fails where one is now higher, and lowers those that fell.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaConfig
from transformers.utils import logging

from calm_transformers.benchmarks.meters import Meter, Parts, wrapped
from calm_transformers.benchmarks.runs import Subject
from calm_transformers.benchmarks.workloads import random_model, random_prompts, shape_config, write
from calm_transformers.command_line import InputError, Parser, command, known_errors, writable
from calm_transformers.evaluation.report import markdown, write_json
from calm_transformers.model.configuration_calm import HEADS, CALMConfig
from calm_transformers.model.generation_calm_samplers import BlockSchedule
from calm_transformers.model.kernels_calm import SWITCH

SMALL = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 4096, "head_dim": 16}
SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
PROMPT_TOKENS = 16
NUM_CANDIDATES = 200
BASELINE = "baseline"
SETTLED_STEPS = 3  # the plan of blocks is then what it stays, and the models are warm
READS = (Tensor.tolist, Tensor.cpu, Tensor.numpy)


class _Reads(TorchFunctionMode):
    """Sees what on a CPU passes no dispatcher."""

    def __init__(self, counter: OperationCounter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.counter.waits += func in READS
        return func(*args, **(kwargs or {}))


class OperationCounter(TorchDispatchMode):
    """Counts operations and waits in a `with` block."""

    def __init__(self):
        super().__init__()
        self.operations = self.waits = 0
        self._reads = _Reads(self)

    def __enter__(self):
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += not self._is_view(func)
        self.waits += self._is_wait(func, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_view(func) -> bool:
        return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)

    @staticmethod
    def _is_wait(func, args) -> bool:
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


@dataclass(frozen=True)
class Case:
    """A way of writing whose steps are counted.

    Args:
        name: in the table.
        head: type of the head; None is the baseline.
        settings: arguments of `generate`.
        blocks: in which the N candidates are drawn.
    """

    name: str
    head: str | None
    settings: dict[str, Any]
    blocks: int = 1


class FixedBlocks(BlockSchedule):
    """Begins with a block of the same size, whatever the steps before needed."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def first_block(self, *_) -> int:
        return self.size


def cases(heads: list[str]) -> Iterator[Case]:
    yield Case(f"{BASELINE}, T = 1", None, {"temperature": 1.0, "top_k": 0})
    yield Case(f"{BASELINE}, T = 0.5", None, {"temperature": 0.5, "top_k": 0})
    for head in heads:
        yield Case(f"{head}, T = 1", head, {"temperature": 1.0, "lazy_decoding": False})
        plain = {"temperature": 0.5, "num_candidates": NUM_CANDIDATES, "lazy_decoding": False}
        for method in ("batch", "adaptive", "exact"):
            yield Case(f"{head}, T = 0.5, {method}", head, {**plain, "sampling_method": method})
        yield Case(f"{head}, T = 0.5, adaptive, two blocks", head, plain, blocks=2)
        yield Case(f"{head}, T = 0.4, adaptive", head, {**plain, "temperature": 0.4})
        yield Case(f"{head}, T = 0.5, adaptive, lazy", head, {**plain, "lazy_decoding": True})


def small_model(config: CALMConfig | LlamaConfig, head: str | None = None):
    """A model with the layers of a configuration, and next to no width."""
    fields: dict[str, Any] = config.to_dict() | SMALL | SMALL_HEADS
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"):
        fields.pop(name, None)
    if isinstance(config, CALMConfig):
        autoencoder = fields["autoencoder_config"]
        fields["autoencoder_config"] = {k: v for k, v in autoencoder.items() if "token_id" not in k} | {
            name: SMALL[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
        }
        fields["head_type"] = head
    model = random_model(type(config)(**fields), torch.device("cpu"), torch.float32)
    end = model.config.vocab_size  # a token that never comes, but is looked for
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=end)
    return model


def count(model, case: Case) -> dict:
    """Operations and waits of one step (of K tokens, of the baseline), and the operations of its parts."""
    prompts = random_prompts(model, 1, PROMPT_TOKENS)
    subject, step = Subject(model, prompts, case.settings), model.config.to_dict().get("patch_size", 1)

    def counted(num_steps: int) -> tuple[OperationCounter, Parts]:
        torch.manual_seed(0)
        counter = OperationCounter()
        parts = Parts(Meter(lambda: counter.operations, lambda before, after: after - before), subject.methods())
        with ExitStack() as stack:
            if case.head is not None:
                plan = FixedBlocks(NUM_CANDIDATES // case.blocks)
                stack.enter_context(wrapped(model, "sample_patches", lambda method: _with_plan(method, plan)))
            stack.enter_context(parts.measured())
            # What is faster is measured, and so could be another way on another machine.
            stack.enter_context(patch.dict(os.environ, {SWITCH: "plain"}))
            stack.enter_context(counter)
            write(model, prompts, num_steps * step, **case.settings)
        return counter, parts

    counted(SETTLED_STEPS)
    (fewer, fewer_parts), (more, more_parts) = counted(SETTLED_STEPS), counted(SETTLED_STEPS + 1)
    parts = {p: round(sum(more_parts.calls(p)) - sum(fewer_parts.calls(p))) for p in subject.methods()}
    return {"operations": more.operations - fewer.operations, "waits": more.waits - fewer.waits, **parts}


def _with_plan(sample_patches, plan: BlockSchedule):
    def call(hidden_RD, sampling, generator, forbidden_KV, _, *others):
        return sample_patches(hidden_RD, sampling, generator, forbidden_KV, plan, *others)

    return call


def count_all(shape: str, baseline: str, heads: list[str]) -> list[dict]:
    """A row for each case, in order.

    Raises:
        InputError: a shape is no CALM, or a baseline one.
    """
    calm, llama = shape_config(shape), shape_config(baseline)
    if not isinstance(calm, CALMConfig):
        raise InputError(f"--shape {shape} is no CALM.")
    if isinstance(llama, CALMConfig):
        raise InputError(f"--baseline {baseline} is a CALM: name an ordinary language model.")
    rows, models = [], {}
    for case in cases(heads):
        if case.head not in models:
            models = {case.head: small_model(llama if case.head is None else calm, case.head)}
        figures = count(models[case.head], case)
        if case.head is None:
            figures = {name: value * calm.patch_size for name, value in figures.items()}
        rows.append({"case": case.name, **figures})
    of_tokens = rows[0]["operations"]
    return [{**row, "of_baseline": round(row["operations"] / of_tokens, 3)} for row in rows]


# budget


def check_budget(rows: list[dict], budget: dict[str, dict[str, int]]) -> list[str]:
    """What is above its budget, in sentences."""
    return [
        f"{row['case']}: {row[name]} {name} a step, the budget is {budget[row['case']][name]}"
        for row in rows
        for name in ("operations", "waits")
        if row["case"] in budget and row[name] > budget[row["case"]][name]
    ]


def update_budget(rows: list[dict], path: Path) -> None:
    """
    Raises:
        InputError: a figure is above its budget, which then stays as it is.
    """
    budget = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    above = check_budget(rows, budget)
    if above:
        raise InputError("; ".join(above) + ".")
    own = [row for row in rows if not row["case"].startswith(BASELINE)]  # upstream's is no matter of ours
    budget |= {row["case"]: {name: row[name] for name in ("operations", "waits")} for row in own}
    write_json(path, budget)


def table(rows: list[dict]) -> str:
    parts = ("backbone", "head", "decode")
    columns = ("case", "operations", *parts, "waits")
    lines = [[*(str(row.get(name, "–")) for name in columns), f"{row['of_baseline']:.3f}"] for row in rows]
    return markdown([*columns, "÷ baseline"], lines)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm bench operations", __doc__)
    parser.add_argument("--shape", default="calm-m", help="a CALM: calm-m, calm-l, calm-xl, or a model")
    parser.add_argument("--baseline", default="transformer-s", help="transformer-s, transformer-m, or a model")
    parser.add_argument("--head", nargs="+", choices=sorted(HEADS), default=["energy", "flow", "diffusion"])
    parser.add_argument("--budget", type=writable, help="a file of figures that can only fall")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    with known_errors(ValueError, OSError):
        rows = count_all(options.shape, options.baseline, options.head)
    print(table(rows))
    if options.budget is not None:
        update_budget(rows, options.budget)


if __name__ == "__main__":
    sys.exit(main())
