"""Shows the candidates of each patch of a generated text: `calm inspect MODEL "Once upon a time"`.

For each generated patch: its distinct candidates, how often each was sampled, and its weight at several temperatures.
For each patch of the prompt the same, sampled after the patches before it: would the model have generated it?
`--html FILE` writes a self-contained page with a temperature slider.

Axes: P patches, R of them at a time, K tokens per patch, D hidden, N samples, M distinct patches among them.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from calm_transformers.command_line import Parser, command, known_errors, positive, seed_number, utf8, writable
from calm_transformers.files import atomic_write
from calm_transformers.loading import check_length, load_calm
from calm_transformers.model.generation_calm_algorithms import Truncation, candidate_weights
from calm_transformers.model.generation_calm_candidates import candidate_scores
from calm_transformers.model.generation_calm_samplers import PatchSampling, check_temperature
from calm_transformers.pages.app import display_name
from calm_transformers.pages.app_page import ALL_CANDIDATES, PROMPT, IncrementalDetokenizer, text_after
from calm_transformers.pages.inspect_page import render_page

PROGRAM = "calm inspect"
COMPARED_TEMPERATURES = (1.0, 0.5, 1 / 3)
PATCHES_CHUNK_SIZE = 8  # of the prompt
BAR_WIDTH = 12  # characters for a weight of 1


@dataclass
class Candidate:
    """A distinct patch among the samples of a step.

    Args:
        text: the text that it adds to the preceding text.
        count: how often it was sampled.
        weight: its probability of being chosen at the text's temperature, after truncation.
    """

    text: str
    count: int
    weight: float


@dataclass
class Patch:
    """A patch of the text, and the candidates that were sampled in its place.

    Args:
        text: the text that it adds.
        is_prompt: whether it belongs to the prompt.
        candidates: by descending weight; empty for the first patch, which is not predicted.
        chosen: index of the candidate that equals the patch, if any.
    """

    text: str
    is_prompt: bool
    candidates: list[Candidate] = field(default_factory=list)
    chosen: int | None = None


@dataclass
class Inspection:
    """A generated text with its prompt, patch by patch.

    Args:
        model: its name.
        patch_size: K.
        settings: temperature, num_candidates, top_k, top_p, min_p and seed.
        patches: patches of the prompt and the generated text.
    """

    model: str
    patch_size: int
    settings: dict[str, Any]
    patches: list[Patch]

    @property
    def text(self) -> str:
        return "".join(patch.text for patch in self.patches)


def inspect_text(model, tokenizer, prompt: str, max_new_tokens: int, seed: int, **options) -> Inspection:
    """Generates `max_new_tokens` tokens and returns the candidates of each patch.

    seed: seed of the text, and of the candidates of the prompt's patches.
    options: temperature, num_candidates, top_k, top_p, min_p as in `generate`; default: the model's.
    Raises ValueError when `generate` doesn't support the prompt or an option.
    """
    sampling = model.patch_sampling(do_sample=True, sampling_method="batch", **options)
    ids_1L = tokenizer(prompt, return_tensors="pt").input_ids.long().to(model.device)
    check_length(model, ids_1L.shape[1], max_new_tokens)
    if sampling.takes_single_sample:  # at T = 1: N samples instead, the same distribution
        options["top_k"] = ALL_CANDIDATES
    with torch.no_grad():
        output = model.generate(
            ids_1L,
            attention_mask=torch.ones_like(ids_1L),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            sampling_method="batch",
            generator=torch.Generator(model.device).manual_seed(seed),
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    packed_1L = model.pack_for_generation(ids_1L, bos_token=model.generation_config.bos_token_id)["input_ids"]
    patches = prompt_patches(model, tokenizer, packed_1L, ids_1L.shape[1], sampling, seed)
    patches += generated_patches(tokenizer, output, ids_1L.shape[1], model.config.patch_size)
    settings = {name: getattr(sampling, name) for name in ("temperature", "num_candidates", "top_k", "top_p", "min_p")}
    return Inspection("", model.config.patch_size, {**settings, "seed": seed}, patches)


def generated_patches(tokenizer, output, prompt_length: int, patch_size: int) -> list[Patch]:
    """Returns the patches that `generate` appended to the prompt; the last one may be shorter."""
    ids = output.sequences[0].tolist()
    starts = range(prompt_length, len(ids), patch_size)
    texts = texts_between(tokenizer, ids, [0, *starts, len(ids)])[1:]
    return [
        Patch(
            text,
            is_prompt=False,
            candidates=candidates_of(scores, 0, tokenizer, ids[:start]),
            chosen=int(scores.chosen[0]),
        )
        for start, text, scores in zip(starts, texts, output.scores, strict=True)
    ]


def texts_between(tokenizer, ids: list[int], bounds: Sequence[int]) -> list[str]:
    """Returns the text that each of the slices `ids[bounds[i]:bounds[i + 1]]` adds."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [detokenizer.append(ids[start:end], is_last=end == len(ids)) for start, end in pairwise(bounds)]


