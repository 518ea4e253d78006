"""Chooses patches by temperature from samples of them: the options, the methods, and where random numbers come from.

The target at temperature T is P(x)^(1/T) / Z over whole patches x, given only samples of P. The methods make a batch
of candidates draw, and return the index of the one chosen for each row; none knows a token:

- `batch_temperature_select`: weighs the distinct patches among N samples (paper, Algorithm 2, extended to every T),
  and truncates by weight (top-k, top-p, min-p);
- `exact_temperature_sample`: the paper's Algorithm 1, in growing blocks up to a limit, then the batch rule; or, from
  heads that know probabilities, rejection sampling;
- `most_frequent_patch`: the mode of N samples, for `do_sample=False`.

Rows are independent. What depends on samples stays on their device, except that after each block of the exact method
the host reads, once, which rows are done. Axes: B rows, R of these that still draw, N samples of a row, D hidden size.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig

from .generation_calm_algorithms import (
    NO_TRUNCATION,
    WHOLE_TOLERANCE,
    Pairs,
    Truncation,
    candidate_weights,
    choose_at_limit,
    compared_pairs,
    first_accepted_attempt,
    inverse_temperature,
    occurrence_counts,
    sample_by_weight,
)
from .kernels_calm import arange, as_tensor

if TYPE_CHECKING:
    from .heads_calm import GenerativeHead

FIRST_BLOCK_SIZE, BLOCK_GROWTH = 16, 4  # samples of Algorithm 1: 16, 64, 256, … after each block
MAX_SAMPLES_PER_STEP = 2**22  # about a kilobyte is kept of each: 4 GB
MAX_TEMPERATURE = 2.0  # above, most of the distribution is patches that were not drawn
EXACT_LIMIT = 10  # most samples of the exact method, in units of num_candidates
TRIES_IN_A_BLOCK = 32  # of rejection sampling: on the demo's shape they take 1.4 times as long as one
FIRST_CHUNK = 32  # samples; their noise is drawn at once where each row has a generator
NumberKind = Literal["uniform", "exponential"]  # on [0, 1), and of mean 1
NOISE_KINDS: tuple[str, ...] = (*get_args(NumberKind), "head")

SamplingMethod = Literal["auto", "rejection", "distilled", "batch", "adaptive", "exact"]
SAMPLING_METHODS = get_args(SamplingMethod)


class OptionError(ValueError):
    """The value of one of these `options` of `generate` is invalid, at least beside the others."""

    def __init__(self, message: str, *options: str):
        super().__init__(message)
        self.options = options


def _is_number(value: object, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless 0 < temperature <= 2."""
    if not (_is_number(temperature) and 0 < temperature <= MAX_TEMPERATURE):
        raise OptionError(
            f"temperature={temperature!r}: sampling needs a temperature in (0, {MAX_TEMPERATURE:g}]; for the most "
            "frequent patch use do_sample=False.",
            "temperature",
        )


def check_num_candidates(num_candidates: int, temperature: float) -> None:
    """Raises ValueError unless the temperature is valid and `num_candidates` an integer of at least 1/T."""
    check_temperature(temperature)
    if not _is_number(num_candidates, numbers.Integral) or num_candidates < 1:
        raise OptionError(f"num_candidates={num_candidates!r}: it must be a positive integer.", "num_candidates")
    if num_candidates * float(temperature) < 1 - WHOLE_TOLERANCE:
        exponent = inverse_temperature(temperature)
        least = math.ceil(exponent) if exponent < 1e9 else f"{exponent:.1g}"
        raise OptionError(
            f"num_candidates={num_candidates} is too few for temperature={temperature}: "
            f"a patch must be drawn 1/temperature times to count, so use at least {least}.",
            *("num_candidates", "temperature"),
        )


