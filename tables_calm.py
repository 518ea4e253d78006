"""Small tensors that depend on no data: each is made once a device, or is part of a compiled step."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from torch._guards import detect_fake_mode
except ImportError:  # private: without it tables that are made in a FakeTensorMode are kept

    def detect_fake_mode(inputs: Any = None) -> Any:
        return None


TABLES_KEPT = 64  # of each kind


def made_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what a function returns for its arguments, which must be hashable and say the device."""

    @functools.lru_cache(TABLES_KEPT)
    def keep(*arguments):
        with torch.inference_mode(False):  # a table made in inference mode could not be used in training
            return function(*arguments)

    @functools.wraps(function)
    def call(*arguments):
        # A graph makes its own, on its device: of one that is kept it would know neither the maker nor the content.
        # Tables without content, as a FakeTensorMode makes them, are no one else's.
        is_traced = torch.compiler.is_compiling() or detect_fake_mode() is not None
        return function(*arguments) if is_traced else keep(*arguments)

    return call


@made_once
def numbers_up_to(end: int, device: torch.device) -> Tensor:
    """0 … end − 1."""
    return torch.arange(end, device=device)


def where_float64_is(device: torch.device) -> torch.device:
    """The device itself, if it has float64."""
    return torch.device("cpu") if device.type == "mps" else device


def to_device(values: list[int], device: torch.device) -> Tensor:
    """A tensor of them, without waiting for a GPU of CUDA; others may read memory that is freed by then."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=device.type == "cuda")
