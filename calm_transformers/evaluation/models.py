"""Loading a CALM or any causal LM, and counting Brier-1..4 of either on blocks of text."""

# B blocks, L tokens of a block, K tokens per patch, V vocabulary

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from math import ceil
from pathlib import Path
from typing import TypeGuard

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from calm_transformers.command_line import need
from calm_transformers.evaluation.ar_estimator import causal_lm_reader, count_ar
from calm_transformers.evaluation.branching import CalmReader
from calm_transformers.evaluation.brier import MAX_N, BrierCounts
from calm_transformers.evaluation.calm_estimator import count_calm
from calm_transformers.loading import check_tokenizer, device_of, load_whole, reading
from calm_transformers.model.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.progress import progress_bar
from calm_transformers.training.tokenizer import load_tokenizer


def is_calm(model) -> TypeGuard[CALMForCausalLM]:
    return model.config.model_type == CALMConfig.model_type


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a folder or Hub id, of one of our models or another; of an adapter, its base's.

    Ours load with this package's code: nothing is registered, and no code of the repository asked for.

    Raises:
        ValueError: there is none, or it is an adapter and PEFT is not installed or no base named, or a configuration
            without model_type.
    """
    with reading(name):
        return _read_config(name)


def _read_config(name: str) -> PretrainedConfig:
    fields, _ = PretrainedConfig.get_config_dict(name)
    if not fields and (adapter := find_adapter_config_file(name)):
        name = _base_of(name, Path(adapter))
        fields, _ = PretrainedConfig.get_config_dict(name)
    for config_class in (CALMConfig, CALMAutoencoderConfig):
        if fields.get("model_type") == config_class.model_type:
            return config_class.from_dict(fields)
    try:
        return AutoConfig.from_pretrained(name)
    except ValueError as error:
        if "model_type" in fields or not str(error).startswith("Unrecognized model"):
            raise
        raise ValueError(f"{name}: its config.json names no model_type.") from error  # upstream names every one it has


def _base_of(name: str, adapter: Path) -> str:
    """The model that an adapter is of, as its adapter_config.json names it."""
    need("peft", "train", f"the adapter {name}")
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{name}: is an adapter whose adapter_config.json names no base_model_name_or_path.")
    return base


def load_causal_lm(name: str, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None):
    """The model of a folder or Hub id, CALM or not, in eval mode; of a PEFT adapter, its base with the adapter on it.

    Args:
        name: folder or Hub id.
        dtype: of the weights; "auto" is as they were saved.
        device: by default a GPU where there is one.

    Raises:
        ValueError: it is no language model, or as `device_of`, `load_config` and `load_whole`.
    """
    device = device_of(None if device is None else str(device))
    config = load_config(name)
    if isinstance(config, CALMAutoencoderConfig):
        raise ValueError(f"{name}: is an autoencoder, not a language model")
    model_class = CALMForCausalLM if isinstance(config, CALMConfig) else AutoModelForCausalLM
    model = load_whole(model_class.from_pretrained, name, dtype=dtype)
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]  # upstream's wrapper of `to` loses `self`


def load_with_tokenizer(name: str, tokenizer: str | None = None, dtype: torch.dtype | str = "auto", device=None):
    """The model as `load_causal_lm`, and its tokenizer or the one that is named.

    Raises:
        ValueError: as there, or the tokenizer is another model's.
    """
    model, found = load_causal_lm(name, dtype, device), load_tokenizer(tokenizer or name)
    check_tokenizer(model, found, tokenizer or name)
    return model, found


def positions_per_block(model, block_size: int) -> int:
    """Predicted positions in a block of L tokens.

    Raises ValueError when the model cannot read such blocks: no whole number of patches, too short, or too long.
    """
    config = model.config
    patch_size = config.patch_size if is_calm(model) else 1
    if block_size % patch_size:
        raise ValueError(f"block_size={block_size}: must be a multiple of the model's patch size {patch_size}")
    positions = block_size // patch_size - ceil(MAX_N / patch_size)
    if positions < 1:
        raise ValueError(f"block_size={block_size}: too short to predict {MAX_N} tokens")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and block_size > longest * patch_size:
        raise ValueError(f"block_size={block_size}: the model reads at most {longest * patch_size} tokens")
    return positions


@torch.no_grad()
def count_model(
    model, blocks_BL: torch.Tensor, batch_size: int = 1, seed: int = 0, bar: tqdm | None = None
) -> BrierCounts:
    """Counts of Brier-1..4 of a CALM or another causal LM on blocks (B, L) of its own tokens.

    Shows a bar of the blocks, or advances the one that it is given.

    Raises ValueError for blocks that the model cannot read and for ids outside its vocabulary.
    """
    positions_per_block(model, blocks_BL.shape[1])
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if int(blocks_BL.max()) >= vocab_size:
        raise ValueError(f"token id {int(blocks_BL.max())}: outside the model's vocabulary of {vocab_size}")
    generator = torch.Generator(model.device).manual_seed(seed)
    blocks_BL = blocks_BL.to(model.device)
    if is_calm(model):
        reader = CalmReader(model)
        count = partial(count_calm, reader, patch_size=model.config.patch_size, generator=generator)
    else:
        reader = causal_lm_reader(model, blocks_BL)
        count = partial(count_ar, reader, generator=generator)
    counts = BrierCounts.empty()
    with progress_bar(None, "BrierLM", "block", len(blocks_BL)) if bar is None else nullcontext(bar) as bar:
        for batch_BL in blocks_BL.split(batch_size):
            counts += count(tokens_BL=batch_BL)
            bar.update(len(batch_BL))
    return counts