@dataclass(frozen=True)
class PatchSampling:
    """Chooses patches by the options of `generate`, which its call or the generation configuration gives.

    Args:
        do_sample: False takes the most frequent of the candidates, drawn with a fixed seed.
        temperature: T in (0, 2].
        num_candidates: N, patches drawn per step unless T = 1 without truncation or logits processors.
        sampling_method: "batch" draws all N and weighs them (paper, Algorithm 2). "exact" draws in growing blocks
            until Algorithm 1 has a result, and takes the batch result after 10·N samples without one. "adaptive" is
            the same with a limit of N samples: at T = 1/n no further from the target than "batch", and faster where
            patches repeat. At T > 1, or with a truncation, all three are "batch". "rejection" is exact and seldom
            draws more than 8: for heads that know the probabilities of tokens. "distilled" draws one, from heads that
            were trained for the temperature. "auto" is "rejection" or "distilled" where the head can, else "adaptive";
            below a head's range its candidates are samples at the lowest temperature of that.
        lazy_decoding: True decodes only what the choice of a patch needs, False every candidate in full; the patches
            are the same. `None` means True on a CPU. With logits processors every candidate is decoded in full.
        top_k, top_p, min_p: which of the distinct candidates may be chosen, see `Truncation`; with "rejection", which
            tokens, given those before them in the patch.
        head_temperature: no option; the temperature of the head's samples, see `for_head`.

    Raises:
        ValueError: a value outside its range, or fewer than 1/T candidates.
    """

    do_sample: bool = True
    temperature: float = 1.0
    num_candidates: int = 200  # published setting of the batch algorithm
    sampling_method: SamplingMethod = "auto"
    lazy_decoding: bool | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    head_temperature: float = 1.0

    def __post_init__(self):
        if (method := self.sampling_method) not in SAMPLING_METHODS:
            raise OptionError(f"sampling_method={method!r}: must be one of {SAMPLING_METHODS}.", "sampling_method")
        check_num_candidates(self.num_candidates, self.temperature)
        if not _is_number(self.top_k, numbers.Integral) or not 0 <= self.top_k < 2**63:
            raise OptionError(f"top_k={self.top_k!r}: must be an integer, of patches to keep, or 0 for all.", "top_k")
        for name, value in (("do_sample", self.do_sample), ("lazy_decoding", self.lazy_decoding)):
            if value not in (True, False, None):
                raise OptionError(f"{name}={value!r}: must be True or False.", name)
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not (_is_number(value) and 0 <= value <= 1):
                raise OptionError(f"{name}={value!r}: must be a fraction, in [0, 1].", name)
        self.check_num_rows(1)

    def check_num_rows(self, num_rows: int) -> None:
        """Raises ValueError where a step of this many rows may hold more than `MAX_SAMPLES_PER_STEP` samples."""
        if (num_samples := num_rows * self.samples_in_one_block) > MAX_SAMPLES_PER_STEP:
            options = f"num_candidates={self.num_candidates} with sampling_method={self.sampling_method!r}"
            drawn = f"{num_rows} rows, of num_return_sequences each, may draw {num_samples} patches a step: at most"
            raise OptionError(f"{options}, {drawn} {MAX_SAMPLES_PER_STEP} fit.", "num_candidates", "sampling_method")

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return tuple(cls.__dataclass_fields__)[:-1]  # the last is `head_temperature`

    @classmethod
    def from_generation_config(cls, config: GenerationConfig, **overrides) -> PatchSampling:
        """Reads the options from a generation configuration; `overrides` of their names, not None, take precedence."""
        settings: dict[str, Any] = {"do_sample": False}  # upstream's default
        for name in cls.option_names():
            value = overrides.get(name)
            value = getattr(config, name, None) if value is None else value
            if value is not None:
                settings[name] = value
        if not settings["do_sample"]:  # these have no meaning then
            settings = {n: v for n, v in settings.items() if n not in ("temperature", "top_k", "top_p", "min_p")}
        return cls(**settings)

    def for_head(self, head: GenerativeHead) -> PatchSampling:
        """Returns the options with the method that "auto" stands for; ValueError where the head can't do it."""
        method, lowest = self.sampling_method, head.lowest_temperature
        if method == "auto" and head.samples_tokens:
            return replace(self, sampling_method="rejection")
        if method == "rejection" and not head.samples_tokens:
            message = f"sampling_method='rejection': {type(head).__name__} knows no probabilities; use 'auto'."
            raise OptionError(message, "sampling_method")
        if method not in ("auto", "distilled"):
            return self
        temperature = min(1.0, max(lowest, self.temperature)) if self.do_sample else lowest
        is_distilled = lowest < 1 and self.temperature == temperature
        if method == "distilled" and self.do_sample and self.temperature != temperature:
            range_ = f"from {lowest:g} to 1" if lowest < 1 else "1 alone (recipe distil-temperature trains others)"
            message = f"sampling_method='distilled': T={self.temperature}, but the head samples at T {range_}."
            raise OptionError(message, *("sampling_method", "temperature"))
        method = "distilled" if is_distilled else "adaptive"
        if (method, temperature) == (self.sampling_method, self.head_temperature):  # resolved already
            return self
        return replace(self, sampling_method=method, head_temperature=temperature)

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.top_k, self.top_p, self.min_p)

    @property
    def proposes(self) -> bool:
        """Whether candidates are drawn at the temperature and accepted or rejected."""
        return self.sampling_method == "rejection" and not self.takes_single_sample

    @property
    def remaining_temperature(self) -> float:
        """The temperature at which candidates, once drawn, are chosen."""
        return 1.0 if self.proposes else self.temperature / self.head_temperature

    @property
    def takes_single_sample(self) -> bool:
        """Whether a step draws one patch and takes it."""
        is_at_target = self.temperature == self.head_temperature
        return self.do_sample and is_at_target and (self.top_k, self.top_p, self.min_p) == NO_TRUNCATION

    @property
    def uses_batch_rule(self) -> bool:
        """Whether a step draws all candidates and weighs them, whatever the first of them are."""
        is_beyond = self.remaining_temperature > 1 or self.truncation != NO_TRUNCATION
        return self.sampling_method == "batch" or (is_beyond and not self.proposes)

    @property
    def max_samples(self) -> int:
        """The most patches drawn for one row in one step where more than one is drawn."""
        is_exact = self.sampling_method == "exact" and not self.uses_batch_rule
        return self.num_candidates * (EXACT_LIMIT if is_exact else 1)

    @property
    def samples_in_one_block(self) -> int:
        """The number of patches that `choose` draws for a row in one block."""
        if self.takes_single_sample or (self.proposes and not self.do_sample):
            return 1
        if self.proposes:
            return min(TRIES_IN_A_BLOCK, self.num_candidates)
        return self.max_samples if self.do_sample else self.num_candidates

    def choose(
        self, candidates: Candidates, randomness: Randomness = None, one_block: bool = False
    ) -> tuple[Tensor, Tensor | bool]:
        """Samples candidates, in growing blocks or in one, and chooses one of each row.

        Returns its index (B,), and whether it is an exact sample of the target: one value for all rows, or (B,).
        """
        is_mode = self.proposes and not self.do_sample  # of the head: the only proposal
        if (is_mode or self.takes_single_sample) and not candidates.has_processors:
            candidates.extend(candidates.rows_B, 1)
            return torch.zeros_like(candidates.rows_B), not is_mode and self.head_temperature == 1
        if not self.do_sample:
            return most_frequent_patch(candidates, self.num_candidates), False
        if self.uses_batch_rule or candidates.has_processors:
            truncation = NO_TRUNCATION if self.proposes else self.truncation
            settings = self.remaining_temperature, self.num_candidates, randomness, truncation
            return batch_temperature_select(candidates, *settings), False
        # "adaptive" and "exact" differ only in `max_samples`, after which the batch rule chooses.
        attempts = Proposals() if self.proposes else RepetitionAttempts(self.remaining_temperature)
        if one_block:
            return sample_in_one_block(candidates, attempts, self.samples_in_one_block, randomness)
        return exact_temperature_sample(candidates, attempts, self.max_samples, randomness)

    def weights(self, first_BN: Tensor, log_factors_BN: Tensor | None = None) -> Tensor:
        """Returns the weight of each candidate in the choice, on first occurrences, each row's sum 1; (B, N)."""
        temperature = self.remaining_temperature if self.do_sample else 1.0
        truncation = self.truncation if self.do_sample and not self.proposes else NO_TRUNCATION
        return candidate_weights(first_BN, temperature, truncation, log_factors_BN)


