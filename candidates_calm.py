"""The candidate patches of one generation step: drawn as latent vectors, and decoded no further than the choice needs.

The samplers ask of a candidate only which others of its row are the same patch. Two patches are the same when all K
tokens are, so a candidate whose token at one position no other has is known to be alone, and its other tokens matter
only if it is chosen. `LazyCandidates` decodes position by position on that ground; `DecodedCandidates` is the plain
path, every token of every candidate, against which it is tested.

Axes: R rows, A rows that still draw, N new candidates, M candidates so far, K tokens per patch, Z latent size, d
width of the decoder, V vocabulary.
"""

import torch
from torch import Tensor

from .modeling_calm_autoencoder import CALMAutoencoder
from .samplers_calm import group_patches

FEW_TOKENS = 96  # so many are read at once: a product with the vocabulary costs as much as 25 more tokens


class DecodedCandidates:
    """All candidates decoded in full as they come.

    Args:
        autoencoder: decodes.
        num_rows: R.
        forbidden_KV (`(K, V)` bool, *optional*): tokens that may not stand at a position.
    """

    def __init__(self, autoencoder: CALMAutoencoder, num_rows: int, forbidden_KV: Tensor | None = None):
        self.autoencoder, self.num_rows, self.forbidden_KV = autoencoder, num_rows, forbidden_KV
        self.num_drawn = 0

    def add(self, rows_A: Tensor, latents_NAZ: Tensor) -> Tensor:
        """Takes the next candidates of some rows, which must have drawn in every block before.

        Returns:
            ids that are equal within a row, over all blocks, exactly where the patches are, (A, N, K or 1).
        """
        self.num_drawn += len(latents_NAZ)
        return self.autoencoder.decode_tokens(latents_NAZ, self.forbidden_KV).transpose(0, 1).to(rows_A.device)

    def patches(self, chosen: Tensor) -> Tensor:
        """The tokens (R, K) of the candidates that were chosen, one of each row, named by their ids from `add`."""
        return chosen


class LazyCandidates(DecodedCandidates):
    """Decodes only the tokens that decide which candidates of a row are the same patch. Same results, less work.

    A candidate goes by the number of its row's first candidate with the same patch.
    """

    def __init__(self, autoencoder: CALMAutoencoder, num_rows: int, forbidden_KV: Tensor | None = None):
        super().__init__(autoencoder, num_rows, forbidden_KV)
        self.states_RMKd = self.tokens_RMK = None  # of each token: half decoded; its id, −1 while unknown

    def add(self, rows_A: Tensor, latents_NAZ: Tensor) -> Tensor:
        num_new = len(latents_NAZ)
        states_ANKd = self.autoencoder.decode_states(latents_NAZ).transpose(0, 1)
        states_RNKd = states_ANKd.new_zeros(self.num_rows, *states_ANKd.shape[1:])
        states_RNKd[rows_A.to(states_RNKd.device)] = states_ANKd
        tokens_RNK = torch.full(states_RNKd.shape[:3], -1, device=rows_A.device)
        if self.num_drawn:
            states_RNKd = torch.cat([self.states_RMKd, states_RNKd], dim=1)
            tokens_RNK = torch.cat([self.tokens_RMK, tokens_RNK], dim=1)
        self.states_RMKd, self.tokens_RMK = states_RNKd, tokens_RNK
        self.num_drawn += num_new
        return self._tell_apart(rows_A)[:, -num_new:, None]

    def patches(self, chosen: Tensor) -> Tensor:
        rows_R = torch.arange(self.num_rows, device=chosen.device)
        self._decode(rows_R, chosen[:, 0], list(range(self.tokens_RMK.shape[-1])))
        return self.tokens_RMK[rows_R, chosen[:, 0]]

    def _tell_apart(self, rows_A: Tensor) -> Tensor:
        """For each candidate of these rows, the first one of its row with the same patch, (A, M)."""
        num_candidates, patch_size = self.tokens_RMK.shape[1:]
        first_AM = torch.zeros(len(rows_A), num_candidates, dtype=torch.long, device=rows_A.device)
        shared_AM = torch.full_like(first_AM, num_candidates > 1, dtype=torch.bool)
        positions = list(range(patch_size))
        while positions:
            row_S, draw_S = shared_AM.nonzero().unbind(-1)
            # The last token is the one that most often tells patches apart: the context says least about it.
            at_once = positions if len(row_S) * len(positions) <= FEW_TOKENS else positions[-1:]
            positions = positions[: -len(at_once)]
            self._decode(rows_A[row_S], draw_S, at_once)
            tokens_AMK = self.tokens_RMK[rows_A][..., at_once].masked_fill(~shared_AM[..., None], 0)
            first_AM, counts_AM = group_patches(torch.cat([first_AM[..., None], tokens_AMK], dim=-1))
            shared_AM = counts_AM > 1
        return first_AM

    def _decode(self, rows_S: Tensor, draws_S: Tensor, positions: list[int]) -> None:
        """Makes the tokens of these candidates at these positions known."""
        candidate, position = (self.tokens_RMK[rows_S, draws_S][:, positions] < 0).nonzero().unbind(-1)
        if len(candidate):
            index = rows_S[candidate], draws_S[candidate], torch.tensor(positions, device=rows_S.device)[position]
            self.tokens_RMK[index] = self.read(*index)

    def read(self, rows: Tensor, draws: Tensor, positions: Tensor) -> Tensor:
        """The ids of so many tokens, each given by its row, the number of its candidate and its position."""
        states = self.states_RMKd[tuple(index.to(self.states_RMKd.device) for index in (rows, draws, positions))]
        return self.autoencoder.read_tokens(states, positions, self.forbidden_KV).to(rows.device)
