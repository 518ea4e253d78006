"""Estimates Brier-1..4 of an autoregressive (AR) language model, as the published AR estimator does.

The model's probabilities are known, so most of Brier-n = 2 P(y) - sum_x P(x)^2 needs no sampling:

- accuracy: 2 P(y) = 2 prod_i p(y_i | y_<i), from the block's one teacher-forced forward pass;
- collision: sum_x P(x)^2 = E over two sampled prefixes of n-1 tokens of [1{prefixes equal} * sum_v p(v | prefix)^2].

The collision term is zero once the two prefixes differ, so one branch represents both, and positions whose samples
differ are dropped before the next forward pass: the four Brier scores cost about two forward passes over the block.
"""

# B blocks, L tokens, M positions, V vocabulary, N branches (positions whose two samples are still equal)

import warnings

import torch
from torch import Tensor

from calm_transformers.evaluation import branching
from calm_transformers.evaluation.branching import BlockReader, gather_rows, padded_nonzero
from calm_transformers.evaluation.brier import MAX_N, BrierCounts

# Mean L1 distance between the probabilities of the branched and the plain forward pass; bf16 rounding is smaller.
BRANCH_TOLERANCE = 0.02

MAX_PROBS = 2**27  # 0.5 GB in float32


@torch.no_grad()
def brier_counts_ar(
    reader: BlockReader, tokens_BL: Tensor, generator: torch.Generator | None = None, chunk: int | None = None
) -> BrierCounts:
    """Returns the Brier counts of a batch of blocks; every position but the last four predicts the next four tokens.

    chunk: positions per block that are branched in one forward pass; bounds the memory of the attention mask and the
        probabilities. Default: 512, or fewer so that there are at most MAX_PROBS probabilities.
    """
    length = tokens_BL.shape[1]
    logits_BLV = reader.read(tokens_BL)
    if chunk is None:
        chunk = min(512, max(1, MAX_PROBS // (logits_BLV.shape[0] * logits_BLV.shape[-1])))
    positions_M = torch.arange(length - MAX_N, device=tokens_BL.device)
    collisions = [
        _collision(reader, logits_BLV[:, positions_m], positions_m, generator)
        for positions_m in positions_M.split(chunk)
    ]
    return BrierCounts.from_terms(_accuracy(logits_BLV, tokens_BL, chunk), torch.cat(collisions, dim=1))


def _accuracy(logits_BLV: Tensor, tokens_BL: Tensor, chunk: int) -> Tensor:
    """Returns 2 P(y) of the n = 1..4 true tokens after each position, (B, M, 4)."""
    chunks = zip(logits_BLV[:, :-1].split(chunk, 1), tokens_BL[:, 1:].split(chunk, 1), strict=True)
    log_probs = [logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for logits, tokens in chunks]
    return 2 * torch.cat(log_probs, dim=1).unfold(1, MAX_N, 1).cumsum(-1).exp()


def _collision(reader: BlockReader, logits_BMV: Tensor, positions_M: Tensor, generator) -> Tensor:
    """Returns the collision terms of n = 1..4 at M positions, (B, M, 4)."""
    collision_BM4 = logits_BMV.new_zeros(*logits_BMV.shape[:2], MAX_N, dtype=torch.float32)
    index_BN = torch.arange(len(positions_M), device=positions_M.device).expand(len(logits_BMV), -1)
    is_valid_BN = torch.ones_like(index_BN, dtype=torch.bool)
    reader.start(positions_M.expand(len(logits_BMV), -1))
    logits_BNV = logits_BMV
    for n in range(MAX_N):
        probs_BNV = logits_BNV.float().softmax(-1)
        collision_BM4[..., n].scatter_add_(1, index_BN, probs_BNV.square().sum(-1) * is_valid_BN)
        if n == MAX_N - 1:
            break
        pairs = probs_BNV.flatten(0, 1).multinomial(2, replacement=True, generator=generator)
        first_BN, second_BN = pairs.unflatten(0, index_BN.shape).unbind(-1)
        equal_BN, is_valid_next = padded_nonzero(is_valid_BN & (first_BN == second_BN))
        if equal_BN.shape[1] == 0:
            break
        logits_BNV = reader.extend(equal_BN, gather_rows(first_BN, equal_BN))
        index_BN, is_valid_BN = gather_rows(index_BN, equal_BN), is_valid_next
    return collision_BM4


@torch.no_grad()
def causal_lm_reader(model, tokens_BL: Tensor) -> BlockReader:
    """Returns a CausalLMReader if the model supports tree attention, else an UncachedReader, with a warning.

    The check feeds the first block's own tokens as branches, which must reproduce its probabilities. They don't where
    the model ignores a 4D mask (sliding windows shorter than the block, ALiBi, recurrent layers).
    """
    tokens_BL = tokens_BL[:1]
    reader = branching.CausalLMReader(model)
    try:
        probs_BLV = reader.read(tokens_BL).float().softmax(-1)
        positions_BN = torch.arange(tokens_BL.shape[1] - 1, device=tokens_BL.device)[-64:].unsqueeze(0)
        reader.start(positions_BN)
        branches_BN = torch.arange(positions_BN.shape[1], device=tokens_BL.device).unsqueeze(0)
        branched_BNV = reader.extend(branches_BN, gather_rows(tokens_BL, positions_BN + 1)).float().softmax(-1)
        difference = (branched_BNV - gather_rows(probs_BLV, positions_BN + 1)).abs().sum(-1).mean().item()
        reason = f"probabilities differ by {difference:.3g}" if not difference < BRANCH_TOLERANCE else None
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return reader
    warnings.warn(
        f"{type(model).__name__} does not support tree attention ({reason}); every continuation is recomputed "
        "without a KV cache, which is many times slower",
        stacklevel=2,
    )
    return branching.UncachedReader(model)
