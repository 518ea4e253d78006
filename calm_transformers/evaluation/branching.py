"""Tree attention: computes continuations from many positions of a text in one forward pass.

BrierLM needs continuations from every position of a block. Rolling each position out by itself would run the block
once per position. Here the block is run once, its KV cache is kept, and the first tokens of *all* continuations follow
in a single forward pass as branches of a tree: a 4D attention mask lets each branch attend to the block up to its own
position and to its own earlier tokens, but not to other branches.
"""

# B blocks, L tokens, P patches, K tokens per patch, D hidden, Z latent, V vocabulary, N branches, M selected branches,
# C cached positions

from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from calm_transformers.model.generation_calm_upstream import cache_argument
from calm_transformers.model.kernels_calm import cpu_kernels


class BlockReader(Protocol):
    """The interface between the Brier estimators and a model.

    A state is what the next prediction is made from: the logits (V) of a causal LM, a hidden state (D) of CALM. A unit
    is the input of one step: a token (no axis) or a patch (axis K).
    """

    def read(self, units_BP: Tensor, /) -> Tensor:
        """Runs the model on a batch of blocks and returns the state after each unit, (B, P, ...)."""
        ...

    def start(self, positions_BN: Tensor, /) -> None:
        """Discards earlier branches and starts N branches per block after the units at these positions."""

    def extend(self, parents_BN: Tensor, units_BN: Tensor, /) -> Tensor:
        """Appends one unit to branch parents_BN[:, i] as new branch i and returns the new states, (B, N, ...).

        The new branches replace the current ones. A parent may have several new branches, or none.
        """
        ...


class SamplingReader(BlockReader, Protocol):
    """A BlockReader that also samples, as a CALM's must."""

    def draw(self, states: Tensor, num_samples: int, /, generator: torch.Generator | None = None) -> Tensor:
        """Samples the next units after states (...) and returns token ids, (num_samples, ..., K)."""
        ...


class TreeAttentionReader:
    """Base class of the BlockReaders with a KV cache and tree attention; subclasses call their model in `_forward`."""

    def __init__(self, model):
        self.model = model

    def _forward(self, units, mask, position_ids, cache) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def read(self, units_BP: Tensor) -> Tensor:
        blocks, self.length = units_BP.shape[:2]
        self.cache = DynamicCache()
        position_ids = torch.arange(self.length, device=units_BP.device).expand(blocks, -1)
        return self._forward(units_BP, None, position_ids, self.cache)

    def start(self, positions_BN: Tensor) -> None:
        num_branch_units = self.cache.get_seq_length() - self.length
        if num_branch_units:
            self.cache.crop(-num_branch_units)  # transformers 5 takes only the number of positions to remove
        self.positions_BN = positions_BN
        self.visible_BNC = torch.arange(self.length, device=positions_BN.device) <= positions_BN.unsqueeze(-1)

    @torch.no_grad()
    def extend(self, parents_BN: Tensor, units_BN: Tensor) -> Tensor:
        blocks, branches = parents_BN.shape
        itself_BNN = torch.eye(branches, dtype=torch.bool, device=parents_BN.device).expand(blocks, -1, -1)
        self.visible_BNC = torch.cat([gather_rows(self.visible_BNC, parents_BN), itself_BNN], dim=-1)
        self.positions_BN = gather_rows(self.positions_BN, parents_BN) + 1

        dtype = self.model.dtype
        mask = torch.zeros(self.visible_BNC.shape, dtype=dtype, device=parents_BN.device)
        mask = mask.masked_fill(~self.visible_BNC, torch.finfo(dtype).min).unsqueeze(1)
        return self._forward(units_BN, mask, self.positions_BN, self.cache)


class CausalLMReader(TreeAttentionReader):
    """Runs any Hugging Face causal LM whose attention supports a 4D mask; units are tokens, states are logits."""

    def __init__(self, model):
        super().__init__(model)
        self.cache_argument = cache_argument(model.forward)

    def _forward(self, tokens_BN, mask, position_ids, cache):
        inputs = {"attention_mask": mask, "position_ids": position_ids, self.cache_argument: cache}
        return self.model(input_ids=tokens_BN, use_cache=True, **inputs).logits


class CalmReader(TreeAttentionReader):
    """Runs a CALM; units are patches, states are hidden states of its backbone."""

    def _forward(self, tokens_BNK, mask, position_ids, cache):
        with cpu_kernels(position_ids.numel(), self.model.config.hidden_size):
            inputs = {"attention_mask": mask, "position_ids": position_ids, "cache": cache}
            return self.model.model(tokens_BNK.flatten(1), use_cache=True, **inputs).last_hidden_state

    @torch.no_grad()
    def draw(self, states_D: Tensor, num_samples: int, generator=None, temperature: float = 1.0) -> Tensor:
        """Samples next patches given hidden states (..., D) and returns token ids, (num_samples, ..., K).

        A temperature other than 1 must be one that the head is distilled for.
        """
        with cpu_kernels(num_samples * states_D[..., 0].numel(), self.model.config.hidden_size):
            samples = self.model.head.sample(states_D, num_samples, generator, temperature=temperature)
            return self.model.head.decode(samples, self.model.autoencoder)


class UncachedReader:
    """Recomputes the whole sequence of each branch without a cache: slower, but supports every causal LM."""

    batch_size = 16

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def read(self, tokens_BL: Tensor) -> Tensor:
        self.tokens_BL = tokens_BL
        return self.model(input_ids=tokens_BL, use_cache=False).logits

    def start(self, positions_BN: Tensor) -> None:
        self.positions_BN = positions_BN
        self.sequences_BNL = self.tokens_BL.unsqueeze(1).expand(-1, positions_BN.shape[1], -1)

    @torch.no_grad()
    def extend(self, parents_BN: Tensor, tokens_BN: Tensor) -> Tensor:
        self.positions_BN = gather_rows(self.positions_BN, parents_BN) + 1
        # The branch's last token is followed by the block's own text, which causal attention ignores.
        self.sequences_BNL = gather_rows(self.sequences_BNL, parents_BN)
        self.sequences_BNL = self.sequences_BNL.scatter(2, self.positions_BN.unsqueeze(-1), tokens_BN.unsqueeze(-1))

        sequences, ends = self.sequences_BNL.flatten(0, 1), self.positions_BN.flatten()
        states = []
        for rows, last in zip(sequences.split(self.batch_size), ends.split(self.batch_size), strict=True):
            logits = self.model(input_ids=rows[:, : last.max() + 1], use_cache=False).logits
            states.append(logits[torch.arange(len(rows), device=rows.device), last])
        return torch.cat(states).unflatten(0, parents_BN.shape)


def padded_nonzero(mask_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the indices of each row's true entries, padded to the longest row, and whether each is valid, (B, M)."""
    count_B = mask_BN.sum(1)
    index_BM = mask_BN.int().argsort(dim=1, descending=True, stable=True)[:, : int(count_B.max())]
    valid_BM = torch.arange(index_BM.shape[1], device=mask_BN.device) < count_B.unsqueeze(1)
    return index_BM, valid_BM


def gather_rows(values_BN: Tensor, index_BM: Tensor) -> Tensor:
    """Selects entries of axis 1 row by row: values (B, N, ...) and indices (B, M) give (B, M, ...)."""
    return values_BN[torch.arange(len(index_BM), device=index_BM.device).unsqueeze(1), index_BM]
