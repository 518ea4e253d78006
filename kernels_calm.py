"""What a CALM computes with beside PyTorch's own operators: tables that are made once, and two kernels for a CPU.

**float32 products.** PyTorch multiplies float32 matrices with MKL and takes oneDNN for bfloat16 alone. On processors
of other makers than MKL's, oneDNN is faster in float32 as well: on an AMD EPYC with AVX-512 at 500 instead of 220
GFLOP/s (docs/speed.md). `fast_products` takes whichever is faster.

**The argmax over a large vocabulary.** The product with the vocabulary is most of what generation at T < 1 computes,
and only its argmax is wanted. A product of whole numbers takes a quarter to a half of its time and errs by no more
than a known amount, so that it shows which rows of the matrix can't be the argmax. The few that remain are multiplied
as they are, and the best of them is chosen: `VocabularyScreen`.

With w = ŵ + e and x = x̂ + r, the hats rounded, |w·x − ŵ·x̂| = |w·r + e·x̂| <= ‖w‖·‖r‖ + ‖e‖·‖x̂‖ (Cauchy–Schwarz). Rows
are judged in groups, by the largest product in the group. Rows of about the same length make a group, so that
it can share the step that its weights are whole multiples of. Before they are rounded, rows and states are rotated
alike, which changes no product, and leaves no column that is so wide that the others round to nothing.

Axes: M states, d their width, V vocabulary, K tokens per patch, T rows of a tile, G groups, I rows of a group, S
survivors (pairs of a state and a group).
"""

import functools
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

try:
    from torch._guards import detect_fake_mode
except ImportError:  # private: without it tables that are made in a FakeTensorMode are kept

    def detect_fake_mode(inputs: Any = None) -> Any:
        return None


try:
    from torch.utils._python_dispatch import _get_current_dispatch_mode
except ImportError:  # private: without it nobody knows whether operators are watched, and products stay plain
    _get_current_dispatch_mode = None

CACHE_SIZE = 64  # of each kind
SWITCH = "CALM_PRODUCTS"
MIN_ROWS = 4  # a single row reads the weights, which no library does faster
MIN_MULTIPLICATIONS = 2**21  # multiplications from which on oneDNN makes up for what its call costs
PRODUCT_TRIAL = 64, 768, 768  # rows, columns and width of the product that is timed; at most a few milliseconds in all
PRODUCT_TRIALS = 7
MIN_SPEEDUP = 1.25  # so much faster must oneDNN be: either 2 times, or as fast as MKL
TILE = 2**12  # rows multiplied at a time: the products stay in the cache
GROUP_SIZE = 8  # rows judged together
MAX_STATE = 127
MAX_WEIGHTS = 127, 63  # without VNNI, sums of two products overflow with 8 bits on both sides
MAX_SURVIVORS = 2**14  # with more, the full product is better
SURVIVORS_CHUNK_SIZE = 2**9
TRIAL_SIZE = 64
SAMPLE_STRIDE = 4099  # prime, so that the sample is of all columns


# Tables


def cached_per_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what a function returns for its arguments, which must be hashable and say the device."""

    @functools.lru_cache(CACHE_SIZE)
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


@cached_per_device
def arange(end: int, device: torch.device) -> Tensor:
    """0 … end − 1."""
    return torch.arange(end, device=device)


def float64_device(device: torch.device) -> torch.device:
    """The device itself, if it has float64."""
    return torch.device("cpu") if device.type == "mps" else device


def as_tensor(values: list[int], device: torch.device) -> Tensor:
    """A tensor of them, without waiting for a GPU of CUDA; others may read memory that is freed by then."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=device.type == "cuda")


# float32 products


def plain_products() -> bool:
    """Whether the environment says `CALM_PRODUCTS=plain`: PyTorch's own products then, and no screening in int8."""
    return os.environ.get(SWITCH) == "plain"


