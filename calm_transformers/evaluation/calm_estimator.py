"""Brier-1..4 of a CALM with patches of any size K, from two sampled continuations of every position.

- K >= 4: a continuation is the first four tokens of one sampled patch; one reading of the block and one decode.
- K < 4: a continuation takes ceil(4 / K) patches; each sampled patch is fed back, with the block's KV cache, as a
  branch at its position, all positions together. Where two continuations agree neither with each other nor with the
  true text, every longer Brier-n is zero: those positions drop out before the next forward pass.

Positions are the patches of a block but the first, which nothing predicts, and (K < 4) the last few, whose four true
tokens would end in the next block.
"""

# B blocks, L tokens, P patches, K tokens per patch, D hidden, M positions, N positions that still matter,
# 2 the two continuations, k their tokens so far, T their tokens in the end

from __future__ import annotations

from math import ceil

import torch

from calm_transformers.evaluation.branching import BlockReader, padded_nonzero, take
from calm_transformers.evaluation.brier import MAX_N, BrierCounts


@torch.no_grad()
def count_calm(
    reader: BlockReader,
    tokens_BL: torch.Tensor,
    patch_size: int,
    generator: torch.Generator | None = None,
    chunk: int = 512,
) -> BrierCounts:
    """Counts of one batch of blocks.

    reader: besides BlockReader's methods, draw(states (..., D), num_samples, generator) -> tokens
        (num_samples, ..., K).
    chunk: positions of a block that branch at the same time; bounds the memory of their mask.
    Raises ValueError when a block is no multiple of K or has too few patches for one position.
    """
    length, steps = tokens_BL.shape[1], ceil(MAX_N / patch_size)
    patches = length // patch_size
    if length % patch_size:
        raise ValueError(f"blocks of {length} tokens: must be a multiple of the patch size {patch_size}")
    if patches <= steps:
        raise ValueError(f"blocks of {length} tokens: needs at least {(steps + 1) * patch_size}")
    states_BPD = reader.read(tokens_BL.unflatten(1, (patches, patch_size)))
    # Row p: the four tokens after patch p.
    targets_BM4 = tokens_BL[:, patch_size:].unfold(1, MAX_N, patch_size)[:, : patches - steps]
    continuations = [
        _two_continuations(reader, states_BPD[:, chunk_M], chunk_M, targets_BM4[:, chunk_M], patch_size, generator)
        for chunk_M in torch.arange(patches - steps, device=tokens_BL.device).split(chunk)
    ]
    first_BM4, second_BM4 = torch.cat(continuations, dim=1).unbind(2)
    return BrierCounts.from_draws(first_BM4, second_BM4, targets_BM4)


def _two_continuations(reader, states_BMD, positions_M, targets_BM4, patch_size, generator) -> torch.Tensor:
    """(B, M, 2, 4) token ids; those that no longer matter stay -1 and -2, which agree with nothing."""
    blocks, positions = targets_BM4.shape[:2]
    steps, device = ceil(MAX_N / patch_size), positions_M.device
    tokens_BM2T = torch.tensor([-1, -2], device=device).view(1, 1, 2, 1)
    tokens_BM2T = tokens_BM2T.repeat(blocks, positions, 1, steps * patch_size)

    so_far_BN2k = reader.draw(states_BMD, 2, generator=generator).movedim(0, 2)
    tokens_BM2T[..., :patch_size] = so_far_BN2k
    index_BN = torch.arange(positions, device=device).expand(blocks, -1)
    pair = torch.arange(2, device=device)
    reader.start(positions_M.repeat_interleave(2).expand(blocks, -1))
    for step in range(1, steps):
        kept_BN, _ = padded_nonzero(_matters(so_far_BN2k, take(targets_BM4, index_BN)))
        if kept_BN.shape[1] == 0:
            break
        index_BN, so_far_BN2k = take(index_BN, kept_BN), take(so_far_BN2k, kept_BN)
        branches_BN = (2 * kept_BN.unsqueeze(-1) + pair).flatten(1)
        states_BND = reader.extend(branches_BN, so_far_BN2k[..., -patch_size:].flatten(1, 2))
        next_BN2K = reader.draw(states_BND, 1, generator=generator)[0].unflatten(1, (-1, 2))
        so_far_BN2k = torch.cat([so_far_BN2k, next_BN2K], dim=-1)
        rows_B1 = torch.arange(blocks, device=device).unsqueeze(1)
        tokens_BM2T[rows_B1, index_BN, :, step * patch_size : (step + 1) * patch_size] = next_BN2K
    return tokens_BM2T[..., :MAX_N]


def _matters(tokens_BN2k, targets_BN4) -> torch.Tensor:
    """Bool (B, N): whether one of the two continuations agrees so far with the true text or with the other one."""
    first, second = tokens_BN2k.unbind(2)
    target = targets_BN4[..., : first.shape[-1]]
    return (first == target).all(-1) | (second == target).all(-1) | (first == second).all(-1)
