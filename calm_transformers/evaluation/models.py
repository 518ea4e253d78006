"""Estimates Brier-1..4 of a CALM or another causal LM on blocks of text."""

# B blocks, L tokens of a block, K tokens per patch, V vocabulary

from functools import partial
from math import ceil

import torch

from calm_transformers.evaluation.ar_estimator import brier_counts_ar, causal_lm_reader
from calm_transformers.evaluation.branching import CalmReader
from calm_transformers.evaluation.brier import MAX_N, BrierCounts
from calm_transformers.evaluation.calm_estimator import brier_counts_calm
from calm_transformers.loading import is_calm
from calm_transformers.progress import progress_bar


def positions_per_block(model, block_size: int) -> int:
    """Returns the number of predicted positions in a block, and checks its size."""
    config = model.config
    patch_size = config.patch_size if is_calm(model) else 1
    if block_size % patch_size:
        raise ValueError(f"block_size={block_size}: not divisible by the patch size {patch_size}")
    positions = block_size // patch_size - ceil(MAX_N / patch_size)
    if positions < 1:
        raise ValueError(f"block_size={block_size}: too short to predict {MAX_N} tokens")
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is not None and block_size > max_positions * patch_size:
        raise ValueError(f"block_size={block_size}: the model supports at most {max_positions * patch_size} tokens")
    return positions


@torch.no_grad()
def brier_counts(model, blocks_BL: torch.Tensor, batch_size: int = 1, seed: int = 0) -> BrierCounts:
    """Returns the Brier counts of a CALM or another causal LM on blocks of token ids."""
    positions_per_block(model, blocks_BL.shape[1])  # only its check
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if int(blocks_BL.max()) >= vocab_size:
        raise ValueError(f"token id {int(blocks_BL.max())}: outside the model's vocabulary of {vocab_size}")
    generator = torch.Generator(model.device).manual_seed(seed)
    blocks_BL = blocks_BL.to(model.device)
    if is_calm(model):
        reader = CalmReader(model)
        count_batch = partial(brier_counts_calm, reader, patch_size=model.config.patch_size, generator=generator)
    else:
        reader = causal_lm_reader(model, blocks_BL)
        count_batch = partial(brier_counts_ar, reader, generator=generator)
    counts = BrierCounts.empty()
    with progress_bar(None, "BrierLM", "block", len(blocks_BL)) as bar:
        for batch_BL in blocks_BL.split(batch_size):
            counts += count_batch(tokens_BL=batch_BL)
            bar.update(len(batch_BL))
    return counts
