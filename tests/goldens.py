"""The golden checkpoints: tiny repositories in the published layout, and the published implementation's outputs.

The recorded forward passes ran after `torch.manual_seed(FORWARD_SEED)`.
"""

import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures"
HEAD_TYPES = ("energy", "flow", "diffusion")
FORWARD_SEED = 23


@cache
def golden_tensors(head_type: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{head_type}_k4" / "golden.safetensors")


@cache
def golden_model(head_type: str):
    """The golden checkpoint, converted and loaded; in eval mode, shared by all tests: don't change it."""
    from published import write_tokenizer

    from calm.convert_checkpoint import convert
    from calm.modeling_calm import CALMForCausalLM

    source = FIXTURES / f"{head_type}_k4"
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        convert(str(source / "calm"), str(source / "autoencoder"), Path(folder) / "bundle", tokenizer=folder)
        return CALMForCausalLM.from_pretrained(Path(folder) / "bundle")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation in units of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
