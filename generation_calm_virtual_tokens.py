"""PEFT's virtual tokens (prompt tuning, p-tuning, prefix tuning) in `generate`: read into the cache before the prompt.

PEFT's `generate` replaces `prepare_inputs_for_generation` on the instance by a method of the wrapper, which CALM asks
for the virtual tokens themselves. Those of prompt tuning and p-tuning are embeddings of tokens, K of which make one
patch; those of prefix tuning are keys and values, each of one patch. Axes: B batch, P patches, K tokens per patch, D
hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

NEEDS_CACHE = "virtual tokens (PEFT's prompt tuning, p-tuning, prefix tuning) stand in the cache"


def adapter_of(model) -> Any:
    """PEFT's wrapper whose `generate` is calling, where it brings virtual tokens; else None.

    Raises:
        ValueError: something else has replaced the method, and would be ignored.
    """
    replacement = vars(model).get("prepare_inputs_for_generation")
    owner = getattr(replacement, "__self__", None)
    if replacement is None or owner is model:  # PEFT puts it back so
        return None
    if not hasattr(owner, "get_prompt"):
        raise ValueError(
            "prepare_inputs_for_generation of this model was replaced: CALM's generate() packs patches itself and "
            "would ignore the replacement."
        )
    return owner


def num_virtual_patches(model) -> int:
    """Of the patches that virtual tokens are; `ValueError` where they are no whole ones."""
    adapter = adapter_of(model)
    if adapter is None:
        return 0
    config, patch_size = adapter.active_peft_config, model.config.patch_size
    if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        return config.num_virtual_tokens
    if config.num_virtual_tokens % patch_size:
        raise ValueError(
            f"num_virtual_tokens={config.num_virtual_tokens}: must be a multiple of patch_size={patch_size}, for "
            "virtual tokens are read as whole patches."
        )
    return config.num_virtual_tokens // patch_size


def read_virtual_tokens(
    model, inputs: dict[str, Any], cache: Cache | None, compiles: bool, task_ids: Tensor | None = None
) -> dict[str, Any]:
    """Reads a model's virtual tokens, if it has any, into an empty cache.

    Args:
        model: whose `generate` runs.
        inputs: `input_ids` (B, P·K) and the `attention_mask` (B, P) by patch, or `None`.
        cache: filled here.
        compiles: whether the steps are to be compiled.
        task_ids (`(B,)`): of multitask prompt tuning.

    Returns:
        The inputs, with a mask that counts the virtual patches.

    Raises:
        ValueError: no cache, or compiled steps.
    """
    num_patches = num_virtual_patches(model)
    if not num_patches:
        return inputs
    if cache is None:
        raise ValueError(f"use_cache=False: {NEEDS_CACHE}, so leave it on.")
    if compiles:
        raise ValueError(f"compile_config: {NEEDS_CACHE} before the padding, which compiled steps don't know.")
    prompt = adapter_of(model).get_prompt(batch_size=len(inputs["input_ids"]), task_ids=task_ids)
    if isinstance(prompt, Tensor):
        model(inputs_embeds=prompt.to(model.dtype), cache=cache, use_cache=True)
    else:
        place = torch.arange(num_patches, device=inputs["input_ids"].device)
        for index, layer in enumerate(prompt.layers):
            keys, values = (states.to(model.dtype) for states in (layer.keys, layer.values))
            cache.update(keys, values, index, {"cache_position": place})
    mask = inputs["attention_mask"]
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(mask), num_patches), mask], dim=1)
    return {**inputs, "attention_mask": mask}
