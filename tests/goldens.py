"""Golden checkpoints: tiny repositories in the published layout, with outputs of the published implementation.

The recorded forward passes ran after `torch.manual_seed(FORWARD_SEED)`.
"""

from functools import cache
from pathlib import Path

import torch

from calm_transformers.benchmarks import golden
from calm_transformers.benchmarks.golden import HEAD_TYPES, relative_error

__all__ = ["FIXTURES", "FORWARD_SEED", "HEAD_TYPES", "golden_model", "golden_tensors", "relative_error"]

FIXTURES = Path(__file__).parent / "fixtures"
FORWARD_SEED = 23


@cache
def golden_tensors(head_type: str) -> dict[str, torch.Tensor]:
    return golden.recorded_tensors(head_type)


@cache
def golden_model(head_type: str):
    """Returns the converted golden checkpoint in eval mode; shared by all tests, so don't modify it."""
    return golden.recorded_model(head_type)
