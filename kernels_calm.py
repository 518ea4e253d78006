"""What a CALM computes with beside PyTorch's own operators: cached tables, and two kernels for generation on a CPU.

`cpu_kernels` is the context in which `generate` runs backbone, head and autoencoder; outside of it they are plain
PyTorch. It does two things, each where it is faster on this machine:

**float32 linear layers by oneDNN.** PyTorch multiplies float32 matrices with MKL and takes oneDNN for bfloat16 alone.
On processors of other makers than MKL's, oneDNN is faster in float32 as well: on an AMD EPYC with AVX-512 at 500
instead of 220 GFLOP/s (docs/speed.md).

**The argmax over a large vocabulary, int8 first.** The matmul with the vocabulary is most of what generation at T < 1
computes, and only its argmax is needed. A matmul of int8 takes a quarter to a half of its time and errs by no more than
a known amount, so that it shows which rows of the matrix can't be the argmax. The few that remain are multiplied as
they are, and the best of them is chosen: `VocabularyScreen`.

With w = ŵ + e and x = x̂ + r, the hats rounded, |w·x − ŵ·x̂| = |w·r + e·x̂| <= ‖w‖·‖r‖ + ‖e‖·‖x̂‖ (Cauchy–Schwarz). Rows
are judged in groups, by the largest product in the group. Rows of about the same length make a group, so that it can
share the step that its weights are whole multiples of. Before they are rounded, rows and states are rotated alike,
which changes no product, and leaves no column that is so wide that the others round to nothing.

Axes: M states, d their width, V vocabulary, K tokens per patch, T rows of a tile, G groups, I rows of a group, S
survivors (pairs of a state and a group).
"""

import functools
import importlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CACHE_SIZE = 64  # tables of each kind
SWITCH = "CALM_MATMUL_BACKEND"
MIN_ROWS = 4  # a single row reads the weights, which no library does faster
MIN_MULTIPLICATIONS = 2**21  # from here on oneDNN makes up for what its call costs
TRIAL_SHAPE = 64, 768, 768  # rows, columns and width of the matmul that is timed; at most a few milliseconds in all
NUM_TRIALS = 7
MIN_SPEEDUP = 1.25  # oneDNN is either 2 times as fast as MKL, or no faster
VOCABULARY_TILE = {"cpu": 2**11, "other": 2**15}  # on a CPU a tile of logits stays in the cache
STATES_CHUNK_SIZE = {"cpu": 400, "other": 2**13}
MIN_STATES = 16  # matmuls are slower with 2 … 15 columns than with 16, on a CPU by half
TILE = 2**12  # int8 rows multiplied at a time: the products stay in the cache
GROUP_SIZE = 8  # rows judged together
MAX_STATE = 127
MAX_WEIGHTS = 127, 63  # without VNNI, sums of two products overflow with 8 bits on both sides
MAX_SURVIVORS = 2**14  # with more, the full matmul is better
SURVIVORS_CHUNK_SIZE = 2**9
OVERFLOW_TRIAL_SIZE = 64
SCREENED_DTYPES = torch.float32, torch.bfloat16
SAMPLE_STRIDE = 4099  # prime, so that the sample is of all columns


def private(path: str, default: Any) -> Any:
    """Returns a function that PyTorch doesn't promise to keep, "module.name", or `default` where it is gone."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return default


detect_fake_mode = private(
    "torch._guards.detect_fake_mode", lambda: None
)  # without it tables of fake tensors are kept
# Without it nobody knows whether a mode counts operators, as for FLOPs, and so all stays PyTorch's own.
current_dispatch_mode = private("torch.utils._python_dispatch._get_current_dispatch_mode", lambda: "unknown")


# Tables


def cached_per_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Caches what a function returns for its arguments, which must be hashable and include the device."""

    @functools.lru_cache(CACHE_SIZE)
    def cached(*arguments):
        with torch.inference_mode(False):  # a table made in inference mode could not be used in training
            return function(*arguments)

    @functools.wraps(function)
    def call(*arguments):
        # A graph makes its own, on its device: of a cached one it would know neither the maker nor the content.
        # Tables without content, as a FakeTensorMode makes them, are no one else's.
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


# The context

ACTIVE = threading.local()  # `here`: whether this thread is in `cpu_kernels`