# The methods


class Candidates(Protocol):
    """Independent samples of patches, a growing sequence for each of B rows: what the methods need of them.

    Args:
        rows_B: the numbers of the rows, 0 … B − 1, on the device of all answers.
        has_processors: whether logits processors weigh candidates: then all must be drawn and weighed.
        log_factors_BN: log of what they multiply each patch's probability by, and of a proposal's acceptance; or None.
    """

    rows_B: Tensor
    has_processors: bool
    log_factors_BN: Tensor | None

    def extend(self, rows_R: Tensor, num_samples: int) -> None:
        """Draws more samples for each of these rows, which must have drawn in every call before."""

    def compare(self, rows_R: Tensor, pairs: Pairs = "all", noise_RN: Tensor | None = None) -> Tensor:
        """Returns for each sample of these rows the index of the first one that equals it, (R, N).

        Only the pairs that `pairs` names (see `compared_pairs`) need be compared. If all samples are distinct, the
        caller will choose the one with the least `noise_RN`, so that it may be decoded in advance.
        """
        ...


def most_frequent_patch(candidates: Candidates, num_samples: int) -> Tensor:
    """Draws N samples and returns the index of each row's most frequent patch, the first seen of ties, (B,)."""
    candidates.extend(candidates.rows_B, num_samples)
    first_BN = candidates.compare(candidates.rows_B)
    if candidates.log_factors_BN is not None:
        return candidate_weights(first_BN, 1.0, log_factors_BN=candidates.log_factors_BN).argmax(-1)
    counts_BN = occurrence_counts(first_BN)
    earliness_N = torch.arange(num_samples - 1, -1, -1, device=counts_BN.device)
    return (counts_BN * num_samples + earliness_N).argmax(-1)


