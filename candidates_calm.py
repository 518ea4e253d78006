"""The candidate patches of one generation step: drawn as latent vectors, and decoded no further than the choice needs.

The samplers ask of a candidate only which others of its row are the same patch. Two patches are the same when all K
tokens are, so a candidate whose token at one position no other has is known to be alone, and its other tokens matter
only if it is chosen. `LazyCandidates` decodes position by position on that ground, and only candidates of the pairs
that are asked for; `DecodedCandidates` is the plain path, every token of every candidate, against which it is tested.

Axes: R rows, A rows that still draw, N new candidates, M candidates so far, K tokens per patch, Z latent size, d
width of the decoder, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling_calm_autoencoder import CALMAutoencoder
from .samplers_calm import group_patches

FEW_TOKENS = 96  # so many are read at once: a product with the vocabulary costs as much as 25 more tokens
PAIRS_AT_ONCE = 2**21  # distances made at a time


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

    def tell_apart(self, rows_A: Tensor, pairs: str = "all", favourite_A: Tensor | None = None) -> Tensor:
        """Ids of all candidates of these rows so far, (A, M, K or 1).

        Args:
            pairs: of which pairs the ids must be equal exactly where the patches are, as `compared_pairs` names them.
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

    def tell_apart(self, rows_A: Tensor, pairs: str = "all", favourite_A: Tensor | None = None) -> Tensor:
        """Names of the candidates of these rows, (A, M, 1): the number of a candidate of the row with the same patch.

        Of other pairs than those asked for, equal ones may have two names. The favourites are decoded in full, in the
        same product with the vocabulary as the first tokens of the others.
        """
        latents_AMZ = None if self.radius is None else self.places(rows_A).float()
        shape = len(rows_A), self.num_drawn
        if pairs == "all":
            equal = EqualInRow(shape, rows_A.device, latents_AMZ, self.radius)
        else:
            equal = EqualNeighbours(shape, rows_A.device, latents_AMZ, self.radius, disjoint=pairs == "disjoint")
        wanted_AMK = self._whole_patches(rows_A, favourite_A)
        positions = list(range(self.tokens_RMK.shape[-1]))
        while positions:
            is_open_AM1 = equal.has_partner_AM[..., None]
            # The last token is the one that most often tells patches apart: the context says least about it.
            at_once = positions if is_open_AM1.sum() * len(positions) <= FEW_TOKENS else positions[-1:]
            positions = positions[: -len(at_once)]
            wanted_AMK[..., at_once] |= is_open_AM1
            self._decode(rows_A, wanted_AMK)
            equal.narrow(self.tokens_RMK[rows_A][..., at_once])
        return equal.names()[..., None]

    def places(self, rows_A: Tensor) -> Tensor:
        """The latent vectors whose distances the radius is compared with, (A, M, Z)."""
        return self.latents_RMZ[rows_A.to(self.latents_RMZ.device)].to(rows_A.device)

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


class EqualNeighbours:
    """Which candidates of a row may still be the same patch as the next one.

    Args:
        shape: (A, M).
        latents_AMZ, radius: those further apart are different from the start.
        disjoint: candidate 2i is compared with 2i + 1 alone.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        latents_AMZ: Tensor | None = None,
        radius: float | None = None,
        disjoint: bool = False,
    ):
        num_rows, num_candidates = shape
        self.links_AL = torch.ones(num_rows, max(num_candidates - 1, 0), dtype=torch.bool, device=device)
        if radius is not None:
            self.links_AL &= (latents_AMZ[:, 1:] - latents_AMZ[:, :-1]).norm(dim=-1) <= radius
        if disjoint:
            self.links_AL[:, 1::2] = False

    @property
    def has_partner_AM(self) -> Tensor:
        return F.pad(self.links_AL, (1, 0)) | F.pad(self.links_AL, (0, 1))

    def narrow(self, tokens_AMk: Tensor) -> None:
        """Takes some more tokens of all candidates into account; of those without a partner they don't matter."""
        self.links_AL &= (tokens_AMk[:, 1:] == tokens_AMk[:, :-1]).all(-1)

    def names(self) -> Tensor:
        """The first candidate of each run of equal ones, (A, M)."""
        is_linked_AM = F.pad(self.links_AL, (1, 0))
        number_M = torch.arange(is_linked_AM.shape[1], device=is_linked_AM.device)
        return number_M.masked_fill(is_linked_AM, 0).cummax(-1).values


class EqualInRow:
    """Which candidates of a row may still be the same patch, of all pairs; memory grows with M, not with M².

    Args: as in `EqualNeighbours`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        latents_AMZ: Tensor | None = None,
        radius: float | None = None,
    ):
        self.latents_AMZ, self.radius = latents_AMZ, radius
        self.group_AM = torch.zeros(shape, dtype=torch.long, device=device)
        self.found_AM = None

    @property
    def has_partner_AM(self) -> Tensor:
        if self.found_AM is None:
            self.found_AM = self._find_partners()
        return self.found_AM

    def narrow(self, tokens_AMk: Tensor) -> None:
        """Takes some more tokens of all candidates into account; of those without a partner they don't matter."""
        number_M = torch.arange(self.group_AM.shape[1], device=tokens_AMk.device)
        alone_AM = (1 + number_M).masked_fill(self.has_partner_AM, 0)
        # Equal by their tokens, not by the pairs: of three equal ones two may be close to the third alone.
        known_AMk = tokens_AMk.masked_fill(~self.has_partner_AM[..., None], 0)
        keys_AMk = torch.cat([self.group_AM[..., None], alone_AM[..., None], known_AMk], dim=-1)
        self.group_AM, self.found_AM = group_patches(keys_AMk)[0], None

    def names(self) -> Tensor:
        """The first candidate of the row with the same patch, (A, M)."""
        return self.group_AM

    def _find_partners(self) -> Tensor:
        """Whether another candidate has the same tokens so far and lies within the radius, (A, M)."""
        if self.radius is None:
            return group_patches(self.group_AM[..., None])[1] > 1
        num_rows, num_candidates = self.group_AM.shape
        number_M, found = torch.arange(num_candidates, device=self.group_AM.device), []
        for number_C in number_M.split(max(1, PAIRS_AT_ONCE // max(1, num_rows * num_candidates))):
            near_ACM = torch.cdist(self.latents_AMZ[:, number_C], self.latents_AMZ) <= self.radius
            near_ACM &= self.group_AM[:, number_C, None] == self.group_AM[:, None]
            found.append((near_ACM & (number_C[:, None] != number_M)).any(-1))
        return torch.cat(found, dim=1)
