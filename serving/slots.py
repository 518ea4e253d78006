"""A key-value cache for rows of different lengths, which come and go.

Row r of the batch has slot r, and its patch p the place p of that slot. So rows need no padding between each other,
and where a row leaves the last one is copied into its slot.

Axes: B rows of a pass, P patches of a pass, H key-value heads, C places of a slot, d size of a head.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

FIRST_CAPACITY = 64  # patches a slot; doubled as it is needed


class SlotCache(Cache):
    """Say which rows and places a forward pass is for with `aim`, then hand it over as `cache`."""

    def __init__(self):
        super().__init__(layers=[])
        self.stores: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys and values (slots, H, C, d)
        self.rows: list[int] = []
        self.rows_B = self.places_BP = torch.empty(0, dtype=torch.long)
        self.num_read = 0  # places of each row that the pass reads

    def aim(self, rows: list[int], starts: list[int], num_patches: int, device: torch.device) -> Tensor:
        """The next pass is for so many patches of these rows, each from this place of its own on: places (B, P)."""
        self.rows, self.num_read = rows, max(starts) + num_patches
        self.rows_B = torch.tensor(rows, device=device)
        self.places_BP = torch.tensor(starts, device=device)[:, None] + torch.arange(num_patches, device=device)
        return self.places_BP

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What the patches of the pass may attend to: to be added to attention scores, (B, 1, P, C read)."""
        place_C = torch.arange(self.num_read, device=self.places_BP.device)
        is_hidden = place_C > self.places_BP[:, None, :, None]
        return torch.zeros(is_hidden.shape, dtype=dtype, device=is_hidden.device).masked_fill_(
            is_hidden, torch.finfo(dtype).min
        )

    def get_seq_length(self, *args, **kwargs) -> int:
        return 0  # positions and mask are given with each pass

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Keeps (B, H, P, d); returns the places read (B, H, C, d), of which those after a row's own hold anything."""
        device = key_states.device
        rows_B, places_BP = self.rows_B.to(device), self.places_BP.to(device)
        stores = self._grown(layer_idx, key_states, value_states)
        for store, states in zip(stores, (key_states, value_states), strict=True):
            store[rows_B[:, None], :, places_BP] = states.transpose(1, 2)
        first, last = self.rows[0], self.rows[-1]
        are_neighbours = self.rows == list(range(first, last + 1))  # then nothing is copied
        index = slice(first, last + 1) if are_neighbours else rows_B
        keys, values = (store[index, :, : self.num_read] for store in stores)
        return keys, values

    def _grown(self, layer: int, *states: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's stores, large enough for the pass."""
        old = self.stores.get(layer)
        slots, capacity = (0, FIRST_CAPACITY) if old is None else (len(old[0]), old[0].shape[2])
        needed = max(self.rows) + 1
        if old is not None and slots >= needed and capacity >= self.num_read:
            return old
        slots = slots if slots >= needed else max(needed, 2 * slots)
        while capacity < self.num_read:
            capacity *= 2
        keys, values = (s.new_zeros(slots, s.shape[1], capacity, s.shape[3]) for s in states)
        new = keys, values
        if old is not None:
            for store, kept in zip(new, old, strict=True):
                store[: len(kept), :, : kept.shape[2]] = kept
        self.stores[layer] = new
        return new

    def move(self, source: int, target: int, num_patches: int) -> None:
        """Copies a row's patches into another slot."""
        if num_patches == 0:  # the slot may not be there yet
            return
        for stores in self.stores.values():
            for store in stores:
                store[target, :, :num_patches] = store[source, :, :num_patches]
