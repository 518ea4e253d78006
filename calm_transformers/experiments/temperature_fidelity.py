"""Temperature-sampling fidelity: compares temperature samples of a CALM with the exact distribution P^(1/T) / Z.

    python -m calm_transformers.experiments.temperature_fidelity --model FOLDER --language FOLDER

After a context, the language (language.py) gives the exact probability P of every next patch, hence the tempered
distribution P^(1/T) / Z that generation at temperature T approximates. Each sampling method chooses patches after
contexts of the validation text. Their frequencies are compared with it: total variation distance, and entropy in nats.
Four columns separate the sources of error:

- exact samples: as many samples of the tempered distribution itself; shows the error of their finite number.
- true distribution: the method applied to samples of P; adds the sampler's error.
- true distribution, M samples: the method applied to only M samples of P; adds the error of reusing few samples.
- model: the method applied to M samples of the model, drawn once per context; adds the model's error.

The method "one draw" takes one sample: of a head that was distilled for the temperature at T, of others at T = 1.

Axes: C contexts, M stored samples, B patches to choose, R rows of candidates, N samples per row, L tokens, K tokens
per patch, X patches that are not negligible, U distinct patches seen, D hidden, J settings, A columns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calm_transformers.command_line import command, known_errors, positive
from calm_transformers.documents import read_documents
from calm_transformers.evaluation.branching import CalmReader
from calm_transformers.evaluation.report import markdown, write_json
from calm_transformers.experiments.language import HiddenMarkovLanguage
from calm_transformers.experiments.optimal_fraction import make_parser
from calm_transformers.loading import is_calm, load_causal_lm, load_tokenizer
from calm_transformers.model.generation_calm_algorithms import first_occurrences
from calm_transformers.model.generation_calm_samplers import Pairs, PatchSampling, SamplingMethod
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.progress import progress_bar

TEMPERATURES = (0.7, 1 / 2, 1 / 3)  # in addition to 1
METHODS: tuple[SamplingMethod, ...] = ("batch", "adaptive", "exact")
CANDIDATES = (50, 200, 1000)
COLUMNS = {  # JSON key → table header
    **{"exact draws": "exact samples", "true law": "true distribution"},
    **{"true law, recorded": "true distribution, M samples", "model": "model"},
}
METRICS = {  # JSON key → table title, row label and format
    "total_variation": (
        "Total variation distance to the tempered distribution:",
        *("total variation", "{:.3f} ± {:.3f}"),
    ),
    "entropy_difference": (
        "Entropy minus that of the tempered distribution, nats (exact samples show the bias of so few patches):",
        *("entropy difference", "{:+.2f} ± {:.2f}"),
    ),
}
CONTEXT_LENGTH = 64
NUM_TRUE_SAMPLES = 2**20  # samples of P are cheap: enough that sharing them between rows has no effect
MIN_PROBABILITY = 1e-9  # of an enumerated patch; the others together have about 1e-4 in the command's language
MAX_PATCH_SIZE = 4  # longer patches are too many to enumerate
SAMPLES_CHUNK_SIZE = 2**12  # samples of a model per call
ROWS_CHUNK_SIZE = 100  # rows of up to 10,000 samples: the samplers' intermediate tensors stay in the CPU's cache


def make_settings(
    methods: Iterable[SamplingMethod] = METHODS, candidates: Iterable[int] = CANDIDATES
) -> list[PatchSampling]:
    """Returns the settings to compare: T = 1, then one draw and every method with every N at each temperature."""
    settings = [PatchSampling()]
    for T in TEMPERATURES:
        settings.append(PatchSampling(temperature=T, sampling_method="distilled", head_temperature=T))
        for method, num_candidates in product(methods, candidates):
            settings.append(PatchSampling(temperature=T, sampling_method=method, num_candidates=num_candidates))
    return settings


@dataclass(frozen=True)
class PatchDistribution:
    """A distribution of the next patch, P."""

    patches_X: Tensor  # ids (`patch_ids`), ascending
    probability_X: Tensor  # float64

    def tempered(self, temperature: float) -> PatchDistribution:
        """Returns P^(1/T) / Z."""
        power_X = self.probability_X ** (1 / temperature)
        return PatchDistribution(self.patches_X, power_X / power_X.sum())

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Samples patch ids (num_samples,)."""
        thresholds = torch.rand(num_samples, generator=generator, dtype=torch.float64)
        index = torch.searchsorted(self.probability_X.cumsum(0), thresholds)
        return self.patches_X[index.clamp(max=len(self.patches_X) - 1)]

    def probability(self, patches_U: Tensor) -> Tensor:
        """Returns the probabilities (U,) of patch ids; 0 for those not in `patches_X`."""
        index_U = torch.searchsorted(self.patches_X, patches_U).clamp(max=len(self.patches_X) - 1)
        return self.probability_X[index_U].masked_fill(self.patches_X[index_U] != patches_U, 0.0)

    @property
    def entropy(self) -> float:
        """Entropy in nats."""
        return torch.special.entr(self.probability_X).sum().item()

    def compare(self, samples_B: Tensor) -> tuple[float, float]:
        """Returns the total variation distance between empirical frequencies and this distribution, and the empirical
        entropy minus this distribution's, in nats (biased low for few samples)."""
        seen_U, count_U = samples_B.unique(return_counts=True)
        frequency_U = count_U / count_U.sum(dtype=torch.float64)
        variation = 1 - torch.minimum(frequency_U, self.probability(seen_U)).sum().item()
        return variation, torch.special.entr(frequency_U).sum().item() - self.entropy


