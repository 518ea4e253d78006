"""What lazy decoding saves on a trained CALM, whether it misses a repetition, and the model's `repetition_radius`.

    python -m calm.benchmarks.repetitions --model . --temperature 0.5 --num_candidates 200 --steps 128 [--save]

The model writes texts, and every candidate of every step is decoded in full. The radius is the largest distance
between two latent vectors of one step that were the same patch, in the first half of the steps, times a margin of
1.5. On the second half, and without the radius on all of it, lazy decoding must find the same repetitions, and the
choice with the same seed must be the same patch. Every token is read through `VocabularyScreen`, too, however small
the vocabulary, and compared. `--save` writes the radius to the model's config.json.

Axes: C recorded steps, N candidates, K tokens per patch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calm.benchmarks.workloads import BenchmarkError, Recording, distinct_share, record_candidates, trained_model
from calm.candidates_calm import LazyCandidates
from calm.command_line import Parser, command, known_errors
from calm.evaluation.models import is_calm
from calm.samplers_calm import batch_temperature_select, check_num_candidates, group_patches
from calm.screening_calm import VocabularyScreen

MARGIN = 1.5


def calibrated_radius(recording: Recording) -> float | None:
    """The largest distance between equal candidates of a step, times `MARGIN`; None when there are none."""
    largest = 0.0
    for patches_NK, latents_NZ in zip(recording.patches_CMK, recording.latents_CMZ, strict=True):
        group_N = group_patches(patches_NK[None])[0][0]
        is_equal_NN = (group_N[:, None] == group_N) & ~torch.eye(len(group_N), dtype=torch.bool, device=group_N.device)
        if is_equal_NN.any():
            largest = max(largest, float(torch.cdist(latents_NZ, latents_NZ)[is_equal_NN].max()))
    return MARGIN * largest if largest > 0 else None


@dataclass
class Comparison:
    """Lazy decoding against decoding everything.

    Args:
        candidates: how many there were.
        tokens_read: tokens whose logits were computed, of K for each candidate.
        missed: candidates that were not found to repeat the same one.
        other_choices: steps, of `steps`, in which the same seed chose another patch.
    """

    steps: int = 0
    candidates: int = 0
    tokens_read: int = 0
    missed: int = 0
    other_choices: int = 0


def compare(model, recording: Recording, temperature: float, radius: float | None) -> Comparison:
    """Tells the recorded candidates apart lazily, a step at a time, and chooses one."""
    total = Comparison()
    for seed, (patches_NK, latents_NZ) in enumerate(zip(recording.patches_CMK, recording.latents_CMZ, strict=True)):
        candidates = LazyCandidates(model.autoencoder, 1, radius=radius)
        ids_1N1 = candidates.add(torch.zeros(1, dtype=torch.long, device=latents_NZ.device), latents_NZ[:, None])
        group_N, _ = group_patches(patches_NK[None])
        total.missed += int((group_patches(ids_1N1)[0] != group_N).sum())
        plain, lazy = (_choice(patches, temperature, seed) for patches in (patches_NK[None], ids_1N1))
        total.other_choices += int(not torch.equal(candidates.patches(lazy), plain))
        total.tokens_read += int((candidates.tokens_RMK >= 0).sum())
        total.candidates += len(patches_NK)
        total.steps += 1
    return total


def other_tokens(model, recording: Recording) -> int | None:
    """How many tokens the int8 screen reads otherwise than the full product; None where PyTorch can't screen."""
    decoder = model.autoencoder.decoder
    weight_Vd = decoder.lm_head.weight
    try:
        screen = VocabularyScreen(weight_Vd)
    except (AttributeError, RuntimeError):
        return None
    total = 0
    with torch.no_grad():
        for patches_NK, latents_NZ in zip(recording.patches_CMK, recording.latents_CMZ, strict=True):
            states_Md = decoder.finish(decoder.expand(latents_NZ)).flatten(0, 1)
            ids_M = screen.argmax(states_Md, weight_Vd)
            total += int((ids_M != patches_NK.flatten()).sum()) if ids_M is not None else patches_NK.numel()
    return total


def _choice(patches_1NK: Tensor, temperature: float, seed: int) -> Tensor:
    generator = torch.Generator(patches_1NK.device).manual_seed(seed)
    return batch_temperature_select(patches_1NK, temperature, generator)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm.benchmarks.repetitions", __doc__)
    parser.add_argument("--model", default=".", help="folder or Hub id of a trained CALM")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--num_candidates", type=int, default=200)
    parser.add_argument("--steps", type=int, default=128, help="of 8 texts")
    parser.add_argument("--save", action="store_true", help="write the radius to config.json of the folder")
    options = parser.parse_args(argv)
    with known_errors(ValueError, OSError):
        check_num_candidates(options.num_candidates, options.temperature)
        if options.steps < 2:
            raise BenchmarkError(f"--steps {options.steps}: one half calibrates, the other checks, so at least 2.")
        path = Path(options.model) / "config.json"
        if options.save and not path.exists():
            raise BenchmarkError(f"--save: there is no {path}; name a folder.")
        model = trained_model(options.model, torch.device("cpu"), torch.float32)
        if not is_calm(model):
            raise BenchmarkError(f"--model {options.model} is no CALM.")
    radius = report(model, options)
    if options.save:
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"repetition_radius": radius}, indent=2, sort_keys=True) + "\n")


def report(model, options: argparse.Namespace) -> float | None:
    """Prints the figures and returns the radius."""
    whole = record_candidates(model, options.temperature, options.num_candidates, options.steps)
    half = len(whole.patches_CMK) // 2
    first = Recording(whole.patches_CMK[:half], whole.latents_CMZ[:half])
    second = Recording(whole.patches_CMK[half:], whole.latents_CMZ[half:])
    radius = calibrated_radius(first)
    print(f"distinct: {distinct_share(whole.patches_CMK):.3f} of the candidates; radius: {radius}")
    print("| candidates of | radius | candidates | tokens read of each | missed | other choices |\n|" + " --- |" * 6)
    cases = [("all steps", whole, None)] + ([("second half", second, radius)] if radius else [])
    for name, recording, limit in cases:
        found = compare(model, recording, options.temperature, limit)
        each = found.tokens_read / found.candidates
        text = "–" if limit is None else f"{limit:.2f}"
        counts = f"{found.candidates} | {each:.2f} | {found.missed} | {found.other_choices} of {found.steps}"
        print(f"| {name} | {text} | {counts} |")
    others = other_tokens(model, whole)
    if others is not None:
        print(f"screened in int8: {others} of {whole.patches_CMK.numel()} tokens other than the full product's")
    return radius


if __name__ == "__main__":
    sys.exit(main())