def float32_is_exact() -> bool:
    """Whether products of float32 are float32's on a CPU; `torch.set_float32_matmul_precision` can make them less."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(matmul, "fp32_precision", None)  # not in older PyTorch
    return precision in ("ieee", "none") if precision else torch.get_float32_matmul_precision() == "highest"


def fast_products(num_rows: int, width: int) -> AbstractContextManager:
    """A context in which linear layers of this width, given so many rows, multiply by oneDNN, if that pays: in float32
    on a CPU and without gradients.

    The values differ by rounding alone. Other layers, quantised ones, other dtypes and other devices are left as they
    are; so is everything under autocast, in a graph that is compiled or traced, where less than float32 was asked for
    (PyTorch then takes oneDNN itself), and where operators are watched, as a counter of FLOPs does, which doesn't know
    this one.
    """
    is_traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if torch.compiler.is_compiling() or is_traced or torch.is_grad_enabled():
        return nullcontext()
    is_large = num_rows >= MIN_ROWS and num_rows * width * width >= MIN_MULTIPLICATIONS
    is_watched = _get_current_dispatch_mode is None or _get_current_dispatch_mode() is not None
    pays = is_large and not is_watched and float32_is_exact() and not plain_products() and one_dnn_is_faster()
    return OneDNNLinear() if pays else nullcontext()


class OneDNNLinear(TorchFunctionMode):
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
        and rows.numel() >= MIN_ROWS * rows.shape[-1]
        and rows.numel() * len(weight) >= MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
    )


def _one_dnn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@functools.cache
def one_dnn_is_faster() -> bool:
    """Measured once a process."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    num_rows, num_columns, width = PRODUCT_TRIAL
    with torch.inference_mode(False), torch.no_grad():
        rows, weight = torch.ones(num_rows, width), torch.ones(num_columns, width)
        try:
            plain, fast = (
                _seconds(functools.partial(product, rows, weight), PRODUCT_TRIALS)
                for product in (F.linear, _one_dnn_linear)
            )
        except RuntimeError:  # a PyTorch whose operator is another
            return False
    return plain >= MIN_SPEEDUP * fast


# The argmax