def candidates_of(scores, row: int, tokenizer, ids: list[int]) -> list[Candidate]:
    """Returns the candidates of one row of `CandidateScores`, with their texts after `ids`."""
    patches, counts, weights = (values[row].tolist() for values in (scores.patches, scores.counts, scores.weights))
    return [
        Candidate(text_after(tokenizer, ids, tokens), count, weight)
        for tokens, count, weight in zip(patches, counts, weights, strict=True)
        if count
    ]


def prompt_patches(model, tokenizer, packed_1L, num_tokens: int, sampling, seed: int) -> list[Patch]:
    """Returns the prompt's patches, each with candidates sampled after the patches before it.

    packed_1L: the prompt, padded on the left to whole patches.
    num_tokens: length of the prompt without padding.
    """
    patch_size, ids = model.config.patch_size, packed_1L[0].tolist()
    num_padding, starts = len(ids) - num_tokens, range(0, len(ids), patch_size)
    bounds = [max(start, num_padding) for start in (*starts, len(ids))]  # of the patches without padding
    texts = texts_between(tokenizer, ids[num_padding:], [bound - num_padding for bound in bounds])
    patches = [Patch(text, is_prompt=True) for text in texts]
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        hidden_PD = model(input_ids=packed_1L).last_hidden_state[0, :-1]
        for first in range(0, len(hidden_PD), PATCHES_CHUNK_SIZE):
            hidden_RD = hidden_PD[first : first + PATCHES_CHUNK_SIZE]
            scores = sample_candidates(model, hidden_RD, sampling, generator)
            for row in range(len(hidden_RD)):
                index = first + row + 1  # of the patch that the row's hidden state predicts
                patch_K = packed_1L[0, starts[index] : starts[index] + patch_size].to(scores.patches)
                patches[index].candidates = candidates_of(scores, row, tokenizer, ids[num_padding : bounds[index]])
                equal = (scores.patches[row] == patch_K).all(-1).nonzero()
                patches[index].chosen = int(equal[0, 0]) if len(equal) else None
    return patches


def sample_candidates(model, hidden_RD: torch.Tensor, sampling: PatchSampling, generator: torch.Generator):
    """Samples N candidates after each hidden state and returns `CandidateScores`; its `chosen` is not used."""
    top_k = ALL_CANDIDATES if sampling.takes_single_sample else sampling.top_k
    all_candidates = replace(sampling, lazy_decoding=False, top_k=top_k)
    sample = model.sample_patches(hidden_RD, all_candidates, generator)
    return candidate_scores(sample.candidates, sample.index, sampling.weights)


def weights_from_counts(counts: Sequence[int], temperature: float, truncation: Truncation) -> list[float]:
    """Returns the normalised weights C(count, 1/T) of distinct patches by their counts, after truncation."""
    # As of samples in which equal patches follow each other; a sample is given by the index of the first equal one.
    counts_M = torch.tensor(counts)
    first_M = counts_M.cumsum(0) - counts_M
    return candidate_weights(first_M.repeat_interleave(counts_M)[None], temperature, truncation)[0, first_M].tolist()


# Plain text