def _are_allowed() -> bool:
    """Whether results may differ from PyTorch's own by rounding, and nothing traces, counts or differentiates them."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(matmul, "fp32_precision", None)  # not in older PyTorch
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

    The values differ from PyTorch's own by rounding alone. Only plain layers and tensors on a CPU are concerned, and
    nothing under autograd, autocast, `torch.compile`, tracing, modes that count operators, deterministic algorithms,
    reduced float32 precision, or with the environment variable CALM_MATMUL_BACKEND=torch.

    Args:
        num_rows: rows that the linear layers in the block get.
        width: of these rows, about.
    """
    if torch.compiler.is_compiling() or not _are_allowed():
        yield
        return
    is_large = num_rows >= MIN_ROWS and num_rows * width * width >= MIN_MULTIPLICATIONS
    before, ACTIVE.here = getattr(ACTIVE, "here", False), True
    try:
        with OneDNNLinear() if is_large and one_dnn_is_faster() else nullcontext():
            yield
    finally:
        ACTIVE.here = before


# float32 linear layers


class OneDNNLinear(TorchFunctionMode):
    """Computes `torch.nn.functional.linear` by oneDNN where it can."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and _is_suitable(*args):
            return _one_dnn_linear(*args)
        return func(*args, **(kwargs or {}))


def _is_suitable(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    tensors = [rows, weight] if bias is None else [rows, weight, bias]
    return (
        all(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 for x in tensors)
        and all(x.device.type == "cpu" for x in tensors)
        and rows.numel() >= MIN_ROWS * rows.shape[-1]
        and rows.numel() * len(weight) >= MIN_MULTIPLICATIONS
    )


def _one_dnn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@functools.cache
def one_dnn_is_faster() -> bool:
    """Measures once a process whether oneDNN is faster than PyTorch's own matmul."""
    if not torch.backends.mkldnn.is_available():
        return False
    num_rows, num_columns, width = TRIAL_SHAPE
    with torch.inference_mode(False), torch.no_grad():
        rows, weight = torch.ones(num_rows, width), torch.ones(num_columns, width)
        try:
            plain, fast = (
                _seconds(functools.partial(linear, rows, weight), NUM_TRIALS) for linear in (F.linear, _one_dnn_linear)
            )
        except (AttributeError, RuntimeError):  # a PyTorch without the operator, or with another one
            return False
    return plain >= MIN_SPEEDUP * fast


# The argmax over a vocabulary


