"""Cached tables, and two faster kernels for generation on a CPU.

`generate` runs backbone, head and autoencoder in the context `cpu_kernels`, which uses each kernel where it is faster:

**float32 linear layers by oneDNN.** PyTorch multiplies float32 matrices with MKL, and uses oneDNN for bfloat16 alone.
Where the processor isn't Intel's, oneDNN is faster in float32 as well: on an AMD EPYC with AVX-512 it reaches 500
instead of 220 GFLOP/s (docs/results/speed.md).

**The argmax over a large vocabulary, int8 first** (`VocabularyScreen`). The matmul with the vocabulary is much of what
generation computes, at T < 1 most of it, and only its argmax is needed. An int8 matmul takes a quarter to a half of
the time; its error is bounded, and so it rules out most rows of the matrix. The remaining ones are multiplied without
rounding.

With w = ŵ + e and x = x̂ + r, where ŵ and x̂ are rounded, |w·x − ŵ·x̂| = |w·r + e·x̂| <= ‖w‖·‖r‖ + ‖e‖·‖x̂‖
(Cauchy–Schwarz). Rows of similar length form a group, which shares one quantisation step and is judged by its largest
product. Rows and states are first rotated alike: no product changes, and no column is so wide that others round to 0.

Axes: M states, d their width, V vocabulary, K tokens per patch, T rows of a tile, G groups, I rows of a group, S
survivors (pairs of a state and a group).
"""

import functools
import importlib
import os
import threading
import timeit
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SWITCH = "CALM_MATMUL_BACKEND"
MIN_ROWS = 4  # a single row is bound by the memory that the weights are read from
MIN_MULTIPLICATIONS = 2**21  # from here on oneDNN makes up for what its call costs
MIN_SPEEDUP = 1.25  # oneDNN is either 2 times as fast as MKL, or no faster
VOCABULARY_TILE = {"cpu": 2**11, "other": 2**15}  # on a CPU a tile of logits stays in the cache
STATES_CHUNK_SIZE = {"cpu": 400, "other": 2**13}
MIN_STATES = 16  # matmuls are slower with 2 … 15 columns than with 16, on a CPU by half
TILE = 2**12  # int8 rows multiplied at a time: the products stay in the cache
GROUP_SIZE = 8  # rows with one common bound
MAX_STATE = 127
MAX_WEIGHTS = 127, 63  # without VNNI, sums of two products overflow with 8 bits on both sides
MAX_SURVIVORS = 2**14  # with more, the full matmul is better
SURVIVORS_CHUNK_SIZE = 2**9
SAMPLE_STRIDE = 4099  # prime, so that all columns are sampled


def private_function(path: str, default: Any) -> Any:
    """Returns a function that PyTorch doesn't promise to keep, "module.name", or `default` where it is gone."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return default


# Without detect_fake_mode, tables of fake tensors are cached as well; without _get_current_dispatch_mode a mode that
# counts operators, as for FLOPs, can't be seen, and so PyTorch's own kernels are used.
detect_fake_mode = private_function("torch._guards.detect_fake_mode", lambda: None)
current_dispatch_mode = private_function("torch.utils._python_dispatch._get_current_dispatch_mode", lambda: "unknown")


def cached_per_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Caches what a function returns for its arguments, which must be hashable and include the device."""

    @functools.lru_cache(64)
    def cached(*arguments):
        with torch.inference_mode(False):  # a table made in inference mode could not be used in training
            return function(*arguments)

    @functools.wraps(function)
    def call(*arguments):
        # A traced graph computes its own tables, and those of a FakeTensorMode, which have no values, aren't shared.
        is_traced = torch.compiler.is_compiling() or detect_fake_mode() is not None
        return function(*arguments) if is_traced else cached(*arguments)

    return call


@cached_per_device
def arange(end: int, device: torch.device) -> Tensor:
    """Returns 0 … end − 1."""
    return torch.arange(end, device=device)


def float64_device(device: torch.device) -> torch.device:
    """Returns the device itself if it has float64, else the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def as_tensor(values: list[int], device: torch.device) -> Tensor:
    """Returns a tensor of them, without waiting for CUDA; other devices may read memory that is freed by then."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=device.type == "cuda")


ACTIVE = threading.local()  # `in_context`: whether this thread is in `cpu_kernels`


def _are_allowed() -> bool:
    """Whether results may differ from PyTorch's own by rounding, and nothing traces, counts or differentiates them."""
    precision = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)  # newer PyTorch's
    is_exact = precision in ("ieee", "none") if precision else torch.get_float32_matmul_precision() == "highest"
    return is_exact and not (
        torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.are_deterministic_algorithms_enabled()
        or os.environ.get(SWITCH) == "torch"
        or current_dispatch_mode() is not None
    )


