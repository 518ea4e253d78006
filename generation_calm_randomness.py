"""Where a step's random numbers come from: one generator for all of its rows, or one a row.

With a generator a row, a row's patch depends on its own context and generator alone: neither on the rows that are
generated beside it nor on how many draws are made at a time.

Axes: R rows, N draws of a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .heads_calm import GenerativeHead

FIRST_PAGE = 32  # draws
KINDS: tuple[str, ...] = ("uniform", "exponential", "head")

MakePage = Callable[[int, torch.Generator], dict[str, Tensor]]  # of so many draws, tensors (..., N, 1, size)


class StepRandomness:
    """Random numbers of one step, all from one generator (None: torch's own), in the order they are asked for."""

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator

    @classmethod
    def of(cls, generator: Randomness) -> StepRandomness:
        """A generator, or one for each row, as what they give in one step; a `StepRandomness` as it is."""
        if isinstance(generator, StepRandomness):
            return generator
        return RowRandomness(generator) if isinstance(generator, Sequence) else StepRandomness(generator)

    def uniform(self, rows_R: Tensor, num_draws: int) -> Tensor:
        """On [0, 1), float32, for so many more draws of these rows, (R, N), which have asked in every call before."""
        return torch.rand(len(rows_R), num_draws, generator=self.generator, device=rows_R.device)

    def exponential(self, rows_R: Tensor, num_draws: int) -> Tensor:
        """Standard exponential variates; otherwise as `uniform`."""
        noise_RN = torch.empty(len(rows_R), num_draws, device=rows_R.device, dtype=torch.float32)
        return noise_RN.exponential_(generator=self.generator)

    def head_noise(self, head: GenerativeHead, context_RD: Tensor, rows_R: Tensor, num_draws: int) -> dict[str, Any]:
        """What `head.sample` is given beside the contexts of these rows; otherwise as `uniform`."""
        return {"generator": self.generator}

    def predrawn_head_noise(
        self, head: GenerativeHead, context_RD: Tensor, rows_R: Tensor, num_draws: int
    ) -> dict[str, Tensor]:
        """The same as tensors, drawn now."""
        return head.predrawn_noise(num_draws, len(rows_R), context_RD, self.generator)


class PredrawnRandomness(StepRandomness):
    """Random numbers that are drawn already, as many as one step takes.

    Args:
        draws: "uniform" and "exponential" (R, N), where they are asked for; the others are the head's.
    """

    def __init__(self, draws: dict[str, Tensor]):
        super().__init__()
        self.draws = draws

    def uniform(self, rows_R: Tensor, num_draws: int) -> Tensor:
        return self.draws["uniform"]

    def exponential(self, rows_R: Tensor, num_draws: int) -> Tensor:
        return self.draws["exponential"]

    def predrawn_head_noise(
        self, head: GenerativeHead, context_RD: Tensor, rows_R: Tensor, num_draws: int
    ) -> dict[str, Tensor]:
        return {name: x for name, x in self.draws.items() if name not in KINDS}

    head_noise = predrawn_head_noise


class RowRandomness(StepRandomness):
    """Random numbers of one step, each row's from its own generator, which gives three seeds a step and no more."""

    def __init__(self, generators: Sequence[torch.Generator]):
        super().__init__()
        seeds = [torch.randint(2**62, (len(KINDS),), generator=g, device=g.device).tolist() for g in generators]
        self.books = {kind: [_Book(seeds_of_row[i]) for seeds_of_row in seeds] for i, kind in enumerate(KINDS)}
        self.num_taken = dict.fromkeys(KINDS, 0)

    def uniform(self, rows_R: Tensor, num_draws: int) -> Tensor:
        return self._numbers("uniform", rows_R, num_draws, Tensor.uniform_)

    def exponential(self, rows_R: Tensor, num_draws: int) -> Tensor:
        return self._numbers("exponential", rows_R, num_draws, Tensor.exponential_)

    def _numbers(self, kind: str, rows_R: Tensor, num_draws: int, fill: Callable[..., Tensor]) -> Tensor:
        def make(size: int, generator: torch.Generator) -> dict[str, Tensor]:
            return {"values": fill(torch.empty(size, 1, 1, device=generator.device), generator=generator)}

        return self._take(kind, rows_R, num_draws, rows_R.device, make)["values"][..., 0].T

    def predrawn_head_noise(
        self, head: GenerativeHead, context_RD: Tensor, rows_R: Tensor, num_draws: int
    ) -> dict[str, Tensor]:
        def make(size: int, generator: torch.Generator) -> dict[str, Tensor]:
            return head.predrawn_noise(size, 1, context_RD, generator)

        return self._take("head", rows_R, num_draws, context_RD.device, make)

    head_noise = predrawn_head_noise

    def _take(self, kind: str, rows_R: Tensor, num_draws: int, device: torch.device, make: MakePage) -> dict:
        """Tensors (..., N, R, size) of the next draws of these rows."""
        start = self.num_taken[kind]
        self.num_taken[kind] += num_draws
        rows = [self.books[kind][row].read(start + num_draws, device, make) for row in rows_R.tolist()]
        return {name: torch.cat([row[name].narrow(-3, start, num_draws) for row in rows], dim=-2) for name in rows[0]}


class _Book:
    """The random numbers of one row's draws, of one kind, in pages of 32, 32, 64, … draws.

    Each page is drawn at once and from a seed of its own: a generator asked for 3 numbers and then 5 need not give the
    8 that it gives when asked once.
    """

    def __init__(self, seed: int):
        self.seed, self.num_draws = seed, 0
        self.values: dict[str, Tensor] = {}

    def read(self, num_draws: int, device: torch.device, make: MakePage) -> dict[str, Tensor]:
        """At least so many draws, from the first on."""
        while self.num_draws < num_draws:
            size = max(self.num_draws, FIRST_PAGE)
            page = make(size, torch.Generator(device).manual_seed(self.seed + self.num_draws))
            old = self.values
            self.values = {name: torch.cat([old[name], new], dim=-3) if old else new for name, new in page.items()}
            self.num_draws += size
        return self.values


Randomness = torch.Generator | Sequence[torch.Generator] | StepRandomness | None
