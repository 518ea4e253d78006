"""One comparison of the generation benchmark: timed runs of two models in turns, and the figures they give.

Axes: B batch, L prompt tokens, R rows that draw, K tokens per patch, N candidates, Z latent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from statistics import fmean, median

import torch
from transformers import PreTrainedModel

from calm_transformers.benchmarks.meters import Meter, Parts, PeakMemory, synchronise, weight_bytes, wrapped
from calm_transformers.benchmarks.workloads import Replay, write
from calm_transformers.loading import is_calm
from calm_transformers.model.kernels_calm import OneDNNLinear, one_dnn_is_faster

PARTS = ("backbone", "head", "decode", "selection", "other")
DECODING = ("decode_tokens", "decode_states", "read_tokens")
WARM_UP_STEPS = 2


@dataclass
class Subject:
    """A model, its prompts, and how it is asked to write.

    Args:
        model: a CALM or an ordinary causal LM.
        prompts_BL: where its texts begin.
        settings: arguments of `generate`.
        replay: candidates to impose on a CALM.
        products: a context for the whole call, see `lent_products`.
    """

    model: PreTrainedModel
    prompts_BL: torch.Tensor
    settings: dict
    replay: Replay | None = None
    products: Callable[[], AbstractContextManager] = nullcontext

    def num_steps(self, length: int) -> int:
        return -(-length // self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        return self.model.config.patch_size if is_calm(self.model) else 1

    def methods(self) -> dict[str, tuple[object, str] | list[tuple[object, str]]]:
        """Part → the method that does it; "choice" is head, decode and selection together."""
        if not is_calm(self.model):
            return {"backbone": (self.model, "forward")}
        return {
            "backbone": (self.model.model, "forward"),
            "head": (self.model.head, "sample"),
            "decode": [(self.model.autoencoder, name) for name in DECODING],
            "choice": (self.model, "sample_patches"),
        }

    def write(self, length: int, parts: Parts) -> int:
        """Writes `length` tokens a row, measures the parts, and returns how many candidates were drawn in all."""
        draws = []

        def count(sample):
            def call(*args, **kwargs):
                latents_NRZ = sample(*args, **kwargs)
                draws.append(latents_NRZ[..., 0].numel())
                return latents_NRZ

            return call

        with ExitStack() as stack:
            if self.replay is not None:
                stack.enter_context(self.replay.on(self.model))
            stack.enter_context(parts.measured())
            stack.enter_context(self.products())
            if is_calm(self.model):
                stack.enter_context(wrapped(self.model.head, "sample", count))
            write(self.model, self.prompts_BL, length, **self.settings)
        return sum(draws)


def lent_products() -> AbstractContextManager:
    """For an ordinary language model: the products of linear layers that a CALM makes by itself (kernels_calm.py)."""
    return OneDNNLinear() if one_dnn_is_faster() else nullcontext()


@dataclass
class Run:
    """One timed run.

    Args:
        seconds: of the whole call of `generate`.
        prompt_seconds: of the backbone's first pass, over the prompt.
        step_ms: part → ms of a step; for the backbone, of a step after the first.
        draws: candidates drawn in all.
        extra_bytes: memory needed beyond what was in use before.
    """

    seconds: float
    prompt_seconds: float
    step_ms: dict[str, float]
    draws: int
    extra_bytes: int | None


def timed_run(subject: Subject, length: int, seed: int) -> Run:
    """Writes `length` tokens a row, at least two steps, and takes the time apart."""
    device = subject.model.device
    clock = Meter.clock(device)
    parts = Parts(clock, subject.methods())
    torch.manual_seed(seed)
    with PeakMemory(device) as memory:
        synchronise(device)
        start = clock.read()
        draws = subject.write(length, parts)
        end = clock.read()
        synchronise(device)
    seconds, steps = clock.difference(start, end), subject.num_steps(length)
    prompt, *backbone = parts.calls("backbone")
    head, decode, choice = (sum(parts.calls(part)) / steps for part in ("head", "decode", "choice"))
    other = (seconds - prompt - sum(backbone)) / steps - choice
    values = (fmean(backbone), head, decode, choice - head - decode, other)
    step_ms = {part: 1000 * value for part, value in zip(PARTS, values, strict=True)}
    return Run(seconds, prompt, step_ms, draws, memory.extra)


def summary(subject: Subject, runs: list[Run], length: int) -> dict:
    """Medians and ranges over the runs of one model; the keys are the rows', see generation.py."""
    batch_size, steps = len(subject.prompts_BL), subject.num_steps(length)
    speeds = [batch_size * length / run.seconds for run in runs]
    step_ms = {part: median(run.step_ms[part] for run in runs) for part in PARTS}
    draws_per_step = median(run.draws for run in runs) / steps
    weights = weight_bytes(subject.model)
    extras = [run.extra_bytes for run in runs if run.extra_bytes is not None]
    extra = max(extras) if extras else None
    return {
        "tokens_per_second": median(speeds),
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "prompt_ms": 1000 * median(run.prompt_seconds for run in runs),
        "step_ms": sum(step_ms.values()),
        **{f"{part}_ms": value for part, value in step_ms.items()},
        "draws": draws_per_step / batch_size,
        "weight_bytes": weights,
        "peak_memory_bytes": None if extra is None else weights + extra,
        "peak_over_weights": None if extra is None else 1 + extra / weights,
    }


def compare(calm: Subject, baseline: Subject, length: int, repetitions: int) -> dict:
    """Runs both in turns: CALM's figures, the baseline's as baseline_…, and the ratio of their tokens a second."""
    subjects, runs = (calm, baseline), ([], [])
    for subject in subjects:  # warms up
        subject.write(WARM_UP_STEPS * subject.tokens_per_step, Parts(Meter.clock(subject.model.device), {}))
    for repetition in range(repetitions):
        for subject, done in zip(subjects, runs, strict=True):
            done.append(timed_run(subject, length, seed=repetition))
    of_calm, of_baseline = map(summary, subjects, runs, (length, length))
    ratio = of_calm["tokens_per_second"] / of_baseline["tokens_per_second"]
    return {"ratio": ratio, **of_calm, **{f"baseline_{key}": value for key, value in of_baseline.items()}}
