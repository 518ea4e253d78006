"""Estimates Brier-1..4 of a CALM with any patch size K from two sampled continuations per position.

- K >= 4: a continuation is the first four tokens of one sampled patch: one forward pass over the block.
- K < 4: a continuation is ceil(4 / K) patches; each sampled patch is fed back as a branch of the block's KV cache, for
  all positions in one forward pass. Where the two continuations differ from each other and from the true text, all
  longer Brier terms are zero: those positions are dropped before the next forward pass.

Scored positions are all patches of a block but the first, which is not predicted, and (K < 4) the last few, whose four
true tokens would end in the next block.
"""

# B blocks, L tokens, P patches, K tokens per patch, D hidden, M positions, N active positions,
# 2 the two continuations, k their current number of tokens, T their final one

from math import ceil

import torch
from torch import Tensor

from calm_transformers.evaluation.branching import SamplingReader, gather_rows, padded_nonzero
from calm_transformers.evaluation.brier import MAX_N, BrierCounts


@torch.no_grad()
def brier_counts_calm(
    reader: SamplingReader,
    tokens_BL: Tensor,
    patch_size: int,
    generator: torch.Generator | None = None,
    chunk: int = 512,
) -> BrierCounts:
    """Returns the Brier counts of a batch of blocks.

    chunk: positions per block that are branched in one forward pass; bounds the memory of the attention mask.
    """
    length, steps = tokens_BL.shape[1], ceil(MAX_N / patch_size)
    patches = length // patch_size
    states_BPD = reader.read(tokens_BL.unflatten(1, (patches, patch_size)))
    targets_BM4 = tokens_BL[:, patch_size:].unfold(1, MAX_N, patch_size)[:, : patches - steps]  # after each patch
    continuations = [
        _two_continuations(reader, states_BPD[:, chunk_M], chunk_M, targets_BM4[:, chunk_M], patch_size, generator)
        for chunk_M in torch.arange(patches - steps, device=tokens_BL.device).split(chunk)
    ]
    first_BM4, second_BM4 = torch.cat(continuations, dim=1).unbind(2)
    return BrierCounts.from_samples(first_BM4, second_BM4, targets_BM4)


def _two_continuations(reader: SamplingReader, states_BMD, positions_M, targets_BM4, patch_size, generator) -> Tensor:
    """Returns the ids of two continuations, (B, M, 2, 4); those not sampled are -1 and -2, which match nothing."""
    blocks, positions = targets_BM4.shape[:2]
    steps, device = ceil(MAX_N / patch_size), positions_M.device
    tokens_BM2T = torch.tensor([-1, -2], device=device).view(1, 1, 2, 1)
    tokens_BM2T = tokens_BM2T.repeat(blocks, positions, 1, steps * patch_size)

    tokens_BN2k = reader.draw(states_BMD, 2, generator=generator).movedim(0, 2)
    tokens_BM2T[..., :patch_size] = tokens_BN2k
    index_BN = torch.arange(positions, device=device).expand(blocks, -1)
    pair = torch.arange(2, device=device)
    reader.start(positions_M.repeat_interleave(2).expand(blocks, -1))
    for step in range(1, steps):
        active_BN, _ = padded_nonzero(_is_active(tokens_BN2k, gather_rows(targets_BM4, index_BN)))
        if active_BN.shape[1] == 0:
            break
        index_BN, tokens_BN2k = gather_rows(index_BN, active_BN), gather_rows(tokens_BN2k, active_BN)
        branches_BN = (2 * active_BN.unsqueeze(-1) + pair).flatten(1)
        states_BND = reader.extend(branches_BN, tokens_BN2k[..., -patch_size:].flatten(1, 2))
        next_BN2K = reader.draw(states_BND, 1, generator=generator)[0].unflatten(1, (-1, 2))
        tokens_BN2k = torch.cat([tokens_BN2k, next_BN2K], dim=-1)
        rows_B1 = torch.arange(blocks, device=device).unsqueeze(1)
        tokens_BM2T[rows_B1, index_BN, :, step * patch_size : (step + 1) * patch_size] = next_BN2K
    return tokens_BM2T[..., :MAX_N]


def _is_active(tokens_BN2k, targets_BN4) -> Tensor:
    """Returns whether any two of the two continuations and the true text are still equal, bool (B, N)."""
    first, second = tokens_BN2k.unbind(2)
    target = targets_BN4[..., : first.shape[-1]]
    return (first == target).all(-1) | (second == target).all(-1) | (first == second).all(-1)
