"""Timed, interleaved generation of two models, with the time per step split into parts.

Axes: B batch, L prompt tokens, R rows that sample, K tokens per patch, N candidates, Z latent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from statistics import fmean, median
from unittest import mock

import torch
from transformers import PreTrainedModel

from calm_transformers.benchmarks.meters import Meter, MethodMeter, PeakMemory, synchronise, weight_bytes
from calm_transformers.benchmarks.workloads import Replay, generate_tokens
from calm_transformers.loading import is_calm
from calm_transformers.model.generation_calm_candidates import LazyCandidateBatch
from calm_transformers.model.kernels_calm import OneDNNLinear, one_dnn_is_faster

PARTS = ("backbone", "head", "decode", "selection", "other")
WARM_UP_STEPS = 2


@dataclass
class Workload:
    """A model, its prompts, and how to generate from them."""

    model: PreTrainedModel  # a CALM or an autoregressive model
    prompts_BL: torch.Tensor
    settings: dict  # arguments of `generate`
    replay: Replay | None = None  # candidates to replay on a CALM
    matmul_backend: Callable[[], AbstractContextManager] = nullcontext  # see `calm_matmul_backend`

    def num_steps(self, length: int) -> int:
        return -(-length // self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        return self.model.config.patch_size if is_calm(self.model) else 1

    def methods(self) -> dict[str, tuple[object, str] | list[tuple[object, str]]]:
        """Returns part → method to time; "choice" includes head, decode and selection."""
        if not is_calm(self.model):
            return {"backbone": (self.model, "forward")}
        return {
            "backbone": (self.model.model, "forward"),
            "head": [(self.model.head, "sample"), (self.model.head, "propose")],
            "decode": [(self.model.autoencoder, "decode_tokens"), (LazyCandidateBatch, "decode_at")],
            "choice": (self.model, "sample_patches"),
        }

    def run(self, length: int, meter: MethodMeter) -> int:
        """Generates `length` tokens per sequence under a meter, and returns the total number of candidates sampled."""
        counts = []  # candidates per call of the head

        def count_candidates(sample):
            def counting_sample(*args, **kwargs):
                result = sample(*args, **kwargs)
                latents_NRZ = result[0] if isinstance(result, tuple) else result
                counts.append(latents_NRZ[..., 0].numel())
                return result

            return counting_sample

        with ExitStack() as stack:
            if self.replay is not None:
                stack.enter_context(self.replay.on(self.model))
            stack.enter_context(meter.measured())
            stack.enter_context(self.matmul_backend())
            if is_calm(self.model):
                for name in ("sample", "propose"):
                    counting = count_candidates(getattr(self.model.head, name))
                    stack.enter_context(mock.patch.object(self.model.head, name, counting))
            generate_tokens(self.model, self.prompts_BL, length, **self.settings)
        return sum(counts)


def calm_matmul_backend() -> AbstractContextManager:
    """Returns a context manager that gives any language model the linear-layer backend of a CALM (kernels_calm.py)."""
    return OneDNNLinear() if one_dnn_is_faster() else nullcontext()


@dataclass
class TimedRun:
    """The measurements of one call of `generate`."""

    seconds: float
    prompt_seconds: float  # prefill of the backbone
    step_ms: dict[str, float]  # part → milliseconds per step, without the prefill
    num_candidates: int  # sampled in total
    extra_bytes: int | None  # peak memory beyond what was in use before


def timed_run(workload: Workload, length: int, seed: int) -> TimedRun:
    """Generates `length` tokens per sequence, at least two steps, and splits the time into parts."""
    device = workload.model.device
    clock = Meter.clock(device)
    meter = MethodMeter(clock, workload.methods())
    torch.manual_seed(seed)
    with PeakMemory(device) as memory:
        synchronise(device)
        start = clock.read()
        num_candidates = workload.run(length, meter)
        end = clock.read()
        synchronise(device)
    seconds, steps = clock.difference(start, end), workload.num_steps(length)
    prompt, *backbone = meter.spent("backbone")  # the first call is the prefill
    head, decode, choice = (sum(meter.spent(part)) / steps for part in ("head", "decode", "choice"))
    other = (seconds - prompt - sum(backbone)) / steps - choice
    part_seconds = (fmean(backbone), head, decode, choice - head - decode, other)
    step_ms = {part: 1000 * value for part, value in zip(PARTS, part_seconds, strict=True)}
    return TimedRun(seconds, prompt, step_ms, num_candidates, memory.extra)


def summarise(workload: Workload, runs: list[TimedRun], length: int) -> dict:
    """Returns medians and ranges over the runs of one model; generation.py describes the keys."""
    batch_size, steps = len(workload.prompts_BL), workload.num_steps(length)
    speeds = [batch_size * length / run.seconds for run in runs]
    step_ms = {part: median(run.step_ms[part] for run in runs) for part in PARTS}
    candidates_per_step = median(run.num_candidates for run in runs) / steps
    extras = [run.extra_bytes for run in runs if run.extra_bytes is not None]
    extra = max(extras) if extras else None
    return {
        "tokens_per_second": median(speeds),
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "prompt_ms": 1000 * median(run.prompt_seconds for run in runs),
        "step_ms": sum(step_ms.values()),
        **{f"{part}_ms": value for part, value in step_ms.items()},
        "draws": candidates_per_step / batch_size,
        "peak_over_weights": None if extra is None else 1 + extra / weight_bytes(workload.model),
    }


def compare(calm: Workload, baseline: Workload, length: int, repetitions: int) -> dict:
    """Interleaves runs of both; returns CALM's results, the baseline's as baseline_…, and the ratio of speeds."""
    calm_runs, baseline_runs = [], []
    for workload in (calm, baseline):
        unused_meter = MethodMeter(Meter.clock(workload.model.device), {})
        workload.run(WARM_UP_STEPS * workload.tokens_per_step, unused_meter)
    for repetition in range(repetitions):
        calm_runs.append(timed_run(calm, length, seed=repetition))
        baseline_runs.append(timed_run(baseline, length, seed=repetition))
    calm_results, baseline_results = summarise(calm, calm_runs, length), summarise(baseline, baseline_runs, length)
    ratio = calm_results["tokens_per_second"] / baseline_results["tokens_per_second"]
    return {"ratio": ratio, **calm_results, **{f"baseline_{key}": value for key, value in baseline_results.items()}}
