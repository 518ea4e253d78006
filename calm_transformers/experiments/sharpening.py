"""Temperature on a known truth: what the samplers make of a CALM's patches, against the law that they aim at.

    python -m calm_transformers.experiments.sharpening --model FOLDER --language FOLDER

After a context, the language (language.py) gives every next patch its exact probability P, and so the law P^(1/T) / Z
that generation at the temperature T aims at. Patches are chosen after some contexts of the language's validation text
by each sampling method, and their frequencies compared with that law: total variation, and entropy in nats. Of what
lies between them four columns show one thing more each:

- exact draws: as many patches of the sharpened law itself. That their number is finite;
- true law: the method on draws of P. The sampler;
- recorded: the same from a record no longer than the model's. That a model's draws are few: those after a context are
  made once, and every pool reads them in an order of its own;
- model: the same from the model's record. The model.

Axes: C contexts, M recorded draws, B patches to choose, R of their pools' rows, N draws of a row, L tokens, K tokens
per patch, X patches that are not negligible, U patches seen, D hidden, J settings, A the four columns.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calm_transformers.command_line import command, known_errors, positive
from calm_transformers.documents import read_documents
from calm_transformers.evaluation.branching import CalmReader
from calm_transformers.evaluation.report import markdown, write_json
from calm_transformers.experiments.language import HiddenMarkovLanguage, load
from calm_transformers.experiments.share import parser_of
from calm_transformers.loading import is_calm, load_causal_lm, load_tokenizer
from calm_transformers.model.generation_calm_samplers import SAMPLING_METHODS, BlockSchedule, Pairs, PatchSampling
from calm_transformers.model.generation_calm_weights import first_occurrences
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.progress import progress_bar

TEMPERATURES = (0.7, 1 / 2, 1 / 3)  # beside 1
CANDIDATES = (50, 200, 1000)
SETTINGS = [
    PatchSampling(),
    *(
        PatchSampling(temperature=temperature, sampling_method=method, num_candidates=num_candidates)
        for temperature in TEMPERATURES
        for method in SAMPLING_METHODS
        for num_candidates in CANDIDATES
    ),
]
MAX_SAMPLES_PER_STEP = max(sampling.max_samples for sampling in SETTINGS)
COLUMNS = ("exact draws", "true law", "true law, recorded", "model")
FIGURES = {  # title of the table, name in a row, and format
    "total_variation": ("Total variation from the sharpened law:", "total variation", "{:.3f} ± {:.3f}"),
    "entropy_difference": (
        "Entropy less the sharpened law's, nats (the exact draws show what so few patches lose):",
        *("entropy less the law's", "{:+.2f} ± {:.2f}"),
    ),
}
CONTEXT_LENGTH = 64
TRUE_RECORD = 2**20  # draws of P are cheap: so many that what rows share of them doesn't show
LEAST = 1e-9  # less probable patches are left out: together about 1e-4 of the command's language
LARGEST_PATCH = 4  # of more symbols there are too many to enumerate
SAMPLES_CHUNK_SIZE = 2**12  # of a model
ROWS_AT_ONCE = 100  # pools of up to 10,000 draws: what the samplers make of them stays in the cache


@dataclass(frozen=True)
class PatchLaw:
    """A law of the next patch.

    Args:
        patches_X: the patches, each as one number (`as_numbers`), ascending.
        probability_X: of each, float64.
    """

    patches_X: Tensor
    probability_X: Tensor

    def sharpened(self, temperature: float) -> PatchLaw:
        """P^(1/T) / Z."""
        power_X = self.probability_X ** (1 / temperature)
        return PatchLaw(self.patches_X, power_X / power_X.sum())

    def draw(self, num_draws: int, generator: torch.Generator) -> Tensor:
        """Independent patches."""
        chance = torch.rand(num_draws, generator=generator, dtype=torch.float64)
        index = torch.searchsorted(self.probability_X.cumsum(0), chance)
        return self.patches_X[index.clamp(max=len(self.patches_X) - 1)]

    def probability(self, patches_U: Tensor) -> Tensor:
        """(U,): of these patches; 0 where the law doesn't name them."""
        index_U = torch.searchsorted(self.patches_X, patches_U).clamp(max=len(self.patches_X) - 1)
        return self.probability_X[index_U].masked_fill(self.patches_X[index_U] != patches_U, 0.0)

    @property
    def entropy(self) -> float:
        """Nats."""
        return torch.special.entr(self.probability_X).sum().item()

    def compare(self, drawn_B: Tensor) -> tuple[float, float]:
        """Total variation between the law and the frequencies of drawn patches, and by how many nats the frequencies'
        entropy is more than the law's (of few patches it is too low)."""
        seen_U, count_U = drawn_B.unique(return_counts=True)
        frequency_U = count_U / count_U.sum(dtype=torch.float64)
        variation = 1 - torch.minimum(frequency_U, self.probability(seen_U)).sum().item()
        return variation, torch.special.entr(frequency_U).sum().item() - self.entropy


