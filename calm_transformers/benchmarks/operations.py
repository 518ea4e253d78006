"""Counts the dispatched ops and host syncs of a generation step.

    calm bench operations --shape calm-m --baseline transformer-s --budget tests/operations_budget.json

Both counts are exact and independent of the machine, and dominate the cost of eager generation at small batches on a
GPU. A step generates one patch of one sequence, including the loop of `generate`, with an EOS token to check for and a
prompt without padding. The models have the layers of the shape and a tiny width, with candidates that never repeat.

- Dispatched ops: calls of PyTorch's dispatcher, views excluded.
- Host syncs: values or shapes that the host must know: `.item()`, `.tolist()`, `bool(…)`, `nonzero`, boolean masks as
  indices, and so on.
- Of the token chain those of a CPU, where beginnings of patches that several candidates share are found (`unique`).
- At T < 1 no candidate is accepted, so that the batch algorithm compares all N = 200 candidates in the end. They are
  sampled in one block, unless stated otherwise.
- Matmuls are PyTorch's own, without screening (`CALM_MATMUL_BACKEND=torch`).
- A step of the baseline generates K tokens; ÷ baseline: dispatched ops, relative to the baseline at T = 1.

`--budget` names a file of counts: the command fails if a count is higher, and updates those that are lower.
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

from calm_transformers.benchmarks.meters import Meter, MethodMeter
from calm_transformers.benchmarks.runs import Workload
from calm_transformers.benchmarks.workloads import generate_tokens, model_config, random_model, random_prompts
from calm_transformers.command_line import InputError, Parser, command, known_errors, writable
from calm_transformers.evaluation.report import markdown, write_json
from calm_transformers.model import generation_calm_samplers
from calm_transformers.model.configuration_calm import HEADS, CALMConfig
from calm_transformers.model.kernels_calm import SWITCH

SMALL = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 4096, "head_dim": 16}
SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
PROMPT_TOKENS = 16
NUM_CANDIDATES = 200
BASELINE = "baseline"
COUNTS = {"operations": "dispatched ops", "waits": "host syncs"}  # key in the budget → label
WARM_UP_STEPS = 3  # caches are filled
HOST_READS = (Tensor.tolist, Tensor.cpu, Tensor.numpy)


class _HostReadMode(TorchFunctionMode):
    """Counts calls of `HOST_READS`, which bypass the dispatcher on a CPU."""

    def __init__(self, counter: DispatchCounter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.counter.host_syncs += func in HOST_READS
        return func(*args, **(kwargs or {}))


class DispatchCounter(TorchDispatchMode):
    """Counts dispatched ops and host syncs in a `with` block."""

    def __init__(self):
        super().__init__()
        self.dispatched_ops = self.host_syncs = 0
        self._host_reads = _HostReadMode(self)

    def __enter__(self):
        self._host_reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._host_reads.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.dispatched_ops += not self._is_view(func)
        self.host_syncs += self._is_host_sync(func, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_view(func) -> bool:
        return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)

    @staticmethod
    def _is_host_sync(func, args) -> bool:
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


@dataclass(frozen=True)
class Case:
    """A generation setting whose step is counted."""

    name: str
    head: str | None  # head type; None is the baseline
    settings: dict[str, Any]  # arguments of `generate`
    blocks: int = 1  # number of blocks in which the N candidates are sampled


def cases(heads: list[str]) -> Iterator[Case]:
    yield Case(f"{BASELINE}, T = 1", None, {"temperature": 1.0, "top_k": 0})
    yield Case(f"{BASELINE}, T = 0.5", None, {"temperature": 0.5, "top_k": 0})
    for head in heads:
        yield Case(f"{head}, T = 1", head, {"temperature": 1.0, "lazy_decoding": False})
        eager = {"temperature": 0.5, "num_candidates": NUM_CANDIDATES, "lazy_decoding": False}
        for method in ("batch", "adaptive", "exact"):
            yield Case(f"{head}, T = 0.5, {method}", head, {**eager, "sampling_method": method})
        if HEADS[head].samples_tokens:
            yield Case(f"{head}, T = 0.5, rejection", head, {**eager, "sampling_method": "rejection"})
        eager["sampling_method"] = "adaptive"
        yield Case(f"{head}, T = 0.5, adaptive, two blocks", head, eager, blocks=2)
        yield Case(f"{head}, T = 0.4, adaptive", head, {**eager, "temperature": 0.4})
        yield Case(f"{head}, T = 0.5, adaptive, lazy", head, {**eager, "lazy_decoding": True})
        if not HEADS[head].samples_tokens:
            yield Case(f"{head}, T = 0.5, distilled", head, {**eager, "sampling_method": "distilled"})


def small_model(config: CALMConfig | LlamaConfig, head: str | None = None, is_distilled: bool = False):
    """Builds a model with the layers of a configuration and a tiny width."""
    fields: dict[str, Any] = config.to_dict() | SMALL | SMALL_HEADS
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"):
        fields.pop(name, None)
    if isinstance(config, CALMConfig):
        autoencoder = {k: v for k, v in fields["autoencoder_config"].items() if "token_id" not in k}
        sizes = {name: SMALL[name] for name in ("hidden_size", "intermediate_size", "vocab_size")}
        fields["autoencoder_config"] = autoencoder | sizes
        fields["head_type"] = head
        fields["distilled_temperature"] = 0.5 if is_distilled else None
    model = random_model(type(config)(**fields), torch.device("cpu"), torch.float32)
    eos = model.config.vocab_size  # checked for, but never sampled
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=eos)
    return model


def count_step(model, case: Case) -> dict:
    """Counts the ops and host syncs of one step (for the baseline, of one token), and the ops of its parts."""
    prompts = random_prompts(model, 1, PROMPT_TOKENS)
    workload = Workload(model, prompts, case.settings)

    def run(num_steps: int) -> tuple[DispatchCounter, MethodMeter]:
        torch.manual_seed(0)
        counter = DispatchCounter()
        ops = Meter(lambda: counter.dispatched_ops, lambda before, after: after - before)
        parts = MethodMeter(ops, workload.methods())
        with ExitStack() as stack:
            size = NUM_CANDIDATES // case.blocks
            for name in ("FIRST_BLOCK_SIZE", "TRIES_IN_A_BLOCK"):
                stack.enter_context(patch.object(generation_calm_samplers, name, size))
            stack.enter_context(parts.measured())
            # The faster matmul backend is measured, so it could differ between machines.
            stack.enter_context(patch.dict(os.environ, {SWITCH: "torch"}))
            stack.enter_context(counter)
            generate_tokens(model, prompts, num_steps * workload.tokens_per_step, **case.settings)
        return counter, parts

    run(WARM_UP_STEPS)  # only fills the caches
    # The counts of one step are the difference of two runs.
    (fewer, fewer_parts), (more, more_parts) = run(WARM_UP_STEPS), run(WARM_UP_STEPS + 1)
    return {
        "operations": more.dispatched_ops - fewer.dispatched_ops,
        "waits": more.host_syncs - fewer.host_syncs,
        **{part: round(sum(more_parts.spent(part)) - sum(fewer_parts.spent(part))) for part in workload.methods()},
    }


def count_all(shape: str, baseline: str, heads: list[str]) -> list[dict]:
    """Returns a row of counts for each case."""
    calm, llama = model_config(shape), model_config(baseline)
    if not isinstance(calm, CALMConfig):
        raise InputError(f"--shape {shape} is not a CALM.")
    if isinstance(llama, CALMConfig):
        raise InputError(f"--baseline {baseline} is a CALM: choose an autoregressive language model.")
    rows, models = [], {}  # only the latest model stays in memory
    for case in cases(heads):
        key = case.head, case.settings.get("sampling_method") == "distilled"
        if key not in models:
            models = {key: small_model(llama if case.head is None else calm, *key)}
        counts = count_step(models[key], case)
        if case.head is None:
            counts = {name: value * calm.patch_size for name, value in counts.items()}
        rows.append({"case": case.name, **counts})
    baseline_ops = rows[0]["operations"]
    return [{**row, "of_baseline": round(row["operations"] / baseline_ops, 3)} for row in rows]


def check_budget(rows: list[dict], budget: dict[str, dict[str, int]]) -> list[str]:
    """Returns a message for each count above its budget."""
    return [
        f"{row['case']}: {row[name]} {label} per step, the budget is {budget[row['case']][name]}"
        for row in rows
        for name, label in COUNTS.items()
        if row["case"] in budget and row[name] > budget[row["case"]][name]
    ]


def update_budget(rows: list[dict], path: Path) -> None:
    """Lowers the budget file to the counts, and adds new cases."""
    budget = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    messages = check_budget(rows, budget)
    if messages:
        raise InputError("; ".join(messages) + ".")
    calm_rows = [row for row in rows if not row["case"].startswith(BASELINE)]  # the baseline is upstream's code
    budget |= {row["case"]: {name: row[name] for name in COUNTS} for row in calm_rows}
    write_json(path, budget)


def format_table(rows: list[dict]) -> str:
    columns = ("case", "operations", "backbone", "head", "decode", "waits")
    lines = [[*(str(row.get(name, "–")) for name in columns), f"{row['of_baseline']:.3f}"] for row in rows]
    return markdown([*(COUNTS.get(name, name) for name in columns), "÷ baseline"], lines)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm bench operations", __doc__)
    parser.add_argument("--shape", default="calm-m", help="a CALM: calm-m, calm-l, calm-xl, or a model")
    parser.add_argument("--baseline", default="transformer-s", help="transformer-s, transformer-m, or a model")
    parser.add_argument("--head", nargs="+", choices=sorted(HEADS), default=["energy", "flow", "diffusion"])
    parser.add_argument("--budget", type=writable, help="a file of maximum counts, which are only ever lowered")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    with known_errors(ValueError, OSError):
        rows = count_all(options.shape, options.baseline, options.head)
    print(format_table(rows))
    if options.budget is not None:
        update_budget(rows, options.budget)


if __name__ == "__main__":
    sys.exit(main())