def vocabulary_argmax(
    layer: nn.Linear, states_Md: Tensor, positions_M: Tensor, forbidden_KV: Tensor | None = None
) -> Tensor:
    """Returns the ids of the largest logits, (M,), without ever holding all of them; of equal ones the lowest.

    Works through tiles of the vocabulary with a running maximum, or, in `cpu_kernels` where that is faster, by a
    `VocabularyScreen`.

    Args:
        layer: the output layer, without bias; see `is_plain_linear`.
        states_Md: the last hidden states.
        positions_M: their positions in the patch.
        forbidden_KV (`(K, V)` bool, *optional*): tokens that may not stand at a position.
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
    """Whether a layer is its weight and nothing more: not quantised, wrapped, hooked or elsewhere.

    Offloading, as other libraries do, puts a forward of its own on the instance.
    """
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
    best_M = ids_M = None
    for start in range(0, len(weight_Vd), tile):
        logits_TM = F.linear(weight_Vd[start : start + tile], states_Md)
        if forbidden_KV is not None:
            forbidden_TK = forbidden_KV[:, start : start + tile].T
            logits_TM = logits_TM.masked_fill(forbidden_TK[:, positions_M], -torch.inf)
        top_M, index_M = logits_TM.max(0)
        if best_M is None or ids_M is None:
            best_M, ids_M = top_M, index_M
            continue
        better_M = top_M > best_M
        ids_M = torch.where(better_M, index_M + start, ids_M)
        best_M = torch.where(better_M, top_M, best_M)
    assert ids_M is not None, "a vocabulary has tokens"
    return ids_M[:num_states]


SCREENS: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # by layer; not in the model, which is pickled, copied


def current_screen(layer: nn.Linear) -> "VocabularyScreen | None":
    """Returns the screen of the layer's present weight; None outside of `cpu_kernels` or if it can't be screened."""
    weight_Vd = layer.weight
    is_plain = weight_Vd.device.type == "cpu" and not weight_Vd.is_inference() and len(weight_Vd) > 0
    if not (getattr(ACTIVE, "here", False) and is_plain and weight_Vd.dtype in SCREENED_DTYPES and largest_weight()):
        return None
    if layer not in SCREENS or not SCREENS[layer].is_of(weight_Vd):
        SCREENS[layer] = VocabularyScreen(weight_Vd)
    return SCREENS[layer]


class VocabularyScreen:
    """An output matrix (V, d), float32 or bfloat16, on a CPU, rounded to int8 for `argmax`; takes V·d bytes."""

    def __init__(self, weight_Vd: Tensor):
        self.key = _key(weight_Vd)
        self.is_faster: bool | None = None  # None: not measured yet
        weight_Vd = weight_Vd.detach()
        largest = largest_weight()
        assert largest is not None, "see current_screen"
        order_V = torch.linalg.vector_norm(weight_Vd, dim=-1, dtype=torch.float32).argsort()
        # The last group is filled up with its last row, which is as good as itself and never better.
        order_V = torch.cat([order_V, order_V[-1:].expand(-len(order_V) % GROUP_SIZE)])
        self.rows_GI = order_V.view(-1, GROUP_SIZE)
        width, seeded = weight_Vd.shape[1], torch.Generator().manual_seed(0)
        self.rotation_dd = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=seeded))[0].float()
        self.tiles: list[Tensor] = []
        steps_G, bounds_2G = [], []
        for rows_GI in self.rows_GI.split(TILE // GROUP_SIZE):
            tile_GId = weight_Vd[rows_GI].float() @ self.rotation_dd
            step_G = (tile_GId.abs().amax((1, 2)) / largest).clamp_min(torch.finfo(torch.float32).tiny)
            whole_GId = (tile_GId / step_G[:, None, None]).round()
            error_GId = tile_GId - whole_GId * step_G[:, None, None]
            # A group's rows lie an eighth of the tile apart: so its largest product is a maximum of long vectors.
            self.tiles.append(whole_GId.to(torch.int8).transpose(0, 1).flatten(0, 1))
            steps_G.append(step_G)
            bounds_2G.append(torch.stack([tile_GId, error_GId]).norm(dim=-1).amax(-1))
        self.step_G, self.bound_2G = torch.cat(steps_G), torch.cat(bounds_2G, dim=-1)

    def is_of(self, weight_Vd: Tensor) -> bool:
        """Whether the matrix is still as it was rounded, judged by its version and a sample of its values.

        A change of few values that goes past autograd (`weight.data[i] = …`) is not seen.
        """
        version, sample = _key(weight_Vd)
        return version == self.key[0] and sample.dtype == self.key[1].dtype and torch.equal(sample, self.key[1])

    def measure(self, *arguments) -> None:
        """Times both ways of an argmax to set `is_faster`; where it isn't, the rounded matrix is released."""
        screened = _seconds(functools.partial(self.argmax, *arguments))
        self.is_faster = screened < _seconds(functools.partial(_tiled_argmax, *arguments))
        if not self.is_faster:
            self.tiles = []

    def argmax(
        self,
        weight_Vd: Tensor,
        states_Md: Tensor,
        positions_M: Tensor | None = None,
        forbidden_KV: Tensor | None = None,
    ) -> Tensor | None:
        """Returns the rows of the matrix with the largest products, (M,), of equals the first.

        None where it can't say, or not at less cost than the full matmul.

        Args:
            weight_Vd: the matrix.
            states_Md: in the matrix's dtype, in which products are rounded.
            positions_M: of the states, where rows are forbidden.
            forbidden_KV (`(K, V)` bool, *optional*): rows that may not be chosen at a position.
        """
        states, tiny = states_Md.float() @ self.rotation_dd, torch.finfo(torch.float32).tiny
        step_M1 = (states.abs().amax(-1, keepdim=True) / MAX_STATE).clamp_min(tiny)
        whole_Md = (states / step_M1).round()
        # What summing d products in float32 may add to the error: here, below, and in either rotation.
        summing_M1 = 6 * states.shape[-1] * torch.finfo(torch.float32).eps * states.norm(dim=-1, keepdim=True)
        residue_M1 = (states - whole_Md * step_M1).norm(dim=-1, keepdim=True) + summing_M1
        error_M2 = torch.cat([residue_M1 / step_M1, whole_Md.norm(dim=-1, keepdim=True)], dim=-1)
        tiles = self.tiles
        if not tiles:
            return None
        bound_MG = self._upper_bounds(tiles, whole_Md.to(torch.int8), error_M2)  # in steps of the state

        def logits(state_S: Tensor, group_S: Tensor) -> Tensor:
            """Returns products of states and groups of rows, (S, I), in the matrix's dtype; −inf where forbidden."""
            rows_SI = self.rows_GI[group_S]
            rows_SId = weight_Vd.index_select(0, rows_SI.flatten()).view(*rows_SI.shape, weight_Vd.shape[1])
            logits_SI = torch.bmm(rows_SId, states_Md[state_S, :, None])[..., 0]
            if forbidden_KV is None or positions_M is None:
                return logits_SI
            return logits_SI.masked_fill(forbidden_KV[positions_M[state_S, None], rows_SI], -torch.inf)

        likely_M = bound_MG.argmax(-1)
        if forbidden_KV is not None and positions_M is not None:
            has_forbidden_MG = forbidden_KV[:, self.rows_GI].any(-1)[positions_M]
            likely_M = bound_MG.masked_fill(has_forbidden_MG, -torch.inf).argmax(-1)
        likely_M = logits(arange(len(states_Md), states_Md.device), likely_M).amax(-1).float()
        # A product below the likely one may be rounded up to it.
        least_M = likely_M - torch.finfo(weight_Vd.dtype).eps * likely_M.abs()
        state_S, group_S = (bound_MG >= (least_M / step_M1[:, 0])[:, None]).nonzero().unbind(-1)
        if len(state_S) > MAX_SURVIVORS:
            return None

        chunks = state_S.split(SURVIVORS_CHUNK_SIZE), group_S.split(SURVIVORS_CHUNK_SIZE)
        logits_SI = torch.cat(list(map(logits, *chunks)))
        best_M = logits_SI.new_full((len(states_Md),), -torch.inf)
        best_M = best_M.scatter_reduce(0, state_S, logits_SI.amax(-1), "amax")
        unknown = len(weight_Vd)
        ids_S = self.rows_GI[group_S].masked_fill(logits_SI < best_M[state_S, None], unknown).amin(-1)
        ids_M = torch.full_like(best_M, unknown, dtype=torch.long).scatter_reduce(0, state_S, ids_S, "amin")
        is_known_M = (ids_M < unknown) & (best_M > -torch.inf)
        return ids_M if is_known_M.all() else None  # not where a state is NaN, or no row is allowed

    def _upper_bounds(self, tiles: list[Tensor], whole_Md: Tensor, error_M2: Tensor) -> Tensor:
        """Returns the most that the largest product of each group can be, (M, G)."""
        parts, width = [], TILE // GROUP_SIZE
        tables = zip(tiles, self.step_G.split(width), self.bound_2G.split(width, dim=-1), strict=True)
        for tile, step_G, bound_2G in tables:
            product_MG = torch.ops.aten._int_mm(whole_Md, tile.T).unflatten(-1, (GROUP_SIZE, -1)).amax(-2)
            parts.append(torch.addmm(product_MG * step_G, error_M2, bound_2G))
        return torch.cat(parts, dim=-1)


@functools.cache
def largest_weight() -> int | None:
    """Returns the largest whole number that rows may hold, by trial, for overflow is silent; None if there is none."""
    for largest in MAX_WEIGHTS:
        size = OVERFLOW_TRIAL_SIZE, OVERFLOW_TRIAL_SIZE
        state_Md, row_Td = torch.full(size, MAX_STATE, dtype=torch.int8), torch.full(size, largest, dtype=torch.int8)
        try:
            product_MT = torch.ops.aten._int_mm(state_Md, row_Td.T)
        except (AttributeError, NotImplementedError, RuntimeError):
            return None
        if bool((product_MT == OVERFLOW_TRIAL_SIZE * MAX_STATE * largest).all()):
            return largest
    return None


def _seconds(work: Callable[[], object], num_trials: int = 1) -> float:
    """Returns the least time of `num_trials` calls, after one that is not counted."""
    seconds = []
    for _ in range(1 + num_trials):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _key(weight_Vd: Tensor) -> tuple[int, Tensor]:
    return weight_Vd._version, weight_Vd.detach().reshape(-1)[::SAMPLE_STRIDE].clone()
