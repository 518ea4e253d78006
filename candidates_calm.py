"""The candidate patches of one generation step: drawn as latent vectors, and decoded no further than the choice needs.

The samplers ask of a candidate only which others of its row are the same patch. Two patches are the same when all K
tokens are, so a candidate whose token at one position no other has is known to be alone, and its other tokens matter
only if it is chosen. `LazyCandidates` decodes position by position on that ground, and only candidates of the pairs
that are asked for; `DecodedCandidates` is the plain path, every token of every candidate, against which it is tested.

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
        self.tokens_RMK = None

    def add(self, rows_A: Tensor, latents_NAZ: Tensor) -> Tensor:
        """Takes the next candidates of some rows and tells them apart from each other and all before.

        Returns:
            ids that are equal within a row, over all blocks, exactly where the patches are, (A, N, K or 1).
        """
        self.take(rows_A, latents_NAZ)
        return self.tell_apart(rows_A)[:, -len(latents_NAZ) :]

    def take(self, rows_A: Tensor, latents_NAZ: Tensor) -> Tensor:
        """Takes the next candidates of some rows, which must have drawn in every block before.

        Returns:
            their numbers within their row, (A, N, 1).
        """
        self._keep(rows_A, latents_NAZ)
        self.num_drawn += len(latents_NAZ)
        number_N = torch.arange(self.num_drawn - len(latents_NAZ), self.num_drawn, device=rows_A.device)
        return number_N[:, None].expand(len(rows_A), -1, -1)

    def _keep(self, rows_A: Tensor, latents_NAZ: Tensor) -> None:
        tokens_NAK = self.autoencoder.decode_tokens(latents_NAZ, self.forbidden_KV).to(rows_A.device)
        self.tokens_RMK = self._append(self.tokens_RMK, rows_A, tokens_NAK)

    def _append(self, old_RM: Tensor | None, rows_A: Tensor, new_NA: Tensor) -> Tensor:
        new_RN = new_NA.new_zeros(self.num_rows, len(new_NA), *new_NA.shape[2:])
        new_RN[rows_A.to(new_NA.device)] = new_NA.transpose(0, 1)
        return new_RN if old_RM is None else torch.cat([old_RM, new_RN], dim=1)

    def tell_apart(self, rows_A: Tensor, pairs_MM: Tensor | None = None, favourite_A: Tensor | None = None) -> Tensor:
        """Ids of all candidates of these rows so far, (A, M, K or 1).

        Args:
            pairs_MM (bool, symmetric): of these pairs the ids must be equal exactly where the patches are; None: of
                all.
            favourite_A: the number of the candidate of each row that is likely to be chosen.
        """
        return self.tokens_RMK[rows_A]

    def patches(self, chosen: Tensor) -> Tensor:
        """The tokens (R, K) of the candidates that were chosen, one of each row, named by their ids."""
        return chosen


class LazyCandidates(DecodedCandidates):
    """Decodes only the tokens that decide which candidates of a row are the same patch. Same results, less work.

    A candidate goes by the number of its row's first candidate with the same patch.

    Args:
        radius (*optional*): latent vectors further apart than this are taken for different patches undecoded, see
            `CALMConfig.repetition_radius`. `None` takes nothing for granted.
    """

    def __init__(
        self,
        autoencoder: CALMAutoencoder,
        num_rows: int,
        forbidden_KV: Tensor | None = None,
        radius: float | None = None,
    ):
        super().__init__(autoencoder, num_rows, forbidden_KV)
        self.radius = radius
        # Of each candidate its latent vector; of each token its half-decoded state. An unknown token's id is −1.
        self.latents_RMZ = self.states_RMKd = None

    def _keep(self, rows_A: Tensor, latents_NAZ: Tensor) -> None:
        states_NAKd = self.autoencoder.decode_states(latents_NAZ)
        tokens_NAK = torch.full(states_NAKd.shape[:3], -1, device=rows_A.device)
        self.latents_RMZ = self._append(self.latents_RMZ, rows_A, latents_NAZ)
        self.states_RMKd = self._append(self.states_RMKd, rows_A, states_NAKd)
        self.tokens_RMK = self._append(self.tokens_RMK, rows_A, tokens_NAK)

    def patches(self, chosen: Tensor) -> Tensor:
        rows_R = torch.arange(self.num_rows, device=chosen.device)
        self._decode(rows_R, self._whole_patches(rows_R, chosen[:, 0]))
        return self.tokens_RMK[rows_R, chosen[:, 0]]

    def tell_apart(self, rows_A: Tensor, pairs_MM: Tensor | None = None, favourite_A: Tensor | None = None) -> Tensor:
        """For each candidate of these rows, the first one of its row with the same patch, (A, M, 1).

        With `pairs_MM`, other pairs than these count as different until they are decoded. The favourites are decoded
        in full, in the same product with the vocabulary as the first tokens of the others.
        """
        number_M = torch.arange(self.num_drawn, device=rows_A.device)
        equal_AMM = self.may_be_equal(rows_A) & (number_M[:, None] != number_M)
        if pairs_MM is not None:
            equal_AMM &= pairs_MM
        wanted_AMK = self._whole_patches(rows_A, favourite_A)
        positions = list(range(self.tokens_RMK.shape[-1]))
        while positions:
            is_open_AM1 = equal_AMM.any(-1, keepdim=True)
            # The last token is the one that most often tells patches apart: the context says least about it.
            at_once = positions if is_open_AM1.sum() * len(positions) <= FEW_TOKENS else positions[-1:]
            positions = positions[: -len(at_once)]
            wanted_AMK[..., at_once] |= is_open_AM1
            self._decode(rows_A, wanted_AMK)
            for token_AM in self.tokens_RMK[rows_A][..., at_once].unbind(-1):
                equal_AMM &= token_AM[:, :, None] == token_AM[:, None]
        # By their tokens, not by the pairs: of three equal ones two may be close to the third alone.
        is_known_AM1 = equal_AMM.any(-1, keepdim=True)
        alone_AM1 = torch.where(is_known_AM1, 0, 1 + number_M[:, None])
        tokens_AMK = self.tokens_RMK[rows_A].masked_fill(~is_known_AM1, 0)
        return group_patches(torch.cat([alone_AM1, tokens_AMK], dim=-1))[0][..., None]

    def may_be_equal(self, rows_A: Tensor) -> Tensor:
        """Which pairs of candidates could be the same patch as far as can be said without decoding, (A, M, M)."""
        latents_AMZ = self.latents_RMZ[rows_A.to(self.latents_RMZ.device)]
        return pairs_within(latents_AMZ, self.radius).to(rows_A.device)

    def _whole_patches(self, rows_A: Tensor, candidate_A: Tensor | None) -> Tensor:
        """Marks all tokens of one candidate of each row, or none, (A, M, K)."""
        marked_AMK = torch.zeros_like(self.tokens_RMK[rows_A], dtype=torch.bool)
        if candidate_A is not None:
            marked_AMK[torch.arange(len(rows_A), device=rows_A.device), candidate_A] = True
        return marked_AMK

    def _decode(self, rows_A: Tensor, wanted_AMK: Tensor) -> None:
        """Makes these tokens known."""
        row, candidate, position = (wanted_AMK & (self.tokens_RMK[rows_A] < 0)).nonzero().unbind(-1)
        if len(row):
            index = rows_A[row], candidate, position
            self.tokens_RMK[index] = self.read(*index)

    def read(self, rows: Tensor, draws: Tensor, positions: Tensor) -> Tensor:
        """The ids of so many tokens, each given by its row, the number of its candidate and its position."""
        states = self.states_RMKd[tuple(index.to(self.states_RMKd.device) for index in (rows, draws, positions))]
        return self.autoencoder.read_tokens(states, positions, self.forbidden_KV).to(rows.device)


def pairs_within(latents_AMZ: Tensor, radius: float | None) -> Tensor:
    """Which pairs of a row's latent vectors are no further apart than the radius, (A, M, M); all when it is None."""
    if radius is None:
        num_rows, num_candidates = latents_AMZ.shape[:2]
        return torch.ones(num_rows, num_candidates, num_candidates, dtype=torch.bool, device=latents_AMZ.device)
    return torch.cdist(latents_AMZ.float(), latents_AMZ.float()) <= radius
