"""The steps of continuous batching: rows of different lengths and laws read and write together, a patch a step.

A step lets every row read the patch that it wrote last, reads a piece of the prompts that are not read yet, and draws
the next patch of each row that has a context. Between steps rows may be added and removed. There are no threads in
here and no clocks: what a row writes is a function of the row alone, up to rounding, which differs between shapes.

Axes: R rows, P patches, K tokens per patch, D hidden size; of the cache B rows of a pass, H key-value heads, C places
of a slot, d size of a head.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from calm_transformers.model.generation_calm_rules import CandidateProcessors
from calm_transformers.model.generation_calm_samplers import BlockSchedule, PatchSampling
from calm_transformers.model.generation_calm_upstream import FIXED_ROTATIONS, MASKED_ATTENTION
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.serving.rows import FinishReason, Row

FIRST_CAPACITY = 64  # patches a slot; doubled as it is needed
PLANS_KEPT = 64  # block plans of laws that were sampled lately


class SlotCache(Cache):
    """Keys and values of rows that come and go: row r has slot r, and its patch p the place p of that slot.

    So rows need no padding between each other, and where a row leaves the last one is copied into its slot. Say which
    rows and places a forward pass is for with `aim`, then hand it over as `cache`.
    """

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


class Engine:
    """
    Args:
        model: in eval mode; it stays as it is.
        prefill_patches: patches of prompts that a step reads at most, so that long ones don't keep rows waiting.

    Raises:
        ValueError: it is no CALM, or its attention or rotations depend on the other rows of a pass.
    """

    def __init__(self, model: CALMForCausalLM, prefill_patches: int):
        check_model(model)
        self.model, self.prefill_patches = model, prefill_patches
        self.rows: list[Row] = []  # of slot 0, 1, …
        self._num_added = 0
        self.device = model.device
        self._cache = SlotCache()
        self._plans: dict[PatchSampling, BlockSchedule] = {}

    def add(self, row: Row) -> None:
        row.number = self._num_added
        self._num_added += 1
        self.rows.append(row)

    def remove(self, row: Row) -> None:
        """Frees a row's slot; the last row moves there."""
        slot, last_slot = self.rows.index(row), len(self.rows) - 1
        if slot != last_slot:
            self._cache.move(last_slot, slot, self.rows[last_slot].num_read)
        self.rows[slot] = self.rows[last_slot]
        self.rows.pop()

    def clear(self) -> None:
        """Removes all rows."""
        self.rows.clear()

    @torch.no_grad()
    def step(self) -> list[tuple[Row, FinishReason | Exception]]:
        """Takes all rows a step on; returns those that have ended and are to be removed, with the reason.

        An exception as the reason is one of the row's `on_piece`, or one of its law. Others are raised.
        """
        self._read_patches()
        self._read_prompts()
        ended: list[tuple[Row, FinishReason | Exception]] = []
        for row, patch in self._write_patches():
            row.hidden_D = None
            try:
                reason = patch if isinstance(patch, Exception) else row.take(patch)
            except Exception as error:
                reason = error
            if reason is not None:
                ended.append((row, reason))
            elif isinstance(patch, list):
                row.unread = patch
        return ended

    # reading

    def _forward(self, slots: list[int], patches_RPK: Tensor, starts: list[int]) -> Tensor:
        """Lets the rows of these slots read patches, each from its place in `starts` on: hidden states (R, P, D)."""
        places_RP = self._cache.aim(slots, starts, patches_RPK.shape[1], self.device)
        return self.model(
            input_ids=patches_RPK.flatten(1).to(self.device),
            attention_mask=self._cache.mask(self.model.dtype),
            position_ids=places_RP,
            cache=self._cache,
            use_cache=True,
        ).last_hidden_state

    def _read_patches(self) -> None:
        """Every row reads the patch that it wrote last.

        Rows whose prompt is not read yet take part, so that slots need no copying: what they read is overwritten.
        """
        if all(row.unread is None for row in self.rows):
            return
        nothing = [0] * self.model.config.patch_size
        patches_R1K = torch.tensor([[row.unread or nothing] for row in self.rows])
        hidden_R1D = self._forward(list(range(len(self.rows))), patches_R1K, [row.num_read for row in self.rows])
        for row, hidden_1D in zip(self.rows, hidden_R1D, strict=True):
            if row.unread is not None:
                row.hidden_D, row.unread, row.num_read = hidden_1D[0], None, row.num_read + 1

    def _read_prompts(self) -> None:
        """Rows that came first read on in their prompts, as many patches together as a step may read."""
        reading: list[tuple[int, Row, int]] = []
        longest = 0
        unread = [(row.number, slot, row) for slot, row in enumerate(self.rows) if not row.is_prompt_read]
        for _, slot, row in sorted(unread):
            length = min(len(row.prompt_PK) - row.num_read, self.prefill_patches)
            if reading and (len(reading) + 1) * max(length, longest) > self.prefill_patches:
                break
            reading.append((slot, row, length))
            longest = max(length, longest)
        if not reading:
            return
        reading.sort(key=lambda each: each[0])  # neighbouring slots need no copying
        patches_RPK = torch.zeros(len(reading), longest, self.model.config.patch_size, dtype=torch.long)
        for patches_PK, (_, row, length) in zip(patches_RPK, reading, strict=True):
            patches_PK[:length] = row.prompt_PK[row.num_read : row.num_read + length]
        slots, starts = [slot for slot, _, _ in reading], [row.num_read for _, row, _ in reading]
        hidden_RPD = self._forward(slots, patches_RPK, starts)
        for hidden_PD, (_, row, length) in zip(hidden_RPD, reading, strict=True):
            row.num_read += length
            if row.is_prompt_read:
                row.hidden_D = hidden_PD[length - 1]

    # writing

    def _write_patches(self) -> list[tuple[Row, list[int] | Exception]]:
        """Draws the next patch of each row that has a context: rows of one law together, which may fail alone, and
        each that has logits processors for itself."""
        laws: dict[tuple, list[Row]] = {}
        for row in self.rows:
            if row.hidden_D is not None:
                own = None if row.processors is None else row.number
                laws.setdefault((row.sampling, row.num_eos_free, row.eos_tokens, own), []).append(row)
        written: list[tuple[Row, list[int] | Exception]] = []
        for law, rows in laws.items():
            try:
                patches = self._draw(rows, law)
            except Exception as error:
                patches = [error] * len(rows)
            written += zip(rows, patches, strict=True)
        return written

    def _draw(self, rows: list[Row], law: tuple[PatchSampling, int, frozenset[int], int | None]) -> list[list[int]]:
        sampling, num_eos_free, eos_tokens, _ = law
        eos_E = torch.tensor(sorted(eos_tokens), dtype=torch.long)
        hidden_RD = torch.stack([row.hidden_D for row in rows if row.hidden_D is not None])
        if len(self._plans) >= PLANS_KEPT:
            self._plans.clear()
        return self.model.sample_patches(
            hidden_RD,
            sampling,
            [row.generator for row in rows],
            self.model.forbidden_tokens(num_eos_free, eos_E, hidden_RD.device),
            self._plans.setdefault(sampling, BlockSchedule()),
            rules_of(rows, eos_E),
        ).tolist()