def batch_temperature_select(
    candidates: Candidates,
    temperature: float,
    num_samples: int,
    randomness: Randomness = None,
    truncation: Truncation = NO_TRUNCATION,
) -> Tensor:
    """Samples P^(1/T)/Z approximately from N samples of each row (paper, Algorithm 2), and returns the index, (B,).

    The published rule takes T = 1/n: a patch seen c >= n times weighs C(c, n); where there is none, n-1, and so on.
    `repetition_log_weights` extends it to every T. Raises ValueError for T outside (0, 2] and for N < 1/T.
    """
    check_num_candidates(num_samples, temperature)
    candidates.extend(candidates.rows_B, num_samples)
    noise_BN = StepRandomness.of(randomness).numbers("exponential", candidates.rows_B, num_samples)
    first_BN = candidates.compare(candidates.rows_B)
    return sample_by_weight(first_BN, noise_BN, temperature, truncation, candidates.log_factors_BN)


class RepetitionAttempts:
    """Attempts of the paper's Algorithm 1: 1/T samples of P in a row that are the same patch; ValueError for T > 1."""

    def __init__(self, temperature: float):
        if temperature > 1:
            raise ValueError(f"temperature={temperature}: Algorithm 1 sharpens; above 1 patches are chosen by weight.")
        exponent = inverse_temperature(temperature)
        self.temperature = temperature
        self.pairs: Pairs = compared_pairs(temperature)
        self.length, self.needs_uniform = math.ceil(exponent), not exponent.is_integer()
        self.first_block = max(FIRST_BLOCK_SIZE, self.length)

    def first_accepted(
        self, candidates: Candidates, rows_R: Tensor, uniform_RN: Tensor | None, noise_RN: Tensor | None
    ) -> Tensor:
        """Returns at which sample each row's first accepted attempt starts, (R,); N where there is none.

        `noise_RN` are the random numbers of `choose_at_limit`, None before the last block.
        """
        first_RN = candidates.compare(rows_R, self.pairs, None if self.pairs == "all" else noise_RN)
        return first_accepted_attempt(first_RN, uniform_RN, self.temperature)

    def choose_at_limit(
        self, candidates: Candidates, rows_R: Tensor, uniform_RN: Tensor | None, noise_RN: Tensor
    ) -> Tensor:
        """Chooses a sample of each row that has no accepted attempt and may draw no more, (R,)."""
        return choose_at_limit(candidates.compare(rows_R), uniform_RN, noise_RN, self.temperature)


class Proposals(RepetitionAttempts):
    """Attempts of rejection sampling: single samples, each accepted with the probability in its log factor."""

    def __init__(self):
        self.length, self.needs_uniform, self.first_block = 1, True, TRIES_IN_A_BLOCK

    def first_accepted(self, candidates, rows_R, uniform_RN, noise_RN) -> Tensor:
        assert uniform_RN is not None and candidates.log_factors_BN is not None
        num_samples = uniform_RN.shape[1]
        is_rejected_RN = uniform_RN.log() >= candidates.log_factors_BN[rows_R]
        return arange(num_samples, rows_R.device).masked_fill(is_rejected_RN, num_samples).amin(-1)

    def choose_at_limit(self, candidates, rows_R, uniform_RN, noise_RN) -> Tensor:
        """Weighs the samples by their probability of acceptance, as in importance sampling."""
        assert candidates.log_factors_BN is not None
        log_factors_RN = candidates.log_factors_BN[rows_R]
        return sample_by_weight(candidates.compare(rows_R), noise_RN, 1.0, log_factors_BN=log_factors_RN)