@contextmanager
def cpu_kernels(num_rows: int, width: int) -> Iterator[None]:
    """Lets linear layers and `vocabulary_argmax` in the block use this file's kernels where these are faster.

    The values differ from PyTorch's own by rounding alone. Only plain layers and tensors on a CPU are affected, and
    nothing under autograd, autocast, `torch.compile`, tracing, modes that count operators, deterministic algorithms,
    reduced float32 precision, or with the environment variable CALM_MATMUL_BACKEND=torch.

    Linear layers do so if they get at least a few rows, `num_rows` of about `width` elements; the argmax in any case.
    """
    if torch.compiler.is_compiling() or not _are_allowed():
        yield
        return
    is_large = num_rows >= MIN_ROWS and num_rows * width * width >= MIN_MULTIPLICATIONS
    before, ACTIVE.in_context = getattr(ACTIVE, "in_context", False), True
    try:
        with OneDNNLinear() if is_large and one_dnn_is_faster() else nullcontext():
            yield
    finally:
        ACTIVE.in_context = before


class OneDNNLinear(TorchFunctionMode):
    """Computes `torch.nn.functional.linear` by oneDNN where it can."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and _is_suitable(*args):
            return _one_dnn_linear(*args)
        return func(*args, **(kwargs or {}))


def _is_suitable(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    tensors = [rows, weight] if bias is None else [rows, weight, bias]
    return (
        all(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.is_cpu for x in tensors)
        and rows.numel() >= MIN_ROWS * rows.shape[-1]
        and rows.numel() * len(weight) >= MIN_MULTIPLICATIONS
    )


def _one_dnn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@functools.cache
def one_dnn_is_faster() -> bool:
    """Measures once per process whether oneDNN is faster than PyTorch's own matmul."""
    if not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode(False), torch.no_grad():
        rows, weight = torch.ones(64, 768), torch.ones(768, 768)  # at most a few milliseconds in all
        try:
            plain, fast = (_seconds(f, rows, weight, num_trials=7) for f in (F.linear, _one_dnn_linear))
        except (AttributeError, RuntimeError):  # a PyTorch without the operator, or with another one
            return False
    return plain >= MIN_SPEEDUP * fast


def vocabulary_argmax(
    layer: nn.Linear, states_Md: Tensor, positions_M: Tensor, forbidden_KV: Tensor | None = None
) -> Tensor:
    """Returns the ids of the largest logits of states at positions in the patch, (M,); of equal ones the lowest.

    Never holds all logits: works through tiles of the vocabulary, or, in `cpu_kernels` where that is faster, by a
    `VocabularyScreen`. `layer` has no bias (see `is_plain_linear`); `forbidden_KV` (bool) marks tokens that aren't
    allowed at a position.
    """
    forbidden_KV = None if forbidden_KV is None else forbidden_KV.to(states_Md.device)
    size, ids = STATES_CHUNK_SIZE["cpu" if states_Md.device.type == "cpu" else "other"], []
    for states, positions in zip(states_Md.split(size), positions_M.to(states_Md.device).split(size), strict=True):
        screen, arguments = current_screen(layer), (layer.weight, states, positions, forbidden_KV)
        if screen is not None and screen.is_faster is None:
            screen.measure(*arguments)
        ids_M = screen.argmax(*arguments) if screen is not None and screen.is_faster else None
        ids.append(_tiled_argmax(*arguments) if ids_M is None else ids_M)
    return torch.cat(ids)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is its weight alone: not quantised, wrapped, hooked or offloaded (by a `forward` of its own)."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) in (nn.Parameter, Tensor)
        and layer.weight.device.type != "meta"
        and "forward" not in vars(layer)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def _tiled_argmax(weight_Vd: Tensor, states_Md: Tensor, positions_M: Tensor, forbidden_KV: Tensor | None) -> Tensor:
    num_states, tile = len(states_Md), VOCABULARY_TILE["cpu" if states_Md.device.type == "cpu" else "other"]
    if 1 < num_states < MIN_STATES:
        states_Md = F.pad(states_Md, (0, 0, 0, MIN_STATES - num_states))
        positions_M = F.pad(positions_M, (0, MIN_STATES - num_states))
    best_M = ids_M = positions_M  # until the first tile
    for start in range(0, len(weight_Vd), tile):
        logits_TM = F.linear(weight_Vd[start : start + tile], states_Md)
        if forbidden_KV is not None:
            forbidden_TM = forbidden_KV[:, start : start + tile].T[:, positions_M]
            logits_TM = logits_TM.masked_fill(forbidden_TM, -torch.inf)
        top_M, index_M = logits_TM.max(0)
        if start:
            better_M = top_M > best_M
            index_M = torch.where(better_M, index_M + start, ids_M)
            top_M = torch.where(better_M, top_M, best_M)
        best_M, ids_M = top_M, index_M
    return ids_M[:num_states]


