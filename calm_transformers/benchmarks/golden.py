"""Compares a device's outputs with golden tensors recorded from the published implementation.

A recording is a folder with a language model and an autoencoder in the published layout (`calm`, `autoencoder`), and
golden.safetensors with its inputs and outputs in float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor

from calm_transformers.conversion.convert import convert
from calm_transformers.model.modeling_calm import CALMForCausalLM

RECORDINGS = Path(__file__).parents[2] / "tests" / "fixtures"
NUM_TOKENS = 95  # the conversion adds a padding token
HEAD_TYPES = ("energy", "flow", "diffusion")


def recording_folder(head_type: str) -> Path:
    return RECORDINGS / f"{head_type}_k4"


def recorded_tensors(head_type: str) -> dict[str, Tensor]:
    return load_file(recording_folder(head_type) / "golden.safetensors")


def recorded_model(head_type: str) -> CALMForCausalLM:
    """Converts and loads a recording's checkpoint: on the CPU, float32, in eval mode."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {f"<{number}>": number for number in range(NUM_TOKENS)}  # required by the conversion
        Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")).save(f"{folder}/tokenizer.json")
        source, bundle = recording_folder(head_type), Path(folder) / "bundle"
        convert(str(source / "calm"), str(source / "autoencoder"), bundle, tokenizer=folder)
        return CALMForCausalLM.from_pretrained(bundle)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute error divided by the largest absolute expected value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@torch.no_grad()
def golden_errors(head_type: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Returns relative errors of hidden states, posterior means and logits on a device in a dtype."""
    golden, model = recorded_tensors(head_type), recorded_model(head_type).to(device, dtype)  # pyright: ignore[reportArgumentType]
    ids = golden["input_ids"].to(device)
    outputs = {
        "calm.hidden_states": model(ids).last_hidden_state,
        "ae.mean": model.autoencoder.encode(ids)[0],
        "ae.logits": model.autoencoder.decode(golden["ae.latents"].to(device, dtype)).flatten(1, 2),
    }
    return {name: relative_error(value.cpu(), golden[name]) for name, value in outputs.items()}