def exact_temperature_sample(
    candidates: Candidates, attempts: RepetitionAttempts, max_samples: int, randomness: Randomness = None
) -> tuple[Tensor, Tensor]:
    """Samples P^(1/T)/Z exactly: draws in growing blocks until a row has an accepted attempt.

    After `max_samples` a row takes `choose_at_limit`: the total variation from the target is at most the fraction of
    such rows. With `max_samples=num_candidates`, Algorithm 1 is no further from it than `batch_temperature_select`
    (tests/test_samplers.py, TestFallback). Returns the index of the sample chosen (B,), and whether an attempt was
    accepted (B,), on the CPU.
    """
    num_rows, randomness = len(candidates.rows_B), StepRandomness.of(randomness)
    chosen = [0] * num_rows
    open_rows, rows_R = list(range(num_rows)), candidates.rows_B  # rows that draw, on the host and on the device
    uniform_RN = noise_RN = None
    for num_drawn, size in block_sizes(attempts.first_block, max_samples):
        candidates.extend(rows_R, size)
        if attempts.needs_uniform:
            new_RN = randomness.numbers("uniform", rows_R, size)
            uniform_RN = new_RN if uniform_RN is None else torch.cat([uniform_RN, new_RN], dim=1)
        if num_drawn == max_samples:
            noise_RN = randomness.numbers("exponential", rows_R, max_samples)
        starts = attempts.first_accepted(candidates, rows_R, uniform_RN, noise_RN).tolist()
        for row, start in zip(open_rows, starts, strict=True):
            chosen[row] = start
        still_open = [i for i, start in enumerate(starts) if start == num_drawn]  # no accepted attempt yet
        if len(still_open) < len(open_rows):
            open_rows, index_R = [open_rows[i] for i in still_open], as_tensor(still_open, rows_R.device)
            if not open_rows:
                break
            rows_R = rows_R[index_R]
            uniform_RN, noise_RN = (x if x is None else x[index_R] for x in (uniform_RN, noise_RN))

    index_B = as_tensor(chosen, rows_R.device)
    if open_rows and noise_RN is not None:
        index_R = attempts.choose_at_limit(candidates, rows_R, uniform_RN, noise_RN)
        index_B = index_R if len(open_rows) == num_rows else index_B.index_copy(0, rows_R, index_R)
    fell_back = set(open_rows)
    return index_B, torch.tensor([row not in fell_back for row in range(num_rows)])


def sample_in_one_block(
    candidates: Candidates, attempts: RepetitionAttempts, num_samples: int, randomness: Randomness = None
) -> tuple[Tensor, Tensor]:
    """Samples as `exact_temperature_sample`, in one block: the host reads nothing, both results are on the device."""
    randomness, rows_B = StepRandomness.of(randomness), candidates.rows_B
    candidates.extend(rows_B, num_samples)
    uniform_BN = randomness.numbers("uniform", rows_B, num_samples) if attempts.needs_uniform else None
    noise_BN = randomness.numbers("exponential", rows_B, num_samples)
    start_B = attempts.first_accepted(candidates, rows_B, uniform_BN, noise_BN)
    fallback_B = attempts.choose_at_limit(candidates, rows_B, uniform_BN, noise_BN)
    return torch.where(start_B < num_samples, start_B, fallback_B), start_B < num_samples


def block_sizes(first: int, max_samples: int) -> Iterator[tuple[int, int]]:
    """Yields (samples after the block, its size) up to `max_samples`; the samples grow by `BLOCK_GROWTH`."""
    num_drawn = 0
    while num_drawn < max_samples:
        size = min((BLOCK_GROWTH - 1) * num_drawn or first, max_samples - num_drawn)
        num_drawn += size
        yield num_drawn, size


# Random numbers