class StoredCandidates:
    """A `generation_calm_samplers.Candidates` whose rows take stored samples, each row in its own order.

    No row takes a sample twice, so the samples of a row are independent; different rows share some.

    Args:
        samples_M: patch ids; M is a power of 2.
        num_rows: B.
        generator: for the orders.
    """

    def __init__(self, samples_M: Tensor, num_rows: int, generator: torch.Generator):
        size = len(samples_M)
        self.samples_M, self.rows_B, self.num_drawn = samples_M, torch.arange(num_rows), 0
        self.has_processors: bool = False
        self.log_factors_BN: Tensor | None = None
        self.start_B = torch.randint(size, (num_rows,), generator=generator)
        self.stride_B = 1 + 2 * torch.randint(size, (num_rows,), generator=generator)  # odd: coprime with M

    def extend(self, rows_R: Tensor, num_samples: int) -> None:
        """Adds `num_samples` samples to each row; at least as many must be stored."""
        self.num_drawn += num_samples

    def compare(self, rows_R: Tensor, pairs: Pairs = "all", noise_RN: Tensor | None = None) -> Tensor:
        """Returns for each sample the index of its first occurrence in its row, or in its run of equal neighbours."""
        index_N = torch.arange(self.num_drawn)
        patches_RN = self.read(rows_R, index_N)
        if pairs == "all":
            return first_occurrences(patches_RN[..., None])
        repeats_RN = torch.zeros_like(patches_RN, dtype=torch.bool)
        repeats_RN[:, 1:] = patches_RN[:, 1:] == patches_RN[:, :-1]
        return index_N.masked_fill(repeats_RN, 0).cummax(-1).values

    def tokens(self, rows_R: Tensor, index_R: Tensor) -> Tensor:
        """Returns one sample per row, (R, 1)."""
        return self.read(rows_R, index_R[:, None])

    def read(self, rows_R: Tensor, index_RN: Tensor) -> Tensor:
        """Returns each row's samples at these indices of its order, (R, N); indices may be (N,), for every row."""
        positions_RN = self.start_B[rows_R, None] + self.stride_B[rows_R, None] * index_RN
        return self.samples_M[positions_RN % len(self.samples_M)]


def patch_ids(patches_MK: Tensor, vocab_size: int) -> Tensor:
    """Encodes each patch as one integer (M,), with its token ids as digits; this keeps the lexicographic order."""
    ids_M = torch.zeros_like(patches_MK[:, 0])
    for tokens_M in patches_MK.unbind(-1):
        ids_M = ids_M * vocab_size + tokens_M
    return ids_M


def next_patch_distribution(
    language: HiddenMarkovLanguage, ids_L: Tensor, patch_size: int, vocab_size: int
) -> PatchDistribution:
    """Returns the language's distribution of the patch after a context."""
    belief = language.beliefs(language.to_symbols(ids_L.numpy())[None])[0, -1]
    symbols_XK, probability_X = language.likely_continuations(belief, patch_size, MIN_PROBABILITY)
    patches_X = patch_ids(torch.from_numpy(language.to_ids(symbols_XK)), vocab_size)
    return PatchDistribution(patches_X, torch.from_numpy(probability_X / probability_X.sum()))


def choose_patches(samples_M: Tensor, sampling: PatchSampling, num_patches: int, generator: torch.Generator) -> Tensor:
    """Chooses patches (B,) by a sampling method, each from its own candidates among the stored samples."""
    chosen = []
    for rows in torch.arange(num_patches).split(ROWS_CHUNK_SIZE):
        candidates = StoredCandidates(samples_M, len(rows), generator)
        index_B, _ = sampling.choose(candidates, generator)
        chosen.append(candidates.tokens(candidates.rows_B, index_B)[:, 0])
    return torch.cat(chosen)


