"""The most probable tokens of many states without the full product with a large vocabulary: int8 first, then float32.

The product with the vocabulary is most of what generation at T < 1 computes, and only its argmax is wanted. A product
of whole numbers takes an eighth to a half of its time and errs by no more than a known amount, so that it shows which
rows of the matrix can't be the argmax. The few that remain are multiplied in float32, and the best of them is chosen.

With w = ŵ + e and x = x̂ + r, the hats rounded, |w·x − ŵ·x̂| = |w·r + e·x̂| <= ‖w‖·‖r‖ + ‖e‖·‖x̂‖ (Cauchy–Schwarz). Rows
are judged in groups, by the largest product in the group.

Axes: M states, d their width, V vocabulary, T rows of a tile, G groups, I rows of a group, S survivors (pairs of a
state and a group).
"""

import threading
import warnings

import torch
from torch import Tensor

TILE = 2**13  # rows multiplied at a time: the products stay in the cache
GROUP_SIZE = 8  # rows judged together
LEAST_WEIGHTS = 2**22  # of smaller matrices the full product is fast, too
LARGEST_WEIGHT = 127  # int8
LARGEST_STATE = 63  # 7 bits: with 8, AVX2's sums of two products overflow
MOST_SURVIVORS = 2**14  # with more, the full product is better
SURVIVORS_AT_ONCE = 2**10
SAMPLE_STRIDE = 4099  # prime, so that the sample is of all columns
ENGINE_LOCK = threading.Lock()  # PyTorch's engine is one for all threads


class VocabularyScreen:
    """An output matrix (V, d), rounded to int8 and packed for `argmax`; takes a quarter of its memory.

    Raises RuntimeError where PyTorch can't multiply int8 in this way (it takes fbgemm, which is for x86).
    """

    def __init__(self, weight_Vd: Tensor):
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            raise RuntimeError("This build of PyTorch has no fbgemm.")
        self.key = _key(weight_Vd)
        self.packed, rows_GI, norms_G, errors_G = [], [], [], []
        for start in range(0, len(weight_Vd), TILE):
            # The last tile is filled up with the last row, which is as good as itself and never better.
            rows_T = torch.arange(start, min(start + TILE, _round_up(len(weight_Vd))))
            rows_T = rows_T.clamp_max(len(weight_Vd) - 1)
            tile_Td = weight_Vd.detach()[rows_T]
            step_T = tile_Td.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_WEIGHT
            whole_Td = (tile_Td / step_T[:, None]).round()
            self.packed.append(_pack(whole_Td.to(torch.int8), step_T))
            rows_GI.append(rows_T.view(GROUP_SIZE, -1).T)
            norms_G.append(_largest_of_groups(tile_Td.norm(dim=-1)))
            errors_G.append(_largest_of_groups((tile_Td - whole_Td * step_T[:, None]).norm(dim=-1)))
        self.rows_GI, self.norm_G, self.error_G = torch.cat(rows_GI), torch.cat(norms_G), torch.cat(errors_G)

    @staticmethod
    def is_worthwhile(weight_Vd: Tensor) -> bool:
        """Whether the matrix is one that can be screened, and so large that it pays."""
        is_plain = weight_Vd.device.type == "cpu" and weight_Vd.dtype == torch.float32 and not weight_Vd.is_inference()
        is_exact = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
        return is_plain and is_exact and weight_Vd.numel() >= LEAST_WEIGHTS

    def is_of(self, weight_Vd: Tensor) -> bool:
        """Whether the matrix is still as it was packed, judged by its version and a sample of its values.

        A change of few values that goes past autograd (`weight.data[i] = …`) is not seen.
        """
        version, sample = _key(weight_Vd)
        return version == self.key[0] and torch.equal(sample, self.key[1])

    def argmax(self, states_Md: Tensor, weight_Vd: Tensor) -> Tensor | None:
        """The rows of the matrix with the largest products, (M,), of equals the first.

        Returns None where it can't say, or not at less cost than the full product.
        """
        largest_M1 = states_Md.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        states_Md = states_Md / largest_M1
        rounded_Md = (states_Md * LARGEST_STATE).round() / LARGEST_STATE
        product_MG = torch.cat([_largest_of_groups(_multiply(rounded_Md, packed)) for packed in self.packed], dim=-1)

        # What summing d products in float32 may add to the error, here and below.
        summing_M1 = 2 * states_Md.shape[-1] * torch.finfo(torch.float32).eps * states_Md.norm(dim=-1, keepdim=True)
        residue_M1 = (states_Md - rounded_Md).norm(dim=-1, keepdim=True) + summing_M1
        bound_MG = self.norm_G * residue_M1 + self.error_G * rounded_Md.norm(dim=-1, keepdim=True)
        likely_MI = _products(weight_Vd, self.rows_GI[product_MG.argmax(-1)], states_Md)
        state_S, group_S = (product_MG + bound_MG >= likely_MI.amax(-1, keepdim=True)).nonzero().unbind(-1)
        if len(state_S) > MOST_SURVIVORS:
            return None

        chunks = zip(state_S.split(SURVIVORS_AT_ONCE), self.rows_GI[group_S].split(SURVIVORS_AT_ONCE), strict=True)
        logits_SI = torch.cat([_products(weight_Vd, rows_SI, states_Md[state_S]) for state_S, rows_SI in chunks])
        best_M = states_Md.new_full((len(states_Md),), -torch.inf)
        best_M = best_M.scatter_reduce(0, state_S, logits_SI.amax(-1), "amax")
        unknown = len(weight_Vd)
        ids_S = self.rows_GI[group_S].masked_fill(logits_SI < best_M[state_S, None], unknown).amin(-1)
        ids_M = torch.full_like(best_M, unknown, dtype=torch.long).scatter_reduce(0, state_S, ids_S, "amin")
        return None if (ids_M == unknown).any() else ids_M  # where a state is NaN