def format_inspection(inspection: Inspection, temperatures: Sequence[float], num_shown: int) -> str:
    """Formats each patch, its candidates and their weights at each temperature as plain text."""
    settings = inspection.settings
    truncation = Truncation(settings["top_k"], settings["top_p"], settings["min_p"])
    names = [f"T={each:.3g}" + ("*" if each == settings["temperature"] else "") for each in temperatures]
    lines = [
        f"{inspection.model}: K = {inspection.patch_size}, "
        + ", ".join(f"{name} = {value:.6g}" for name, value in settings.items()),
        "",
        inspection.text,
        "",
        "> the patch in the text, n how often a candidate was sampled, T=… its weight at T (* the text's own).",
    ]
    for number, patch in enumerate(inspection.patches, start=1):
        lines += ["", format_patch(number, patch)]
        if not patch.candidates:
            continue
        counts = [candidate.count for candidate in patch.candidates]
        columns = [weights_from_counts(counts, temperature, truncation) for temperature in temperatures]
        lines.append(f"{'':6}{'candidate':<24}{'n':>5}  " + "".join(f"{name:>9}" for name in names))
        shown = list(range(min(num_shown, len(counts))))
        if patch.chosen is not None and patch.chosen not in shown:
            shown.append(patch.chosen)
        for i in shown:
            candidate = patch.candidates[i]
            mark = ">" if i == patch.chosen else " "
            values = "".join(f"{column[i]:>9.3f}" for column in columns)
            bar = "█" * round(candidate.weight * BAR_WIDTH)
            lines.append(f"    {mark} {quote(candidate.text):<24}{candidate.count:>5}  {values}  {bar}".rstrip())
        if len(counts) > len(shown):
            lines.append(f"      … and {len(counts) - len(shown)} more")
    return "\n".join(lines)


def format_patch(number: int, patch: Patch) -> str:
    """Returns the line that introduces a patch: its number, its text, and whether it belongs to the prompt."""
    line = f"{number:>4}  {quote(patch.text)}"
    if patch.is_prompt:
        line += "   prompt" if patch.chosen is not None or not patch.candidates else "   prompt, not sampled"
    return line


def quote(text: str) -> str:
    """Returns the text in quotes, with whitespace characters escaped."""
    return '"' + text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + '"'


# The command


def write_page(path: Path, inspection: Inspection) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(render_page(asdict(inspection)), encoding="utf-8")


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("model", nargs="?", default=".", help="folder or Hub id (default: this folder)")
    parser.add_argument("prompt", nargs="?", type=utf8, default=PROMPT, help=f"default: {PROMPT}")
    parser.add_argument("--html", type=writable, metavar="FILE", help="write a page instead of printing")
    parser.add_argument("--max_new_tokens", type=positive, default=40, help="default: 40")
    parser.add_argument("--temperature", type=float, help="in (0, 2] (default: the model's)")
    parser.add_argument("--num_candidates", type=positive, help="samples per patch (default: the model's)")
    parser.add_argument("--top_k", type=int, help="keep the k candidates of largest weight, 0 for all")
    parser.add_argument("--top_p", type=float, help="keep the smallest set of this total weight")
    parser.add_argument("--min_p", type=float, help="minimum weight relative to the largest")
    parser.add_argument("--seed", type=seed_number, default=0)
    compared = {"default": COMPARED_TEMPERATURES, "help": "printed temperatures (default: 1 0.5 0.333)"}
    parser.add_argument("--compare", type=float, nargs="+", metavar="T", **compared)
    parser.add_argument("--show", type=positive, default=5, help="candidates to print per patch (default: 5)")
    parser.add_argument("--device", help="default: a GPU if available")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with known_errors(ValueError):
        for temperature in options.compare:
            check_temperature(temperature)
    names = ("temperature", "num_candidates", "top_k", "top_p", "min_p")
    settings = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    model, tokenizer = load_calm(options.model, options.device)
    with known_errors(ValueError, OverflowError):
        inspection = inspect_text(model, tokenizer, options.prompt, options.max_new_tokens, options.seed, **settings)
    inspection.model = display_name(options.model)
    if options.html is not None:
        with known_errors(OSError):
            write_page(options.html, inspection)
        print(f"{options.html}: {len(inspection.patches)} patches.")
        return
    temperatures = {*options.compare, inspection.settings["temperature"]}
    print(format_inspection(inspection, sorted(temperatures, reverse=True), options.show))


if __name__ == "__main__":
    sys.exit(main())