def evaluate_context(
    distribution: PatchDistribution,
    model_M: Tensor,
    sample_at: Callable[[float], Tensor],
    settings: Sequence[PatchSampling],
    num_patches: int,
    generator: torch.Generator,
) -> np.ndarray:
    """Returns total variation and entropy difference after one context, per setting and column, (J, A, 2).

    `sample_at` returns one draw of the model per patch, of a head distilled for the temperature at that.
    """
    sources = [distribution.sample(size, generator) for size in (NUM_TRUE_SAMPLES, len(model_M))] + [model_M]
    values_JA2 = []
    for sampling in settings:
        target = distribution.tempered(sampling.temperature)
        patches_AB = [target.sample(num_patches, generator)]
        patches_AB += [choose_patches(samples_M, sampling, num_patches, generator) for samples_M in sources]
        if sampling.sampling_method == "distilled":
            patches_AB[-1] = sample_at(sampling.temperature)
        values_JA2.append([target.compare(patches_B) for patches_B in patches_AB])
    return np.array(values_JA2)


@torch.no_grad()
def sample_model(
    reader: CalmReader,
    state_D: Tensor,
    num_samples: int,
    vocab_size: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Tensor:
    """Samples patch ids (M,) of the model after one context; a temperature must be one that its head takes."""
    sizes = [min(SAMPLES_CHUNK_SIZE, num_samples - start) for start in range(0, num_samples, SAMPLES_CHUNK_SIZE)]
    drawn = [reader.draw(state_D, size, generator, temperature) for size in sizes]
    return torch.cat([patch_ids(patches_MK, vocab_size) for patches_MK in drawn])


def evaluate_model(
    reader: CalmReader,
    language: HiddenMarkovLanguage,
    ids_CL: Tensor,
    patch_size: int,
    num_patches: int,
    num_stored: int,
    settings: Sequence[PatchSampling],
    lowest_temperature: float = 1.0,
) -> dict:
    """Evaluates a model on contexts (C, L) divisible by the patch size; returns the results of `summarise`.

    Chooses `num_patches` patches per context and setting, from `num_stored` samples of the model (M, a power of 2, at
    least as many as a setting may draw). `lowest_temperature` is the lowest one at which the head can draw.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = int(language.to_ids(np.array(language.vocab_size)))
    states_CD = reader.read(ids_CL.unflatten(1, (-1, patch_size)))[:, -1]
    values, entropies, untempered = [], [], []  # one entry per context; untempered: T = 1
    for ids_L, state_D in zip(progress_bar(ids_CL, "Sampling", "context"), states_CD, strict=True):
        distribution = next_patch_distribution(language, ids_L, patch_size, vocab_size)
        model_M = sample_model(reader, state_D, num_stored, vocab_size, generator)
        exact_M = distribution.sample(num_stored, generator)
        untempered.append([distribution.compare(samples_M) for samples_M in (exact_M, model_M)])

        def sample_at(temperature: float, state_D: Tensor = state_D) -> Tensor:
            temperature = temperature if temperature >= lowest_temperature else 1.0
            return sample_model(reader, state_D, num_patches, vocab_size, generator, temperature)

        values.append(evaluate_context(distribution, model_M, sample_at, settings, num_patches, generator))
        entropies.append([distribution.tempered(sampling.temperature).entropy for sampling in settings])
    sizes = {"contexts": len(ids_CL), "context_length": ids_CL.shape[1], "draws": num_patches}
    results = summarise(settings, np.array(values), np.array(entropies), np.array(untempered))
    return results | sizes | {"recorded": num_stored}


def summarise(
    settings: Sequence[PatchSampling], values_CJA2: np.ndarray, entropies_CJ: np.ndarray, untempered_C22: np.ndarray
) -> dict:
    """Returns means and standard errors over contexts: of each setting, and of all M samples at T = 1 (own_law)."""

    def by_metric(values_CA2: np.ndarray, columns: Iterable[str]) -> dict:
        return {
            metric: {column: _mean_and_error(values_CA2[:, a, i]) for a, column in enumerate(columns)}
            for i, metric in enumerate(METRICS)
        }

    rows = [
        {
            "temperature": sampling.temperature,
            "method": "one draw" if sampling.takes_single_sample else sampling.sampling_method,
            "num_candidates": None if sampling.takes_single_sample else sampling.num_candidates,
            "exact_entropy": _mean_and_error(entropies_CJ[:, j]),
            **by_metric(values_CJA2[:, j], COLUMNS),
        }
        for j, sampling in enumerate(settings)
    ]
    return {"settings": rows, "own_law": by_metric(untempered_C22, ("exact draws", "model"))}


def _mean_and_error(values_C: np.ndarray) -> tuple[float, float]:
    return values_C.mean().item(), (values_C.std(ddof=1) / len(values_C) ** 0.5).item()


def report(results: dict[str, dict]) -> str:
    """Formats results by model name as Markdown tables; columns that no model affects are the first one's results."""
    first, shared_columns = next(iter(results.values())), [column for column in COLUMNS if column != "model"]
    parts = [
        f"{first['draws']:,} patches after each of {first['contexts']} contexts of {first['context_length']} tokens; "
        f"M = {first['recorded']:,} samples per context; means ± standard errors over the contexts."
    ]
    untempered = []
    for metric, (title, label, form) in METRICS.items():
        rows = []
        for settings in zip(*(result["settings"] for result in results.values()), strict=True):  # one per model
            row = settings[0]
            cells = [row[metric][column] for column in shared_columns]
            cells += [model_row[metric]["model"] for model_row in settings]
            setting = [f"{row['temperature']:.2g}", row["method"] or "–", f"{row['num_candidates'] or '–'}"]
            rows.append([*setting, f"{row['exact_entropy'][0]:.2f}", *(form.format(*cell) for cell in cells)])
        parts += [
            title,
            markdown(["T", "method", "N", "entropy", *(COLUMNS[column] for column in shared_columns), *results], rows),
        ]
        cells = [first["own_law"][metric]["exact draws"]]
        cells += [result["own_law"][metric]["model"] for result in results.values()]
        untempered.append([label, *(form.format(*cell) for cell in cells)])
    parts += [f"The distributions at T = 1, from all {first['recorded']:,} samples:"]
    parts += [markdown(["", COLUMNS["exact draws"], *results], untempered)]
    return "\n\n".join(parts)


def read_contexts(folder: Path, num_contexts: int, patch_size: int) -> Tensor:
    """Reads contexts (C, L): the beginnings of the first validation documents, divisible by the patch size."""
    tokenizer, path = load_tokenizer(folder), folder / "validation.jsonl"
    length = CONTEXT_LENGTH // patch_size * patch_size
    rows = [tokenizer(text).input_ids[:length] for text in islice(read_documents([path]), num_contexts)]
    if len(rows) < num_contexts or min(map(len, rows)) < length:
        raise ValueError(f"{path} has fewer than {num_contexts} documents of {length} tokens.")
    return torch.tensor(rows)


def load_model(name: str, language: HiddenMarkovLanguage) -> CALMForCausalLM:
    """Loads a CALM in float32."""
    model = load_causal_lm(name, torch.float32, "cpu")
    if not is_calm(model):
        raise ValueError(f"{name} is not a CALM.")
    vocab_size, patch_size = int(language.to_ids(np.array(language.vocab_size))), model.config.patch_size
    if model.config.vocab_size != vocab_size:
        raise ValueError(f"{name} has {model.config.vocab_size} tokens, the language {vocab_size}.")
    if patch_size > MAX_PATCH_SIZE or vocab_size**patch_size > 2**32:
        raise ValueError(f"{name}: too many patches of {patch_size} tokens to enumerate.")
    return model


@command
def main(argv: list[str] | None = None) -> None:
    program = "python -m calm_transformers.experiments.temperature_fidelity"
    parser = make_parser(program, __doc__, 1000, "patches to choose per context and setting")
    parser.add_argument("--contexts", type=positive, default=16, help="at least 2 (default: 16)")
    parser.add_argument("--recorded", type=positive, default=2**15, help="model samples per context, a power of 2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="(default: all)")
    parser.add_argument("--candidates", nargs="+", type=positive, default=CANDIDATES, help="N (default: 50 200 1000)")
    args = parser.parse_args(argv)
    with known_errors():
        settings = make_settings(args.methods, args.candidates)
    max_samples = max(sampling.max_samples for sampling in settings)
    if args.contexts < 2:
        parser.error("--contexts 1: a standard error needs at least two")
    if args.recorded < max_samples or args.recorded & (args.recorded - 1):
        parser.error(f"--recorded {args.recorded}: must be a power of 2, and at least {max_samples}")
    with known_errors():
        language = HiddenMarkovLanguage.load(args.language)
        model = load_model(args.model, language)
        ids_CL = read_contexts(args.language, args.contexts, model.config.patch_size)
    lowest = model.config.distilled_temperature or 1.0
    sizes = model.config.patch_size, args.draws, args.recorded
    result = evaluate_model(CalmReader(model), language, ids_CL, *sizes, settings, lowest)
    print(report({args.model: result}))
    write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(main())