SCREENS = weakref.WeakKeyDictionary[nn.Linear, "VocabularyScreen"]()  # not in the model, which is pickled and copied


def current_screen(layer: nn.Linear) -> "VocabularyScreen | None":
    """Returns the screen of the layer's present weight; None outside of `cpu_kernels` or if it can't be screened."""
    weight_Vd = layer.weight
    is_plain = weight_Vd.is_cpu and not weight_Vd.is_inference() and len(weight_Vd) > 0
    is_float = weight_Vd.dtype in (torch.float32, torch.bfloat16)
    if not (getattr(ACTIVE, "in_context", False) and is_plain and is_float and largest_weight()):
        return None
    if layer not in SCREENS or not SCREENS[layer].is_of(weight_Vd):
        SCREENS[layer] = VocabularyScreen(weight_Vd)
    return SCREENS[layer]


class VocabularyScreen:
    """An output matrix (V, d), float32 or bfloat16, on a CPU, rounded to int8 for `argmax`; takes V·d bytes."""

    def __init__(self, weight_Vd: Tensor):
        self.key = _key(weight_Vd)
        self.is_faster: bool | None = None  # None: not measured yet
        weight_Vd, largest = weight_Vd.detach(), largest_weight()
        assert largest is not None, "see current_screen"
        order_V = torch.linalg.vector_norm(weight_Vd, dim=-1, dtype=torch.float32).argsort()
        # The last group is filled up with copies of the last row, which can't win over it.
        order_V = torch.cat([order_V, order_V[-1:].expand(-len(order_V) % GROUP_SIZE)])
        self.rows_GI = order_V.view(-1, GROUP_SIZE)
        width, seeded = weight_Vd.shape[1], torch.Generator().manual_seed(0)
        self.rotation_dd = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=seeded))[0].float()
        self.tiles: list[tuple[Tensor, Tensor, Tensor]] = []  # int8 rows; each group's step; its largest ‖w‖ and ‖e‖
        for rows_GI in self.rows_GI.split(TILE // GROUP_SIZE):
            tile_GId = weight_Vd[rows_GI].float() @ self.rotation_dd
            step_G = (tile_GId.abs().amax((1, 2)) / largest).clamp_min(torch.finfo(torch.float32).tiny)
            whole_GId = (tile_GId / step_G[:, None, None]).round()
            error_GId = tile_GId - whole_GId * step_G[:, None, None]
            norm_2G = torch.stack([tile_GId, error_GId]).norm(dim=-1).amax(-1)
            # A group's rows lie an eighth of the tile apart: so their maximum is one of long vectors (SIMD).
            self.tiles.append((whole_GId.to(torch.int8).transpose(0, 1).flatten(0, 1), step_G, norm_2G))

    def is_of(self, weight_Vd: Tensor) -> bool:
        """Whether the matrix is still as it was rounded, judged by its version and a sample of its values.

        A change of few values that goes past autograd (`weight.data[i] = …`) is not seen.
        """
        version, sample = _key(weight_Vd)
        return version == self.key[0] and sample.dtype == self.key[1].dtype and torch.equal(sample, self.key[1])

    def measure(self, *arguments) -> None:
        """Times both ways of an argmax to set `is_faster`; where it isn't, the rounded matrix is released."""
        self.is_faster = _seconds(self.argmax, *arguments) < _seconds(_tiled_argmax, *arguments)
        if not self.is_faster:
            self.tiles = []

    def argmax(
        self, weight_Vd: Tensor, states_Md: Tensor, positions_M: Tensor, forbidden_KV: Tensor | None = None
    ) -> Tensor | None:
        """Returns the allowed rows of the matrix with the largest products, (M,); of equal ones the first.

        None where it can't say, or not at less cost than the full matmul. Matrix and states have the same dtype, to
        which products are rounded.
        """
        tiles = self.tiles
        if not tiles:  # released meanwhile, by another thread's `measure`
            return None
        # 1. Round the states, and bound each group's largest product by the rounded ones.
        states, tiny = states_Md.float() @ self.rotation_dd, torch.finfo(torch.float32).tiny
        step_M1 = (states.abs().amax(-1, keepdim=True) / MAX_STATE).clamp_min(tiny)
        whole_Md = (states / step_M1).round()
        # What summing d products in float32 may add to the error: here, below, and in either rotation.
        summing_M1 = 6 * states.shape[-1] * torch.finfo(torch.float32).eps * states.norm(dim=-1, keepdim=True)
        residue_M1 = (states - whole_Md * step_M1).norm(dim=-1, keepdim=True) + summing_M1
        error_M2 = torch.cat([residue_M1 / step_M1, whole_Md.norm(dim=-1, keepdim=True)], dim=-1)
        whole_Md, bounds = whole_Md.to(torch.int8), []
        for rows_Td, step_G, norm_2G in tiles:
            product_MG = torch.ops.aten._int_mm(whole_Md, rows_Td.T).unflatten(-1, (GROUP_SIZE, -1)).amax(-2)
            bounds.append(torch.addmm(product_MG * step_G, error_M2, norm_2G))
        bound_MG = torch.cat(bounds, dim=-1)  # on each group's largest product, in steps of the state

        def logits(state_S: Tensor, group_S: Tensor) -> Tensor:
            """Returns products of states and groups of rows, (S, I), in the matrix's dtype; −inf where forbidden."""
            rows_SI = self.rows_GI[group_S]
            rows_SId = weight_Vd.index_select(0, rows_SI.flatten()).view(*rows_SI.shape, weight_Vd.shape[1])
            logits_SI = torch.bmm(rows_SId, states_Md[state_S, :, None])[..., 0]
            if forbidden_KV is None:
                return logits_SI
            return logits_SI.masked_fill(forbidden_KV[positions_M[state_S, None], rows_SI], -torch.inf)

        # 2. Compute the exact products of the likeliest group: groups whose bound is below them are ruled out.
        likely_M = bound_MG.argmax(-1)
        if forbidden_KV is not None:
            has_forbidden_MG = forbidden_KV[:, self.rows_GI].any(-1)[positions_M]
            likely_M = bound_MG.masked_fill(has_forbidden_MG, -torch.inf).argmax(-1)
        likely_M = logits(arange(len(states_Md), states_Md.device), likely_M).amax(-1).float()
        # A product below the likely one may be rounded up to it.
        least_M = likely_M - torch.finfo(weight_Vd.dtype).eps * likely_M.abs()
        state_S, group_S = (bound_MG >= (least_M / step_M1[:, 0])[:, None]).nonzero().unbind(-1)
        if len(state_S) > MAX_SURVIVORS:
            return None

        # 3. Compute the exact products of the surviving groups, and take the best; of equal ones the lowest id.
        chunks = state_S.split(SURVIVORS_CHUNK_SIZE), group_S.split(SURVIVORS_CHUNK_SIZE)
        logits_SI = torch.cat(list(map(logits, *chunks)))
        best_M = logits_SI.new_full((len(states_Md),), -torch.inf)
        best_M = best_M.scatter_reduce(0, state_S, logits_SI.amax(-1), "amax")
        unknown = len(weight_Vd)
        ids_S = self.rows_GI[group_S].masked_fill(logits_SI < best_M[state_S, None], unknown).amin(-1)
        ids_M = torch.full_like(best_M, unknown, dtype=torch.long).scatter_reduce(0, state_S, ids_S, "amin")
        is_known_M = (ids_M < unknown) & (best_M > -torch.inf)
        return ids_M if is_known_M.all() else None  # not where a state is NaN, or no row is allowed


@functools.cache
def largest_weight() -> int | None:
    """Returns the largest whole number that rows may hold, by trial, for overflow is silent; None if there is none."""
    size = 64
    state_Md = torch.full((size, size), MAX_STATE, dtype=torch.int8)
    for largest in MAX_WEIGHTS:
        try:
            product_MT = torch.ops.aten._int_mm(state_Md, torch.full_like(state_Md, largest).T)
        except (AttributeError, NotImplementedError, RuntimeError):
            return None
        if (product_MT == size * MAX_STATE * largest).all():
            return largest
    return None


def _seconds(function: Callable[..., object], *arguments, num_trials: int = 1) -> float:
    """Returns the least time of `num_trials` calls, after one that is not counted."""
    return min(timeit.repeat(functools.partial(function, *arguments), number=1, repeat=1 + num_trials)[1:])


def _key(weight_Vd: Tensor) -> tuple[int, Tensor]:
    return weight_Vd._version, weight_Vd.detach().reshape(-1)[::SAMPLE_STRIDE].clone()
