"""Shows what a text was chosen from, patch by patch: `calm inspect MODEL "Once upon a time"`.

Of each written patch its distinct candidates, how often each was drawn, and what it weighs at several temperatures. Of
each patch of the prompt the same draws, made after what stands before it: whether the model would have written it.
`--html FILE` writes a page of its own that needs no network, with a slider for T.

Axes: P patches, K tokens per patch, D hidden, N draws, M distinct patches among them.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from calm_transformers.command_line import Parser, command, known_errors, natural, positive, utf8, writable
from calm_transformers.files import atomic_write
from calm_transformers.loading import check_length, load_calm
from calm_transformers.model.generation_calm_candidates import candidate_scores
from calm_transformers.model.generation_calm_weights import Truncation, candidate_weights, check_temperature
from calm_transformers.pages.app_page import ALL_CANDIDATES, text_after
from calm_transformers.pages.inspect_page import page

PROGRAM = "calm inspect"
STORY = "Once upon a time, there was a little girl named Lily."
COMPARED = (1.0, 0.5, 1 / 3)  # temperatures whose weights stand beside those of the text's own
ROWS_AT_ONCE = 8  # patches of the prompt
BAR = 12  # characters of a weight of 1


@dataclass
class Candidate:
    """
    Args:
        text: as it would continue what stands before it.
        count: how often it was drawn.
        weight: its share in the choice at the text's temperature, after truncation.
    """

    text: str
    count: int
    weight: float


@dataclass
class Patch:
    """
    Args:
        text: what it adds to the text, in which special tokens are nothing.
        tokens: their strings, as the tokenizer has them.
        is_prompt: whether it was given.
        candidates: those with most weight first; none for the first patch of the prompt, before which nothing stands.
        chosen: which candidate it is; `None` where it is none of them.
    """

    text: str
    tokens: list[str]
    is_prompt: bool
    candidates: list[Candidate] = field(default_factory=list)
    chosen: int | None = None


@dataclass
class Inspection:
    """
    Args:
        model: its name.
        patch_size: K.
        settings: temperature, num_candidates, top_k, top_p, min_p and seed of the text.
        patches: prompt and text in order.
    """

    model: str
    patch_size: int
    settings: dict[str, Any]
    patches: list[Patch]

    @property
    def text(self) -> str:
        return "".join(patch.text for patch in self.patches)


class TextPieces:
    """What tokens add to the text before them, which is not what they are alone: spaces and bytes are shared.

    Args:
        tokenizer: of the model.
        ids: of the whole text.
    """

    def __init__(self, tokenizer, ids: Sequence[int]):
        self.tokenizer, self.ids = tokenizer, list(ids)

    def of(self, tokens: Sequence[int], begin: int) -> str:
        """The text of these tokens after `ids[:begin]`; special ones by their names."""
        return text_after(self.tokenizer, self.ids[:begin], tokens)

    def in_turn(self, lengths: Sequence[int]) -> list[str]:
        """The text, without special tokens, cut after so many tokens each; a character waits for its last byte."""
        pieces, shown, end = [], 0, 0
        for length in lengths:
            end += length
            text = self.tokenizer.decode(self.ids[:end], skip_special_tokens=True)
            if end < sum(lengths):
                text = text.rstrip("\ufffd")
            pieces.append(text[shown:])
            shown = max(shown, len(text))
        return pieces


def inspect_text(model, tokenizer, prompt: str, max_new_tokens: int, seed: int, **options) -> Inspection:
    """Writes a text and says what each patch was chosen from.

    Args:
        model: a CALM.
        tokenizer: its tokenizer.
        prompt: what the text begins with.
        max_new_tokens: how many tokens to write.
        seed: of the text, and of what is drawn at the prompt's patches.
        options: of `generate`: temperature, num_candidates, top_k, top_p, min_p; those left out are the model's.

    Raises:
        ValueError: an option, or a prompt, that `generate` refuses.
    """
    sampling = model.patch_sampling(do_sample=True, sampling_method="batch", **options)
    ids_1L = tokenizer(prompt, return_tensors="pt").input_ids.long().to(model.device)
    check_length(model, ids_1L.shape[1], max_new_tokens)
    keeps_all = (
        sampling.takes_single_sample
    )  # at T = 1 a step would draw one patch: here it draws N, which is the same law
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
            **{**options, **({"top_k": ALL_CANDIDATES} if keeps_all else {})},
        )
    packed = model.pack_for_generation(ids_1L, bos_token=model.generation_config.bos_token_id)["input_ids"]
    patches = prompt_patches(model, tokenizer, packed, ids_1L.shape[1], sampling, seed)
    patches += written_patches(tokenizer, output, ids_1L.shape[1], model.config.patch_size)
    settings = {name: getattr(sampling, name) for name in ("temperature", "num_candidates", "top_k", "top_p", "min_p")}
    return Inspection("", model.config.patch_size, {**settings, "seed": seed}, patches)


def written_patches(tokenizer, output, prompt_length: int, patch_size: int) -> list[Patch]:
    """The patches that `generate` wrote; the last one ends where the text does."""
    ids = output.sequences[0].tolist()
    pieces = TextPieces(tokenizer, ids)
    starts = range(prompt_length, len(ids), patch_size)
    lengths = [min(patch_size, len(ids) - start) for start in starts]
    texts = pieces.in_turn([prompt_length, *lengths])[1:]
    return [
        Patch(
            text,
            tokenizer.convert_ids_to_tokens(ids[start : start + length]),
            False,
            candidates_of(step, 0, pieces, start),
            int(step.chosen[0]),
        )
        for start, length, text, step in zip(starts, lengths, texts, output.scores, strict=True)
    ]


def candidates_of(scores, row: int, pieces: TextPieces, begin: int) -> list[Candidate]:
    """Those of a row, which stand where token `begin` of the text is."""
    patches, counts, weights = (values[row].tolist() for values in (scores.patches, scores.counts, scores.weights))
    return [
        Candidate(pieces.of(tokens, begin), count, weight)
        for tokens, count, weight in zip(patches, counts, weights, strict=True)
        if count
    ]


def prompt_patches(model, tokenizer, packed_1L, num_tokens: int, sampling, seed: int) -> list[Patch]:
    """The prompt's patches, each with what the model draws after those before it.

    Args:
        model: as in `inspect_text`.
        tokenizer: as there.
        packed_1L: the prompt as the model reads it.
        num_tokens: of the prompt, without what fills its first patch.
        sampling: how many are drawn, and the law of the weights.
        seed: of the draws.
    """
    size, ids = model.config.patch_size, packed_1L[0].tolist()
    fill = len(ids) - num_tokens
    spans = [(start, start + size) for start in range(0, len(ids), size)]
    own = [(max(a, fill), b) for a, b in spans]
    pieces = TextPieces(tokenizer, ids[fill:])
    texts = pieces.in_turn([max(b - a, 0) for a, b in own])
    patches = [
        Patch(text, tokenizer.convert_ids_to_tokens(ids[a:b]), True) for text, (a, b) in zip(texts, own, strict=True)
    ]
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        hidden_PD = model(input_ids=packed_1L).last_hidden_state[0, :-1]
        for begin in range(0, len(hidden_PD), ROWS_AT_ONCE):
            hidden_RD = hidden_PD[begin : begin + ROWS_AT_ONCE]
            scores = drawn_candidates(model, hidden_RD, sampling, generator)
            for row in range(len(hidden_RD)):
                number = begin + row + 1
                a, b = spans[number]
                patch = patches[number]
                patch.candidates = candidates_of(scores, row, pieces, own[number][0] - fill)
                same = (scores.patches[row] == packed_1L[0, a:b].to(scores.patches)).all(-1).nonzero()
                patch.chosen = int(same[0, 0]) if len(same) else None
    return patches


def drawn_candidates(model, hidden_RD, sampling, generator):
    """N draws after each hidden state, as `CandidateScores`; what is chosen among them has no meaning here."""
    drawing = replace(
        sampling, lazy_decoding=False, top_k=ALL_CANDIDATES if sampling.takes_single_sample else sampling.top_k
    )
    pool, index_R = model.choose_patches(hidden_RD, drawing, generator)
    return candidate_scores(pool, index_R, sampling.weigh)


def weights_at(counts: Sequence[int], temperature: float, truncation) -> list[float]:
    """What distinct patches that were drawn so often weigh at a temperature: C(count, 1/T), truncated, of sum 1."""
    counts_M = torch.tensor(counts)
    first_M = counts_M.cumsum(0) - counts_M
    return candidate_weights(first_M.repeat_interleave(counts_M)[None], temperature, truncation)[0, first_M].tolist()


# The listing


def listing(inspection: Inspection, temperatures: Sequence[float], num_shown: int) -> str:
    """The inspection as plain text: a line a patch, below it its candidates and their weights at each temperature."""
    settings = inspection.settings
    truncation = Truncation(settings["top_k"], settings["top_p"], settings["min_p"])
    own = settings["temperature"]
    names = [f"T={temperature:.3g}" + ("*" if temperature == own else "") for temperature in temperatures]
    lines = [
        f"{inspection.model}: K = {inspection.patch_size}, "
        + ", ".join(f"{name} = {value:.6g}" for name, value in settings.items()),
        "",
        inspection.text,
        "",
        "Of each patch: > is what was written, n how often a candidate was drawn, T=… what it weighs there"
        " (* the text's own).",
    ]
    for number, patch in enumerate(inspection.patches, start=1):
        lines += ["", patch_line(number, patch)]
        if not patch.candidates:
            continue
        counts = [candidate.count for candidate in patch.candidates]
        columns = [weights_at(counts, temperature, truncation) for temperature in temperatures]
        lines.append(f"{'':6}{'candidate':<24}{'n':>5}  " + "".join(f"{name:>9}" for name in names))
        shown = list(range(min(num_shown, len(counts))))
        if patch.chosen is not None and patch.chosen not in shown:
            shown.append(patch.chosen)
        for i in shown:
            candidate = patch.candidates[i]
            mark = ">" if i == patch.chosen else " "
            values = "".join(f"{column[i]:>9.3f}" for column in columns)
            bar = "█" * round(candidate.weight * BAR)
            lines.append(f"    {mark} {visible(candidate.text):<24}{candidate.count:>5}  {values}  {bar}".rstrip())
        if len(counts) > len(shown):
            lines.append(f"      … and {len(counts) - len(shown)} more")
    return "\n".join(lines)


def patch_line(number: int, patch: Patch) -> str:
    words = [f"{number:>4}  {visible(patch.text or ''.join(patch.tokens))}"]  # an end has no text
    if patch.is_prompt:
        words.append("prompt" if patch.chosen is not None or not patch.candidates else "prompt, not among the draws")
    return "   ".join(words)


def visible(text: str) -> str:
    """In quotes, with what can't be seen spelled out."""
    return '"' + text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + '"'