def _products(weight_Vd: Tensor, rows_SI: Tensor, states_Sd: Tensor) -> Tensor:
    """Of each state with its own rows of the matrix: (S, I)."""
    rows_SId = weight_Vd.index_select(0, rows_SI.flatten()).view(*rows_SI.shape, weight_Vd.shape[1])
    return torch.bmm(rows_SId, states_Sd[..., None])[..., 0]


def _round_up(num_rows: int) -> int:
    return -(-num_rows // GROUP_SIZE) * GROUP_SIZE


def _largest_of_groups(values_T: Tensor) -> Tensor:
    """(..., T) → (..., G). A group's rows lie an eighth of the tile apart: so this is a maximum of long vectors."""
    return values_T.unflatten(-1, (GROUP_SIZE, -1)).amax(-2)


def _pack(whole_Td: Tensor, step_T: Tensor) -> torch.ScriptObject:
    """int8 rows and the steps that they count, in fbgemm's layout."""
    with ENGINE_LOCK:
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # PyTorch will drop its quantized tensors
                no_offset_T = torch.zeros(len(step_T), dtype=torch.long)
                # No public function makes one of values that are whole already.
                make = torch._make_per_channel_quantized_tensor  # pyright: ignore[reportPrivateImportUsage]
                tile_Td = make(whole_Td, step_T, no_offset_T, 0)
                return torch.ops.quantized.linear_prepack(tile_Td, None)
        finally:
            torch.backends.quantized.engine = engine


def _multiply(rounded_Md: Tensor, packed: torch.ScriptObject) -> Tensor:
    """States, whole multiples of 1/63, times one tile: (M, T)."""
    step, offset = 1 / LARGEST_STATE, LARGEST_STATE + 1
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rounded_Md, step, offset, packed)


def _key(weight_Vd: Tensor) -> tuple[int, Tensor]:
    return weight_Vd._version, weight_Vd.detach().reshape(-1)[::SAMPLE_STRIDE].clone()