class RecordedPool:
    """A `generation_calm_samplers.Candidates` whose rows read a record of draws, each in an order of its own.

    No row reads a draw twice, so its draws are as independent as fresh ones; only different rows share some.

    Args:
        record_M: patches as numbers; M is a power of 2.
        num_rows: B.
        generator: of the orders.
    """

    def __init__(self, record_M: Tensor, num_rows: int, generator: torch.Generator):
        size = len(record_M)
        self.record_M, self.rows_B, self.num_drawn = record_M, torch.arange(num_rows), 0
        self.has_processors: bool = False
        self.processor_log_weights_BN: Tensor | None = None
        self.start_B = torch.randint(size, (num_rows,), generator=generator)
        self.stride_B = 1 + 2 * torch.randint(size, (num_rows,), generator=generator)  # odd: M steps meet every draw

    def extend(self, rows_R: Tensor, num_draws: int) -> None:
        """Reads so many more; the rows that don't are not asked about again.

        Raises:
            ValueError: more than there are.
        """
        self.num_drawn += num_draws
        if self.num_drawn > len(self.record_M):
            raise ValueError(f"{self.num_drawn} draws of a record of {len(self.record_M)}.")

    def first_occurrences(self, rows_R: Tensor, pairs: Pairs = "all", noise_RN: Tensor | None = None) -> Tensor:
        """Class ids of the draws of these rows so far, (R, N): where only neighbours are compared, of each run."""
        index_N = torch.arange(self.num_drawn)
        patches_RN = self.read(rows_R, index_N)
        if pairs == "all":
            return first_occurrences(patches_RN[..., None])
        repeats_RN = torch.zeros_like(patches_RN, dtype=torch.bool)
        repeats_RN[:, 1:] = patches_RN[:, 1:] == patches_RN[:, :-1]
        return index_N.masked_fill(repeats_RN, 0).cummax(-1).values

    def tokens(self, rows_R: Tensor, index_R: Tensor) -> Tensor:
        """One draw of each of these rows, (R, 1): a patch is one number here."""
        return self.read(rows_R, index_R[:, None])

    def read(self, rows_R: Tensor, index_RN: Tensor) -> Tensor:
        places_RN = self.start_B[rows_R, None] + self.stride_B[rows_R, None] * index_RN
        return self.record_M[places_RN % len(self.record_M)]


def as_numbers(patches_MK: Tensor, vocab_size: int) -> Tensor:
    """(M,): each patch's token ids as the digits of one number; in the patches' order."""
    numbers_M = torch.zeros_like(patches_MK[:, 0])
    for ids_M in patches_MK.unbind(-1):
        numbers_M = numbers_M * vocab_size + ids_M
    return numbers_M


def next_patch_law(language: HiddenMarkovLanguage, ids_L: Tensor, patch_size: int, vocab_size: int) -> PatchLaw:
    """The language's law of the patch after a text's beginning."""
    belief = language.beliefs(language.symbols(ids_L.numpy())[None])[0, -1]
    symbols_XK, probability_X = language.likely_continuations(belief, patch_size, LEAST)
    patches_X = as_numbers(torch.from_numpy(language.ids(symbols_XK)), vocab_size)
    return PatchLaw(patches_X, torch.from_numpy(probability_X / probability_X.sum()))