# The command


def write_page(path: Path, inspection: Inspection) -> None:
    with atomic_write(path) as aside:
        aside.write_text(page(asdict(inspection)), encoding="utf-8")


def parse(argv: list[str] | None):
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("model", nargs="?", default=".", help="folder or Hub id (default: this folder)")
    parser.add_argument("prompt", nargs="?", type=utf8, default=STORY, help=f"default: {STORY}")
    parser.add_argument("--html", type=writable, metavar="FILE", help="write a page in place of the listing")
    parser.add_argument("--max_new_tokens", type=positive, default=40, help="default: 40")
    parser.add_argument("--temperature", type=float, help="in (0, 2] (default: the model's)")
    parser.add_argument("--num_candidates", type=positive, help="draws a patch (default: the model's)")
    parser.add_argument("--top_k", type=int, help="patches that may be chosen, 0 for all")
    parser.add_argument("--top_p", type=float, help="share of the weight that may be chosen")
    parser.add_argument("--min_p", type=float, help="share of the largest weight that a patch must have")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument(
        "--compare", type=float, nargs="+", default=COMPARED, metavar="T", help="in the listing (default: 1 0.5 0.333)"
    )
    parser.add_argument("--show", type=positive, default=5, help="candidates of a patch in the listing (default: 5)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with known_errors(ValueError):
        for temperature in options.compare:
            check_temperature(temperature)
    names = ("temperature", "num_candidates", "top_k", "top_p", "min_p")
    stated = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    model, tokenizer = load_calm(options.model, options.device)
    with known_errors(ValueError, OverflowError):
        inspection = inspect_text(model, tokenizer, options.prompt, options.max_new_tokens, options.seed, **stated)
    inspection.model = options.model
    if options.html is not None:
        with known_errors(OSError):
            write_page(options.html, inspection)
        print(f"{options.html}: {len(inspection.patches)} patches.")
        return
    own = inspection.settings["temperature"]
    print(listing(inspection, sorted({*options.compare, own}, reverse=True), options.show))


if __name__ == "__main__":
    sys.exit(main())