@dataclass(eq=False)
class StepRandomness:
    """Random numbers of one step, all from one generator (None: torch's own), in the order of the calls."""

    generator: torch.Generator | None = None

    @classmethod
    def of(cls, randomness: Randomness) -> StepRandomness:
        """Wraps a generator, or a list of one per row, as the random numbers of one step."""
        if isinstance(randomness, StepRandomness):
            return randomness
        return RowRandomness(randomness) if isinstance(randomness, Sequence) else StepRandomness(randomness)

    def numbers(self, kind: NumberKind, rows_R: Tensor, num_samples: int) -> Tensor:
        """Returns float32 numbers (R, N) for N more samples of these rows, which were in every call before."""
        if kind == "uniform":
            return torch.rand(len(rows_R), num_samples, generator=self.generator, device=rows_R.device)
        noise_RN = torch.empty(len(rows_R), num_samples, device=rows_R.device, dtype=torch.float32)
        return noise_RN.exponential_(generator=self.generator)

    def noise_arguments(self, head: GenerativeHead, context_RD: Tensor, rows_R: Tensor, num_samples: int) -> dict:
        """Returns the source of randomness of `head.sample`, a generator or tensors, as keyword arguments."""
        return {"generator": self.generator}


class PredrawnRandomness(StepRandomness):
    """Random numbers of one step that are drawn already: "uniform" and "exponential" (R, N), and the head's."""

    def __init__(self, noise: dict[str, Tensor]):
        super().__init__()
        self.noise = noise

    def numbers(self, kind: NumberKind, rows_R: Tensor, num_samples: int) -> Tensor:
        return self.noise[kind]

    def noise_arguments(self, head, context_RD, rows_R, num_samples) -> dict[str, Any]:
        return {name: x for name, x in self.noise.items() if name not in NOISE_KINDS}


class RowRandomness(StepRandomness):
    """Random numbers of one step, each row's from its own generator, which gives three seeds per step.

    So a row's patch depends on its own context and generator alone: neither on the rows beside it nor on block sizes.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        super().__init__()
        seeds = [torch.randint(2**62, (len(NOISE_KINDS),), generator=g, device=g.device).tolist() for g in generators]
        self.streams = {kind: [_NoiseStream(of_row[i]) for of_row in seeds] for i, kind in enumerate(NOISE_KINDS)}
        self.num_taken = dict.fromkeys(NOISE_KINDS, 0)

    def numbers(self, kind: NumberKind, rows_R: Tensor, num_samples: int) -> Tensor:
        def make(size: int, generator: torch.Generator) -> dict[str, Tensor]:
            noise_N11 = torch.empty(size, 1, 1, device=generator.device)
            return {kind: getattr(noise_N11, f"{kind}_")(generator=generator)}

        return self._take(kind, rows_R, num_samples, make)[kind][..., 0].T

    def noise_arguments(self, head, context_RD, rows_R, num_samples) -> dict[str, Any]:
        return self._take("head", rows_R, num_samples, lambda size, g: head.predrawn_noise(size, 1, context_RD, g))

    def _take(self, kind: str, rows_R: Tensor, num_samples: int, make: MakeNoise) -> dict[str, Tensor]:
        """Returns the next N samples' noise of these rows, tensors (..., N, R, size)."""
        start, stop = self.num_taken[kind], self.num_taken[kind] + num_samples
        self.num_taken[kind] = stop
        numbers = rows_R.tolist() if len(rows_R) < len(self.streams[kind]) else range(len(rows_R))  # the host may wait
        rows = [self.streams[kind][row].first(stop, rows_R.device, make) for row in numbers]
        return {name: torch.cat([row[name][..., start:stop, :, :] for row in rows], dim=-2) for name in rows[0]}


@dataclass(eq=False)
class _NoiseStream:
    """The noise of one kind of one row's samples, drawn in chunks of 32, 32, 64, … samples.

    Each chunk has its own seed: a generator need not give the same 8 numbers as 3 and then 5.
    """

    seed: int
    num_drawn: int = 0
    noise: dict[str, Tensor] = field(default_factory=dict)

    def first(self, num_samples: int, device: torch.device, make: MakeNoise) -> dict[str, Tensor]:
        """Returns the noise of at least the first `num_samples` samples."""
        while self.num_drawn < num_samples:
            size = max(self.num_drawn, FIRST_CHUNK)
            chunk = make(size, torch.Generator(device).manual_seed(self.seed + self.num_drawn))
            old = self.noise
            self.noise = {name: torch.cat([old[name], new], dim=-3) if old else new for name, new in chunk.items()}
            self.num_drawn += size
        return self.noise


MakeNoise = Callable[[int, torch.Generator], dict[str, Tensor]]  # number of samples → tensors (..., N, 1, size)
Randomness = torch.Generator | Sequence[torch.Generator] | StepRandomness | None
