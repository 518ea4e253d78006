"""The float32 products of linear layers on a CPU, by whichever of PyTorch's two libraries is faster there.

PyTorch multiplies float32 matrices with MKL and takes oneDNN for bfloat16 alone. On processors of other makers than
MKL's, oneDNN is faster in float32 as well: on an AMD EPYC with AVX-512 at 500 instead of 220 GFLOP/s (docs/speed.md).
"""

import functools
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

try:
    from torch.utils._python_dispatch import _get_current_dispatch_mode
except ImportError:  # private: without it nobody knows whether operators are watched, and products stay plain
    _get_current_dispatch_mode = None

SWITCH = "CALM_PRODUCTS"
LEAST_ROWS = 4  # a single row reads the weights, which no library does faster
LEAST_WORK = 2**21  # multiplications from which on oneDNN makes up for what its call costs
TRIAL = 64, 768, 768  # rows, columns and width of the product that is timed; at most a few milliseconds in all
TRIAL_REPETITIONS = 7
LEAST_GAIN = 1.25  # so much faster must oneDNN be: either 2 times, or as fast as MKL


def plain_products() -> bool:
    """Whether the environment says `CALM_PRODUCTS=plain`: PyTorch's own products then, and no screening in int8."""
    return os.environ.get(SWITCH) == "plain"


def float32_is_exact() -> bool:
    """Whether products of float32 are float32's on a CPU; `torch.set_float32_matmul_precision` can make them less."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(matmul, "fp32_precision", None)  # not in older PyTorch
    return precision in ("ieee", "none") if precision else torch.get_float32_matmul_precision() == "highest"


def fast_products(num_rows: int, width: int) -> AbstractContextManager:
    """A context in which linear layers multiply by oneDNN, in float32 on a CPU and without gradients, if that pays.

    The values differ by rounding alone. Other layers, quantised ones, other dtypes and other devices are left as they
    are; so is everything under autocast, in a graph that is compiled or traced, where less than float32 was asked for
    (PyTorch then takes oneDNN itself), and where operators are watched, as a counter of FLOPs does, which doesn't know
    this one.

    Args:
        num_rows: that the layers are given.
        width: of the layers.
    """
    is_traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if torch.compiler.is_compiling() or is_traced or torch.is_grad_enabled():
        return nullcontext()
    is_large = num_rows >= LEAST_ROWS and num_rows * width * width >= LEAST_WORK
    is_watched = _get_current_dispatch_mode is None or _get_current_dispatch_mode() is not None
    pays = is_large and not is_watched and float32_is_exact() and not plain_products() and one_dnn_is_faster()
    return OneDNNProducts() if pays else nullcontext()


class OneDNNProducts(TorchFunctionMode):
    """Answers `torch.nn.functional.linear` by oneDNN where it can."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and _is_suitable(*args):
            return _one_dnn_linear(*args)
        return func(*args, **(kwargs or {}))


def _is_suitable(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    tensors = [rows, weight] if bias is None else [rows, weight, bias]
    return (
        all(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 for x in tensors)
        and all(x.device.type == "cpu" for x in tensors)
        and rows.numel() >= LEAST_ROWS * rows.shape[-1]
        and rows.numel() * len(weight) >= LEAST_WORK
        and not torch.is_autocast_enabled("cpu")
    )


def _one_dnn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@functools.cache
def one_dnn_is_faster() -> bool:
    """Measured once a process."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    num_rows, num_columns, width = TRIAL
    with torch.inference_mode(False), torch.no_grad():
        rows, weight = torch.ones(num_rows, width), torch.ones(num_columns, width)
        try:
            seconds = {product: _best_seconds(product, rows, weight) for product in (F.linear, _one_dnn_linear)}
        except RuntimeError:  # a PyTorch whose operator is another
            return False
    return seconds[F.linear] >= LEAST_GAIN * seconds[_one_dnn_linear]


def _best_seconds(product: Callable[[Tensor, Tensor], Tensor], rows: Tensor, weight: Tensor) -> float:
    seconds = []
    for _ in range(1 + TRIAL_REPETITIONS):
        start = time.perf_counter()
        product(rows, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
