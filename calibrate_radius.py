"""Measures how far apart two latent vectors of a trained CALM may be and still be the same patch: its
`repetition_radius`, which spares generation the decoding of candidates that are alone.

    python -m calm.calibrate_radius --model FOLDER --steps 64 --save

The model writes texts, and every candidate of every step is decoded in full. The radius is the largest distance
between two candidates of one step that were the same patch, in the first half of the steps, times a margin of 1.5, and
at least a hundredth of the longest latent vector. The second half must hold no such two further apart, or the
measurement is refused. `--save` writes the radius to the model's config.json, and what it was measured at: a model
with other weights doesn't use it.
"""

# B texts, C recorded steps of all texts, N candidates, K tokens per patch, Z latent size

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from calm.candidates_calm import weights_fingerprint
from calm.checkpoint_files import DTYPES
from calm.command_line import InputError, Parser, command, known_errors, positive
from calm.loading import device_of, load_whole, reading
from calm.modeling_calm import CALMForCausalLM
from calm.progress import progress_bar
from calm.weights_calm import check_num_candidates, patch_classes

MARGIN = 1.5
# Of the latent vectors' length: some twenty times what cdist in float32 is wrong by. A head that draws the same point
# for the same tokens would else get a radius of rounding errors, which other sizes and processors exceed.
LEAST_SHARE = 1e-2
NUM_TEXTS = 8


@dataclass
class Recording:
    """Candidates that a CALM drew while it wrote, in their order.

    Args:
        patches_CNK: their tokens.
        latents_CNZ: their latent vectors.
        radius: the radius that their distances are compared with, if any.
    """

    patches_CNK: Tensor
    latents_CNZ: Tensor
    radius: float | None = None

    def halves(self) -> tuple[Recording, Recording]:
        half = len(self.patches_CNK) // 2
        first = Recording(self.patches_CNK[:half], self.latents_CNZ[:half], self.radius)
        return first, Recording(self.patches_CNK[half:], self.latents_CNZ[half:], self.radius)


def record_candidates(
    model: CALMForCausalLM,
    temperature: float,
    num_candidates: int,
    steps: int,
    num_texts: int = NUM_TEXTS,
    seed: int = 0,
) -> Recording:
    """All candidates of so many steps of each of several texts, which the model writes from BOS on.

    Raises InputError where the model has no BOS.
    """
    if model.config.bos_token_id is None:
        raise InputError("the model's config.json has no bos_token_id, with which its texts would begin.")
    latents, patches = [], []

    def record(_, __, latents_NBZ: Tensor) -> None:
        latents.append(latents_NBZ.transpose(0, 1))
        patches.append(model.autoencoder.decode_tokens(latents[-1]))
        bar.update()

    hook = model.head.register_forward_hook(record)
    start = torch.full((num_texts, 1), model.config.bos_token_id, device=model.device)
    try:
        with progress_bar(None, "Writing", "step", steps) as bar:
            model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=temperature,
                num_candidates=num_candidates,
                sampling_method="batch",
                generator=torch.Generator(model.device).manual_seed(seed),
                max_new_tokens=steps * model.config.patch_size,
                eos_token_id=None,
                pad_token_id=0,
            )
    finally:
        hook.remove()
    return Recording(torch.cat(patches), torch.cat(latents))


def largest_distance(recording: Recording) -> float:
    """Between two candidates of one step that are the same patch; 0 where none are."""
    largest = 0.0
    for patches_NK, latents_NZ in zip(recording.patches_CNK, recording.latents_CNZ, strict=True):
        class_N = patch_classes(patches_NK[None])[0]
        is_equal_NN = (class_N[:, None] == class_N) & ~torch.eye(len(class_N), dtype=torch.bool, device=class_N.device)
        if is_equal_NN.any():
            largest = max(largest, float(torch.cdist(latents_NZ.float(), latents_NZ.float())[is_equal_NN].max()))
    return largest


def calibrated_radius(recording: Recording) -> float | None:
    """The radius that the first half of a recording gives and the second half bears out.

    None where no two candidates of the first half are the same patch. Raises InputError where two of the second
    half are, further apart than that.
    """
    first, second = (largest_distance(half) for half in recording.halves())
    if first == 0:
        return None
    length = float(recording.latents_CNZ.float().norm(dim=-1).max())
    radius = max(MARGIN * first, LEAST_SHARE * length)
    if second > radius:
        raise InputError(
            f"the same patch was found {second:.3g} apart in the second half of the steps, where the first half gives "
            f"a radius of {radius:.3g}: take more --steps."
        )
    return radius


def load(name: str, device: str | None, dtype: torch.dtype | str = "auto", **changes) -> CALMForCausalLM:
    """The CALM of a folder or Hub id, with changes of its configuration.

    Raises:
        ValueError: there is no such device or no model, or it is no CALM.
    """
    place = device_of(device)
    with reading(name):
        if PretrainedConfig.get_config_dict(name)[0].get("model_type") != "calm":
            raise ValueError(f"--model {name} is no CALM.")
    model = load_whole(CALMForCausalLM.from_pretrained, name, dtype=dtype, **changes)
    return model.to(place).eval()  # pyright: ignore[reportArgumentType]  # upstream's wrapper of `to` loses `self`


def calibrate(
    model: CALMForCausalLM, temperature: float, num_candidates: int, steps: int, dtype: torch.dtype | None = None
) -> dict:
    """The two fields of config.json: the radius, and what it was measured at.

    Args:
        model: as the checkpoint has it, for its weights are what the radius is tied to.
        temperature: T of the texts.
        num_candidates: N.
        steps: patches of each text.
        dtype: in which the model is to draw; `None` leaves it as it is.

    Raises:
        InputError: the halves of the steps contradict each other, the weights can't be read, or no BOS.
    """
    weights = weights_fingerprint(model)
    if weights is None:
        raise InputError("the weights can't be read (are they quantised?), so a radius could not be tied to them.")
    if dtype is not None:
        model = model.to(dtype)  # pyright: ignore[reportArgumentType]  # as in `load`
    radius = calibrated_radius(record_candidates(model, temperature, num_candidates, steps))
    measured_at = {
        "weights": weights,
        "temperature": temperature,
        "num_candidates": num_candidates,
        "steps": steps,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return {"repetition_radius": radius, "repetition_radius_measured_at": measured_at if radius else None}


def save(path: Path, fields: dict) -> None:
    """Changes fields of a config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(json.dumps(config | fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m calm.calibrate_radius", __doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained CALM")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--num_candidates", type=positive, default=200)
    parser.add_argument("--steps", type=positive, default=128, help=f"patches of each of {NUM_TEXTS} texts")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: the checkpoint's")
    parser.add_argument("--save", action="store_true", help="write to config.json of the folder")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    path = Path(options.model) / "config.json"
    with known_errors():
        if options.save and not path.exists():
            raise ValueError(f"--save: there is no {path}; name a folder.")
        check_num_candidates(options.num_candidates, options.temperature)
        if options.steps < 2:
            raise ValueError(f"--steps {options.steps}: one half measures, the other checks, so at least 2.")
        # In the checkpoint's own type, and without the radius of before, which must not decide what is drawn.
        model = load(options.model, options.device, repetition_radius=None)
    dtype = DTYPES.get(options.dtype)
    with known_errors(InputError):
        fields = calibrate(model, options.temperature, options.num_candidates, options.steps, dtype)
    if fields["repetition_radius"] is None:
        print("no candidate came twice, so there is no radius to measure.")
    print(json.dumps(fields, indent=2))
    if options.save:
        with known_errors(OSError):
            save(path, fields)


if __name__ == "__main__":
    sys.exit(main())