def choose(record_M: Tensor, sampling: PatchSampling, num_patches: int, generator: torch.Generator) -> Tensor:
    """(B,): patches that a sampling method chooses, each from a pool of its own."""
    chosen, plan = [], BlockSchedule()
    for rows in torch.arange(num_patches).split(ROWS_AT_ONCE):
        pool = RecordedPool(record_M, len(rows), generator)
        chosen.append(pool.tokens(pool.rows_B, sampling.choose(pool, generator, plan))[:, 0])
    return torch.cat(chosen)


def measure(law: PatchLaw, model_M: Tensor, num_patches: int, generator: torch.Generator) -> np.ndarray:
    """(J, A, 2): total variation and difference of entropy after one context, of each setting and column."""
    records = [law.draw(TRUE_RECORD, generator), law.draw(len(model_M), generator), model_M]
    figures_JA2 = []
    for sampling in SETTINGS:
        target = law.sharpened(sampling.temperature)
        columns = [target.draw(num_patches, generator)]
        columns += [choose(record_M, sampling, num_patches, generator) for record_M in records]
        figures_JA2.append([target.compare(drawn_B) for drawn_B in columns])
    return np.array(figures_JA2)


@torch.no_grad()
def record(reader: CalmReader, state_D: Tensor, num_draws: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """(M,): a model's draws of the patch after one context."""
    sizes = [min(SAMPLES_CHUNK_SIZE, num_draws - start) for start in range(0, num_draws, SAMPLES_CHUNK_SIZE)]
    return torch.cat([as_numbers(reader.draw(state_D, size, generator), vocab_size) for size in sizes])


def measure_model(
    reader: CalmReader,
    language: HiddenMarkovLanguage,
    ids_CL: Tensor,
    patch_size: int,
    num_patches: int,
    num_recorded: int,
) -> dict:
    """What the command writes, see `results`, of patches that are chosen after each context and setting.

    Args:
        reader: of the model.
        language: that the model was trained on.
        ids_CL: contexts, whole patches of the beginnings of texts.
        patch_size: K.
        num_patches: B.
        num_recorded: M, a power of 2 of at least `MAX_SAMPLES_PER_STEP`.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = int(language.ids(np.array(language.vocab_size)))
    states_CD = reader.read(ids_CL.unflatten(1, (-1, patch_size)))[:, -1]
    figures, entropies, own = [], [], []
    for ids_L, state_D in zip(progress_bar(ids_CL, "Sampling", "context"), states_CD, strict=True):
        law = next_patch_law(language, ids_L, patch_size, vocab_size)
        model_M = record(reader, state_D, num_recorded, vocab_size, generator)
        own.append([law.compare(law.draw(num_recorded, generator)), law.compare(model_M)])
        figures.append(measure(law, model_M, num_patches, generator))
        entropies.append([law.sharpened(sampling.temperature).entropy for sampling in SETTINGS])
    sizes = {"contexts": len(ids_CL), "context_length": ids_CL.shape[1], "draws": num_patches}
    return results(np.array(figures), np.array(entropies), np.array(own)) | sizes | {"recorded": num_recorded}


def results(figures_CJA2: np.ndarray, entropies_CJ: np.ndarray, own_C22: np.ndarray) -> dict:
    """Means over contexts, each with its standard error, of what `measure` found; and at T = 1 of whole records."""

    def by_figure(values_CA2: np.ndarray, columns: tuple[str, ...]) -> dict:
        return {
            figure: {name: _mean_and_error(values_CA2[:, a, i]) for a, name in enumerate(columns)}
            for i, figure in enumerate(FIGURES)
        }

    rows = [
        {
            "temperature": sampling.temperature,
            "method": sampling.sampling_method if sampling.temperature < 1 else None,
            "num_candidates": sampling.num_candidates if sampling.temperature < 1 else None,
            "exact_entropy": _mean_and_error(entropies_CJ[:, j]),
            **by_figure(figures_CJA2[:, j], COLUMNS),
        }
        for j, sampling in enumerate(SETTINGS)
    ]
    return {"settings": rows, "own_law": by_figure(own_C22, ("exact draws", "model"))}


def _mean_and_error(values_C: np.ndarray) -> tuple[float, float]:
    """Over two contexts at least."""
    return values_C.mean().item(), (values_C.std(ddof=1) / len(values_C) ** 0.5).item()


def report(results: dict[str, dict]) -> str:
    """Markdown: both tables and the models' own laws, by the models' names; the other columns are the first one's."""
    first = next(iter(results.values()))
    parts = [
        f"{first['draws']:,} patches after each of {first['contexts']} contexts of {first['context_length']} tokens; "
        f"records of {first['recorded']:,} draws; means ± a standard error over the contexts."
    ]
    own_rows = []
    for figure, (title, label, form) in FIGURES.items():
        rows = []
        for same in zip(*(result["settings"] for result in results.values()), strict=True):
            row = same[0]
            cells = [*(row[figure][name] for name in COLUMNS[:-1]), *(other[figure]["model"] for other in same)]
            setting = [f"{row['temperature']:.2g}", row["method"] or "–", f"{row['num_candidates'] or '–'}"]
            rows.append([*setting, f"{row['exact_entropy'][0]:.2f}", *(form.format(*cell) for cell in cells)])
        parts += [title, markdown(["T", "method", "N", "entropy", *COLUMNS[:-1], *results], rows)]
        cells = [first["own_law"][figure]["exact draws"]]
        cells += [result["own_law"][figure]["model"] for result in results.values()]
        own_rows.append([label, *(form.format(*cell) for cell in cells)])
    parts += [f"The laws themselves at T = 1, of all {first['recorded']:,} draws:"]
    return "\n\n".join([*parts, markdown(["", COLUMNS[0], *results], own_rows)])


def read_contexts(folder: Path, num_contexts: int, patch_size: int) -> Tensor:
    """(C, L): the first whole patches of the first texts of a language's validation text.

    Raises:
        ValueError: there are fewer.
        OSError: there is none.
    """
    tokenizer, path = load_tokenizer(folder), folder / "validation.jsonl"
    length = CONTEXT_LENGTH // patch_size * patch_size
    rows = [tokenizer(text).input_ids[:length] for text in islice(read_documents([path]), num_contexts)]
    if len(rows) < num_contexts or min(map(len, rows)) < length:
        raise ValueError(f"{path}: has not {num_contexts} texts of {length} tokens.")
    return torch.tensor(rows)


def load_model(name: str, language: HiddenMarkovLanguage) -> CALMForCausalLM:
    """A CALM in float32.

    Raises:
        ValueError: it is none, or has not the language's tokens, or its patches can't be enumerated.
        OSError: there is none.
    """
    model = load_causal_lm(name, torch.float32, "cpu")
    if not is_calm(model):
        raise ValueError(f"{name}: is no CALM.")
    vocab_size, patch_size = int(language.ids(np.array(language.vocab_size))), model.config.patch_size
    if model.config.vocab_size != vocab_size:
        raise ValueError(f"{name}: has {model.config.vocab_size} tokens, and the language {vocab_size}.")
    if patch_size > LARGEST_PATCH or vocab_size**patch_size > 2**32:
        raise ValueError(f"{name}: there are too many patches of {patch_size} tokens to enumerate.")
    return model


@command
def main(argv: list[str] | None = None) -> None:
    chosen = {"default": 1000, "help": "patches chosen after each context (default: 1,000)"}
    parser = parser_of("python -m calm_transformers.experiments.sharpening", __doc__, **chosen)
    parser.add_argument("--contexts", type=positive, default=16, help="two at least (default: 16)")
    parser.add_argument("--recorded", type=positive, default=2**15, help="draws of the model after each, a power of 2")
    args = parser.parse_args(argv)
    if args.contexts < 2:
        parser.error("--contexts 1: a standard error needs two")
    if args.recorded < MAX_SAMPLES_PER_STEP or args.recorded & (args.recorded - 1):
        parser.error(f"--recorded {args.recorded}: must be a power of 2, and at least {MAX_SAMPLES_PER_STEP}")
    with known_errors():
        language = load(args.language)
        model = load_model(args.model, language)
        ids_CL = read_contexts(args.language, args.contexts, model.config.patch_size)
    result = measure_model(CalmReader(model), language, ids_CL, model.config.patch_size, args.draws, args.recorded)
    print(report({args.model: result}))
    write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(main())