class VocabularyScreen:
    """An output matrix (V, d), float32 or bfloat16, on a CPU, rounded to int8 for `argmax`; takes V·d bytes."""

    def __init__(self, weight_Vd: Tensor):
        self.key = _key(weight_Vd)
        self.pays: bool | None = None  # None: not measured yet
        weight_Vd = weight_Vd.detach()
        largest = largest_weight()
        assert largest is not None, "see is_possible"
        order_V = torch.linalg.vector_norm(weight_Vd, dim=-1, dtype=torch.float32).argsort()
        # The last group is filled up with its last row, which is as good as itself and never better.
        order_V = torch.cat([order_V, order_V[-1:].expand(-len(order_V) % GROUP_SIZE)])
        self.rows_GI = order_V.view(-1, GROUP_SIZE)
        self.rotation_dd = _rotation(weight_Vd.shape[1])
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
            bounds_2G.append(torch.stack([values.norm(dim=-1).amax(-1) for values in (tile_GId, error_GId)]))
        self.step_G, self.bound_2G = torch.cat(steps_G), torch.cat(bounds_2G, dim=-1)

    @staticmethod
    def is_possible(weight_Vd: Tensor) -> bool:
        """Whether the matrix is one that can be screened here."""
        is_plain = weight_Vd.device.type == "cpu" and not weight_Vd.is_inference()
        is_known = weight_Vd.dtype in (torch.float32, torch.bfloat16) and len(weight_Vd) > 0
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not float32_is_exact():
            return False
        return is_plain and is_known and not plain_products() and largest_weight() is not None

    def is_of(self, weight_Vd: Tensor) -> bool:
        """Whether the matrix is still as it was rounded, judged by its version and a sample of its values.

        A change of few values that goes past autograd (`weight.data[i] = …`) is not seen.
        """
        version, sample = _key(weight_Vd)
        return version == self.key[0] and sample.dtype == self.key[1].dtype and torch.equal(sample, self.key[1])

    def measure(self, screened: Callable[[], object], plain: Callable[[], object]) -> None:
        """Finds out whether screening pays, by the time that both take; where not, forgets the rounded matrix."""
        self.pays = _seconds(screened) < _seconds(plain)
        if not self.pays:
            self.tiles = []

    def argmax(
        self,
        states_Md: Tensor,
        weight_Vd: Tensor,
        forbidden_KV: Tensor | None = None,
        positions_M: Tensor | None = None,
    ) -> Tensor | None:
        """The rows of the matrix with the largest products, (M,), of equals the first.

        Args:
            states_Md: in the matrix's dtype, in which products are rounded.
            weight_Vd: the matrix.
            forbidden_KV (`(K, V)` bool, *optional*): rows that may not be chosen at a position.
            positions_M: of the states, where rows are forbidden.

        Returns:
            None where it can't say, or not at less cost than the full product.
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
        most_MG = self._most(tiles, whole_Md.to(torch.int8), error_M2)  # in steps of the state

        def logits(state_S: Tensor, group_S: Tensor) -> Tensor:
            """Of states with the rows of groups, (S, I), in the matrix's dtype; −inf for forbidden ones."""
            rows_SI = self.rows_GI[group_S]
            rows_SId = weight_Vd.index_select(0, rows_SI.flatten()).view(*rows_SI.shape, weight_Vd.shape[1])
            logits_SI = torch.bmm(rows_SId, states_Md[state_S, :, None])[..., 0]
            if forbidden_KV is None or positions_M is None:
                return logits_SI
            return logits_SI.masked_fill(forbidden_KV[positions_M[state_S, None], rows_SI], -torch.inf)

        likely_M = most_MG.argmax(-1)
        if forbidden_KV is not None and positions_M is not None:
            has_forbidden_MG = forbidden_KV[:, self.rows_GI].any(-1)[positions_M]
            likely_M = most_MG.masked_fill(has_forbidden_MG, -torch.inf).argmax(-1)
        likely_M = logits(arange(len(states_Md), states_Md.device), likely_M).amax(-1).float()
        # A product below the likely one may be rounded up to it.
        least_M = likely_M - torch.finfo(weight_Vd.dtype).eps * likely_M.abs()
        state_S, group_S = (most_MG >= (least_M / step_M1[:, 0])[:, None]).nonzero().unbind(-1)
        if len(state_S) > MAX_SURVIVORS:
            return None

        chunks = zip(state_S.split(SURVIVORS_CHUNK_SIZE), group_S.split(SURVIVORS_CHUNK_SIZE), strict=True)
        logits_SI = torch.cat([logits(*chunk) for chunk in chunks])
        best_M = logits_SI.new_full((len(states_Md),), -torch.inf)
        best_M = best_M.scatter_reduce(0, state_S, logits_SI.amax(-1), "amax")
        unknown = len(weight_Vd)
        ids_S = self.rows_GI[group_S].masked_fill(logits_SI < best_M[state_S, None], unknown).amin(-1)
        ids_M = torch.full_like(best_M, unknown, dtype=torch.long).scatter_reduce(0, state_S, ids_S, "amin")
        is_known_M = (ids_M < unknown) & (best_M > -torch.inf)
        return ids_M if is_known_M.all() else None  # not where a state is NaN, or no row is allowed

    def _most(self, tiles: list[Tensor], whole_Md: Tensor, error_M2: Tensor) -> Tensor:
        """The most that the largest product of each group can be, (M, G)."""
        parts, widths = [], [len(tile) // GROUP_SIZE for tile in tiles]
        tables = zip(tiles, self.step_G.split(widths), self.bound_2G.split(widths, dim=-1), strict=True)
        for tile, step_G, bound_2G in tables:
            product_MG = torch.ops.aten._int_mm(whole_Md, tile.T).unflatten(-1, (GROUP_SIZE, -1)).amax(-2)
            parts.append(torch.addmm(product_MG * step_G, error_M2, bound_2G))
        return torch.cat(parts, dim=-1)


@functools.cache
def largest_weight() -> int | None:
    """The largest whole number that rows may hold; None where products are wrong. Tried, for an overflow is silent."""
    for largest in MAX_WEIGHTS:
        state_Md, row_Td = (torch.full((TRIAL_SIZE, TRIAL_SIZE), x, dtype=torch.int8) for x in (MAX_STATE, largest))
        try:
            product_MT = torch.ops.aten._int_mm(state_Md, row_Td.T)
        except (AttributeError, NotImplementedError, RuntimeError):
            return None
        if bool((product_MT == TRIAL_SIZE * MAX_STATE * largest).all()):
            return largest
    return None


def _rotation(width: int) -> Tensor:
    """A random orthogonal matrix, always the same one of its size."""
    random_dd = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(random_dd)[0].float()


def _seconds(work: Callable[[], object], trials: int = 1) -> float:
    """The least of so many, after one that is not counted."""
    seconds = []
    for _ in range(1 + trials):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _key(weight_Vd: Tensor) -> tuple[int, Tensor]:
    return weight_Vd._version, weight_Vd.detach().reshape(-1)[::SAMPLE_STRIDE].clone()
