"""What lazy decoding saves on a trained CALM, and whether it misses a repetition.

    python -m calm.benchmarks.repetitions --model . --temperature 0.5 --num_candidates 200 --steps 64

The model writes texts, other ones than those on which `python -m calm.calibrate_radius` measures its radius, and every
candidate of every step is decoded in full. Lazy decoding, without the radius and with it, must find the same
repetitions, and the choice with the same seed must be the same patch. Every token is read through `VocabularyScreen`,
too, however small the vocabulary, and compared.

Axes: C recorded steps, N candidates, K tokens per patch, Z latent size, M states, V vocabulary, d width.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from calm.benchmarks.workloads import distinct_share
from calm.calibrate_radius import NUM_TEXTS, Recording, load, record_candidates
from calm.candidates_calm import LazyPool, trusted_radius
from calm.command_line import Parser, command, known_errors, positive
from calm.randomness_calm import StepRandomness
from calm.screening_calm import VocabularyScreen
from calm.weights_calm import check_num_candidates, choose_by_weight, patch_classes

SEED = 1  # the radius is measured with 0


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
    for seed, (patches_NK, latents_NZ) in enumerate(zip(recording.patches_CNK, recording.latents_CNZ, strict=True)):
        row = torch.zeros(1, dtype=torch.long, device=latents_NZ.device)
        latents_N1Z = latents_NZ[:, None]
        pool = LazyPool(lambda *_, drawn=latents_N1Z: drawn, row, model.autoencoder, radius=radius)
        pool.extend(row, len(patches_NK))
        lazy_1N, plain_1N = pool.classes(row), patch_classes(patches_NK[None])
        seeded = torch.Generator(row.device).manual_seed(seed)
        noise_1N = StepRandomness(seeded).exponential(row, len(patches_NK))
        chosen, expected = (choose_by_weight(classes, noise_1N, temperature) for classes in (lazy_1N, plain_1N))
        total.other_choices += int(not torch.equal(pool.tokens(row, chosen), patches_NK[expected]))
        total.missed += int((lazy_1N != plain_1N).sum())
        total.tokens_read += int((pool.tokens_BNK >= 0).sum())
        total.candidates += len(patches_NK)
        total.steps += 1
    return total


def other_tokens(model, recording: Recording) -> int | None:
    """How many tokens the int8 screen reads otherwise than the full product; None where PyTorch can't screen."""
    decoder = model.autoencoder.decoder
    weight_Vd = decoder.lm_head.weight
    if not VocabularyScreen.is_possible(weight_Vd):
        return None
    screen, total = VocabularyScreen(weight_Vd), 0
    with torch.no_grad():
        for patches_NK, latents_NZ in zip(recording.patches_CNK, recording.latents_CNZ, strict=True):
            states_Md = decoder.finish(decoder.expand(latents_NZ)).flatten(0, 1)
            ids_M = screen.argmax(states_Md, weight_Vd)
            total += int((ids_M != patches_NK.flatten()).sum()) if ids_M is not None else patches_NK.numel()
    return total


def report(model, recording: Recording, temperature: float) -> None:
    """Prints the figures; those with a radius where the recording has one."""
    print(f"distinct: {distinct_share(recording.patches_CNK):.3f} of the candidates")
    print("| radius | candidates | tokens read of each | missed | other choices |\n|" + " --- |" * 5)
    for radius in dict.fromkeys([None, recording.radius]):
        found = compare(model, recording, temperature, radius)
        each = found.tokens_read / found.candidates
        text = "–" if radius is None else f"{radius:.2f}"
        counts = f"{found.candidates} | {each:.2f} | {found.missed} | {found.other_choices} of {found.steps}"
        print(f"| {text} | {counts} |")
    others = other_tokens(model, recording)
    if others is not None:
        print(f"screened in int8: {others} of {recording.patches_CNK.numel()} tokens other than the full product's")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm.benchmarks.repetitions", __doc__)
    parser.add_argument("--model", default=".", help="folder or Hub id of a trained CALM")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--num_candidates", type=positive, default=200)
    parser.add_argument("--steps", type=positive, default=128, help=f"of {NUM_TEXTS} texts")
    options = parser.parse_args(argv)
    with known_errors():
        check_num_candidates(options.num_candidates, options.temperature)
        model = load(options.model, "cpu", torch.float32)
    radius = trusted_radius(model)
    recording = record_candidates(model, options.temperature, options.num_candidates, options.steps, seed=SEED)
    report(model, Recording(recording.patches_CNK, recording.latents_CNZ, radius), options.temperature)


if __name__ == "__main__":
    sys.exit(main())
