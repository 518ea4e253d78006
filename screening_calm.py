"""The most probable tokens of many states without the full product with a large vocabulary: int8 first.

The product with the vocabulary is most of what generation at T < 1 computes, and only its argmax is wanted. A product
of whole numbers takes a quarter to a half of its time and errs by no more than a known amount, so that it shows which
rows of the matrix can't be the argmax. The few that remain are multiplied as they are, and the best of them is chosen.

With w = ŵ + e and x = x̂ + r, the hats rounded, |w·x − ŵ·x̂| = |w·r + e·x̂| <= ‖w‖·‖r‖ + ‖e‖·‖x̂‖ (Cauchy–Schwarz). Rows
are judged in groups, by the largest product in the group. Rows of about the same length make a group, so that
it can share the step that its weights are whole multiples of. Before they are rounded, rows and states are rotated
alike, which changes no product, and leaves no column that is so wide that the others round to nothing.

Axes: M states, d their width, V vocabulary, K tokens per patch, T rows of a tile, G groups, I rows of a group, S
survivors (pairs of a state and a group).
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .products_calm import float32_is_exact, plain_products
from .tables_calm import numbers_up_to

TILE = 2**12  # rows multiplied at a time: the products stay in the cache
GROUP_SIZE = 8  # rows judged together
LARGEST_STATE = 127
LARGEST_WEIGHTS = 127, 63  # without VNNI, sums of two products overflow with 8 bits on both sides
MOST_SURVIVORS = 2**14  # with more, the full product is better
SURVIVORS_AT_ONCE = 2**9
TRIAL_SIZE = 64
SAMPLE_STRIDE = 4099  # prime, so that the sample is of all columns


class VocabularyScreen:
    """An output matrix (V, d), float32 or bfloat16, rounded to int8 for `argmax`; takes V·d bytes.

    Args:
        weight_Vd: the matrix, on a CPU.
    """

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
        step_M1 = (states.abs().amax(-1, keepdim=True) / LARGEST_STATE).clamp_min(tiny)
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
        likely_M = logits(numbers_up_to(len(states_Md), states_Md.device), likely_M).amax(-1).float()
        # A product below the likely one may be rounded up to it.
        least_M = likely_M - torch.finfo(weight_Vd.dtype).eps * likely_M.abs()
        state_S, group_S = (most_MG >= (least_M / step_M1[:, 0])[:, None]).nonzero().unbind(-1)
        if len(state_S) > MOST_SURVIVORS:
            return None

        chunks = zip(state_S.split(SURVIVORS_AT_ONCE), group_S.split(SURVIVORS_AT_ONCE), strict=True)
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
    for largest in LARGEST_WEIGHTS:
        state_Md, row_Td = (
            torch.full((TRIAL_SIZE, TRIAL_SIZE), x, dtype=torch.int8) for x in (LARGEST_STATE, largest)
        )
        try:
            product_MT = torch.ops.aten._int_mm(state_Md, row_Td.T)
        except (AttributeError, NotImplementedError, RuntimeError):
            return None
        if bool((product_MT == TRIAL_SIZE * LARGEST_STATE * largest).all()):
            return largest
    return None


def _rotation(width: int) -> Tensor:
    """A random orthogonal matrix, always the same one of its size."""
    random_dd = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(random_dd)[0].float()


def _seconds(work: Callable[[], object]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _key(weight_Vd: Tensor) -> tuple[int, Tensor]:
    return weight_Vd._version, weight_Vd.detach().reshape(-1)[::SAMPLE_STRIDE].clone()