def rules_of(rows: list[Row], eos_E: Tensor) -> CandidateProcessors | None:
    """Those of rows that are drawn together: of one row alone, or none."""
    processors = [row.processors for row in rows if row.processors is not None]
    texts = [torch.cat([row.prompt_L, torch.tensor(row.tokens, dtype=torch.long)]) for row in rows]
    num_left = max(row.max_new_tokens - len(row.tokens) for row in rows)
    return CandidateProcessors(processors, texts, eos_E, num_left) if processors else None


def check_model(model: CALMForCausalLM) -> None:
    """
    Raises:
        ValueError: it is no CALM, its attention or rotations depend on the other rows of a pass, or as
            `check_weights`.
    """
    if not hasattr(model, "sample_patches") or not hasattr(model, "pack_for_generation"):
        raise ValueError(f"{type(model).__name__} can't be batched: a Batcher takes a CALMForCausalLM.")
    model.check_weights()
    attention = model.config._attn_implementation
    if attention not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation={attention!r}: rows of different lengths need one of {MASKED_ATTENTION}; load the "
            "model with it."
        )
    rotation = model.model.rotary_emb.rope_type
    if rotation not in FIXED_ROTATIONS:
        raise ValueError(
            f"rope_type={rotation!r}: its rotations depend on the longest row of a batch, so a text would change with "
            f"its company; a Batcher takes {FIXED_ROTATIONS}."
        )
