"""Continuous batching: sequences of different lengths and sampling settings advance together, one patch per step.

A step runs the backbone on every sequence's last patch, prefills a chunk of the prompts, and samples the next patch of
each sequence that has a hidden state. Sequences are added and removed between steps. No threads, no clocks: a
sequence's tokens depend on itself alone, up to rounding, which differs between shapes.

Axes: R sequences, P patches, K tokens per patch, D hidden size, E EOS tokens; of the cache B slots of a forward pass,
H key-value heads, C positions of a slot, d head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from calm_transformers.model.generation_calm_sequences import CandidateProcessors
from calm_transformers.model.generation_calm_upstream import SUPPORTED_ATTENTION, SUPPORTED_ROPE_TYPES
from calm_transformers.model.kernels_calm import cpu_kernels
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.serving.sequence import FinishReason, SequenceState, TokenLogprobs

ACCELERATOR_ERROR: Any = getattr(torch, "AcceleratorError", ())  # after it the process can't use the device
INITIAL_CAPACITY = 64  # patches per slot; doubled when needed


class SlotCache(Cache):
    """Key-value cache with one slot per sequence: patch p of a sequence is at position p of its slot.

    Sequences need no padding between each other; when one is removed, the last is copied into its slot. Call
    `set_positions` before each forward pass, then pass the cache to the model as `cache`.
    """

    def __init__(self):
        super().__init__(layers=[])
        self.stores: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys and values (slots, H, C, d)
        self.slots: list[int] = []
        self.slots_B = self.positions_BP = torch.empty(0, dtype=torch.long)
        self.length = 0  # positions of each slot that the pass attends to

    def set_positions(self, slots: list[int], starts: list[int], num_patches: int, device: torch.device) -> Tensor:
        """Sets the next pass: `num_patches` patches in each of `slots`, at the positions (B, P) from `starts` on."""
        self.slots, self.length = slots, max(starts) + num_patches
        self.slots_B = torch.tensor(slots, device=device)
        self.positions_BP = torch.tensor(starts, device=device)[:, None] + torch.arange(num_patches, device=device)
        return self.positions_BP

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Returns the causal mask of the pass, to be added to attention scores: (B, 1, P, C)."""
        position_C = torch.arange(self.length, device=self.positions_BP.device)
        is_masked = position_C > self.positions_BP[:, None, :, None]
        mask = torch.zeros(is_masked.shape, dtype=dtype, device=is_masked.device)
        return mask.masked_fill_(is_masked, torch.finfo(dtype).min)

    def get_seq_length(self, *args, **kwargs) -> int:
        return 0  # positions and mask are passed to each forward

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Stores states (B, H, P, d); returns the slots' keys and values (B, H, C, d), arbitrary where masked."""
        device = key_states.device
        slots_B, positions_BP = self.slots_B.to(device), self.positions_BP.to(device)
        stores = self._grow_stores(layer_idx, key_states, value_states)
        for store, states in zip(stores, (key_states, value_states), strict=True):
            store[slots_B[:, None], :, positions_BP] = states.transpose(1, 2)
        first, last = self.slots[0], self.slots[-1]
        is_contiguous = self.slots == list(range(first, last + 1))  # then indexing copies nothing
        index = slice(first, last + 1) if is_contiguous else slots_B
        keys, values = (store[index, :, : self.length] for store in stores)
        return keys, values

    def _grow_stores(self, layer: int, *states: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's keys and values, reallocated if they are too small for the pass."""
        old = self.stores.get(layer)
        num_slots, capacity = (0, INITIAL_CAPACITY) if old is None else (len(old[0]), old[0].shape[2])
        num_needed = max(self.slots) + 1
        if old is not None and num_slots >= num_needed and capacity >= self.length:
            return old
        num_slots = num_slots if num_slots >= num_needed else max(num_needed, 2 * num_slots)
        while capacity < self.length:
            capacity *= 2
        keys, values = (s.new_zeros(num_slots, s.shape[1], capacity, s.shape[3]) for s in states)
        new = keys, values
        if old is not None:
            for new_store, old_store in zip(new, old, strict=True):
                new_store[: len(old_store), :, : old_store.shape[2]] = old_store
        self.stores[layer] = new
        return new

    def copy_slot(self, source: int, target: int, num_patches: int) -> None:
        """Copies the first patches of a slot to another slot."""
        if num_patches == 0:  # the slot may not be allocated yet
            return
        for stores in self.stores.values():
            for store in stores:
                store[target, :, :num_patches] = store[source, :, :num_patches]


class Engine:
    """Runs the model, step by step, on the sequences that were added.

    Args:
        model: in eval mode; it is not changed.
        prefill_patches: most prompt patches per step, so that long prompts don't hold up other sequences.

    Raises:
        ValueError: see `check_supports_batching`.
    """

    def __init__(self, model: CALMForCausalLM, prefill_patches: int):
        check_supports_batching(model)
        self.model, self.prefill_patches = model, prefill_patches
        self.sequences: list[SequenceState] = []  # sequence i has slot i of the cache
        self._num_added = 0
        self.device = model.device
        self._cache = SlotCache()

    def add(self, sequence: SequenceState) -> None:
        sequence.arrival_index = self._num_added
        self._num_added += 1
        self.sequences.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Removes a sequence; the last one is moved to its slot."""
        slot, last_slot = self.sequences.index(sequence), len(self.sequences) - 1
        if slot != last_slot:
            self._cache.copy_slot(last_slot, slot, self.sequences[last_slot].num_cached)
        self.sequences[slot] = self.sequences[last_slot]
        self.sequences.pop()

    @torch.no_grad()
    def step(self) -> list[tuple[SequenceState, FinishReason | Exception]]:
        """Advances all sequences by one step, and returns those to be removed with the reason why they ended.

        The reason is an exception where a sequence's `on_piece` or its sampling failed; other exceptions are raised.
        """
        self._forward_last_patches()
        self._prefill()
        ended: list[tuple[SequenceState, FinishReason | Exception]] = []
        for sequence, patch_or_error in self._sample_patches():
            sequence.hidden_D = None
            if isinstance(patch_or_error, Exception):
                ended.append((sequence, patch_or_error))
                continue
            try:
                reason = sequence.append_patch(patch_or_error)
            except Exception as error:
                reason = error
            if reason is None:
                sequence.uncached_patch = patch_or_error
            else:
                ended.append((sequence, reason))
        return ended

    def _forward(self, slots: list[int], patches_RPK: Tensor, starts: list[int]) -> Tensor:
        """Runs the backbone on patches of R slots, at positions from `starts` on; returns hidden states (R, P, D)."""
        positions_RP = self._cache.set_positions(slots, starts, patches_RPK.shape[1], self.device)
        with cpu_kernels(positions_RP.numel(), self.model.config.hidden_size):
            return self.model(
                input_ids=patches_RPK.flatten(1).to(self.device),
                attention_mask=self._cache.attention_mask(self.model.dtype),
                position_ids=positions_RP,
                cache=self._cache,
                use_cache=True,
            ).last_hidden_state

    def _forward_last_patches(self) -> None:
        """Runs the backbone on the last patch of each sequence.

        Sequences still in prefill take part with a dummy patch, so that slots are contiguous; it is overwritten later.
        """
        if all(sequence.uncached_patch is None for sequence in self.sequences):
            return
        dummy = [0] * self.model.config.patch_size
        patches_R1K = torch.tensor([[sequence.uncached_patch or dummy] for sequence in self.sequences])
        starts = [sequence.num_cached for sequence in self.sequences]
        hidden_R1D = self._forward(list(range(len(self.sequences))), patches_R1K, starts)
        for sequence, hidden_1D in zip(self.sequences, hidden_R1D, strict=True):
            if sequence.uncached_patch is not None:
                sequence.hidden_D, sequence.uncached_patch = hidden_1D[0], None
                sequence.num_cached += 1

    def _prefill(self) -> None:
        """Prefills prompts first come, first served, up to `prefill_patches` per step, padding included."""
        chunks: list[tuple[int, SequenceState, int]] = []  # slot, sequence, number of patches
        longest = 0  # with padding
        waiting = [(slot, sequence) for slot, sequence in enumerate(self.sequences) if not sequence.is_prefilled]
        for slot, sequence in sorted(waiting, key=lambda slot_and_sequence: slot_and_sequence[1].arrival_index):
            length = min(len(sequence.prompt_PK) - sequence.num_cached, self.prefill_patches)
            # Few different lengths, at most a quarter longer: oneDNN keeps megabytes for each shape that it has seen.
            step = 2 ** max(length.bit_length() - 3, 0)
            padded = min(-(-length // step) * step, self.prefill_patches)
            if chunks and (len(chunks) + 1) * max(padded, longest) > self.prefill_patches:
                break
            chunks.append((slot, sequence, length))
            longest = max(padded, longest)
        if not chunks:
            return
        chunks.sort(key=lambda chunk: chunk[0])  # contiguous slots need no copying
        patches_RPK = torch.zeros(len(chunks), longest, self.model.config.patch_size, dtype=torch.long)
        for patches_PK, (_, sequence, length) in zip(patches_RPK, chunks, strict=True):
            patches_PK[:length] = sequence.prompt_PK[sequence.num_cached : sequence.num_cached + length]
        slots, starts = [slot for slot, _, _ in chunks], [sequence.num_cached for _, sequence, _ in chunks]
        hidden_RPD = self._forward(slots, patches_RPK, starts)
        for hidden_PD, (_, sequence, length) in zip(hidden_RPD, chunks, strict=True):
            sequence.num_cached += length
            if sequence.is_prefilled:
                sequence.hidden_D = hidden_PD[length - 1]

    def _sample_patches(self) -> list[tuple[SequenceState, list[int] | Exception]]:
        """Samples the next patch of each sequence that has a hidden state, or returns the error of its sampling.

        Sequences with equal settings are sampled together, those with logits processors each alone.
        """
        groups: dict[tuple, list[SequenceState]] = {}
        for sequence in self.sequences:
            if sequence.hidden_D is not None:
                own_group = None if sequence.logits_processors is None else sequence.arrival_index
                key = (sequence.sampling, sequence.num_tokens_without_eos, sequence.eos_tokens, own_group)
                groups.setdefault(key, []).append(sequence)
        sampled: list[tuple[SequenceState, list[int] | Exception]] = []
        for group in groups.values():
            try:
                patches = self._sample_group(group)
            except Exception as error:
                if isinstance(error, ACCELERATOR_ERROR):
                    raise
                patches = [error] * len(group)
            sampled += zip(group, patches, strict=True)
        return sampled

    def _sample_group(self, group: list[SequenceState]) -> list[list[int]]:
        """Samples the next patch of each sequence of a group, whose settings are equal."""
        sampling, eos_E = group[0].sampling, torch.tensor(sorted(group[0].eos_tokens), dtype=torch.long)
        hidden_RD = torch.stack([sequence.hidden_D for sequence in group if sequence.hidden_D is not None])
        patches_RK = self.model.sample_patches(
            hidden_RD,
            sampling,
            [sequence.generator for sequence in group],
            self.model.forbidden_tokens(group[0].num_tokens_without_eos, eos_E, hidden_RD.device),
            processors=make_candidate_processors(group[0], eos_E),
        ).patches
        if any(sequence.num_logprobs is not None for sequence in group):
            logits_RKV = self.model.head.token_logits(hidden_RD, patches_RK.to(hidden_RD.device))
            log_probs_RKV = logits_RKV.float().log_softmax(-1)
            for sequence, patch_K, log_probs_KV in zip(group, patches_RK.tolist(), log_probs_RKV, strict=True):
                sequence.logprobs += top_logprobs(patch_K, log_probs_KV, sequence.num_logprobs or 0)
        return patches_RK.tolist()


def top_logprobs(tokens_K: list[int], log_probs_KV: Tensor, num_top: int) -> list[TokenLogprobs]:
    """Returns the log-probability of each token and of the most probable ones at its position."""
    chosen_K = log_probs_KV[range(len(tokens_K)), tokens_K].tolist()
    top = log_probs_KV.topk(min(num_top, log_probs_KV.shape[-1]))
    tops = [dict(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return [TokenLogprobs(*each) for each in zip(tokens_K, chosen_K, tops, strict=True)]


def make_candidate_processors(sequence: SequenceState, eos_E: Tensor) -> CandidateProcessors | None:
    """Returns the sequence's logits processors for its candidates, or `None` if it has none."""
    if sequence.logits_processors is None:
        return None
    text_L = torch.cat([sequence.prompt_L, torch.tensor(sequence.tokens, dtype=torch.long)])
    num_left = sequence.max_new_tokens - len(sequence.tokens)
    return CandidateProcessors([sequence.logits_processors], [text_L], eos_E, num_left)


def check_supports_batching(model: CALMForCausalLM) -> None:
    """Checks that a model can generate sequences of different lengths in one batch.

    Raises:
        ValueError: it is not a CALM, its attention or rotations depend on the rest of the batch, or `check_weights`
            fails.
    """
    if not hasattr(model, "sample_patches") or not hasattr(model, "pack_for_generation"):
        raise ValueError(f"{type(model).__name__} is not supported: a Batcher needs a CALMForCausalLM.")
    model.check_weights()
    attention = model.config._attn_implementation
    if attention not in SUPPORTED_ATTENTION:
        raise ValueError(
            f"attn_implementation={attention!r}: sequences of different lengths need one of {SUPPORTED_ATTENTION}; "
            "load the model with it."
        )
    rotation = model.model.rotary_emb.rope_type
    if rotation not in SUPPORTED_ROPE_TYPES:
        raise ValueError(
            f"rope_type={rotation!r}: its rotations depend on the longest sequence of a batch, so a text would depend "
            f"on the other requests; a Batcher supports {SUPPORTED_ROPE_TYPES}."
        )
