"""The CALM model that a recipe asks for: new, or to go on from; whole, frozen in part, with LoRA or auxiliary loss."""

from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn
from transformers import GenerationConfig

from calm.bundle_files import generation_defaults
from calm.command_line import InputError
from calm.configuration_calm import HEADS, CALMConfig
from calm.loading import load_whole
from calm.modeling_calm import CALMForCausalLM
from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.training.auxiliary import AUXILIARY_FILE, MultiTokenLoss, WithAuxiliary
from calm.training.backbone import begin_chain, begin_with_llama
from calm.training.configuration import autoencoder_config_of, changed_config, config_before, config_of, read
from calm.training.distil import teacher_of
from calm.training.extras import need
from calm.training.recipe import Recipe
from calm.training.trainer import last_checkpoint


def build(recipe: Recipe, tokenizer) -> CALMForCausalLM:
    """A model to go on from, or a new one around the trained autoencoder, with the backbone of a Llama or without.

    Raises:
        InputError: as `config_of` and `begin_with_llama`, or no autoencoder.
    """
    if recipe.init_from:
        before = config_before(recipe)
        config = changed_config(recipe, before)
        same_head = partial(load_whole, CALMForCausalLM.from_pretrained, config=config)
        new_head = partial(with_new_head, config=config)
        load = same_head if config.head_type == before.head_type else new_head
        model = read("init_from", recipe.init_from, "train_calm", load)
        fit_head(model, recipe)
        return model
    model = CALMForCausalLM(config_of(recipe, tokenizer, autoencoder_config_of(recipe)))
    load = partial(load_whole, CALMAutoencoder.from_pretrained)
    model.autoencoder.load_state_dict(read("autoencoder", recipe.autoencoder, "train_autoencoder", load).state_dict())
    if begins_with_llama(recipe):
        begin_with_llama(model, recipe)
    model.generation_config = GenerationConfig(**generation_defaults(model.config))
    fit_head(model, recipe)
    return model


def begins_with_llama(recipe: Recipe) -> bool:
    """Unless the run goes on from a checkpoint of its own, which holds all weights."""
    return bool(recipe.init_backbone) and not last_checkpoint(Path(recipe.output_dir))


def with_new_head(name: str, config: CALMConfig) -> CALMForCausalLM:
    """The model of a folder or Hub id with a new head of another type in place of its own.

    Heads of two types have layers of one name, so nothing of the head before may stay. What a head's constructor fills
    is kept only where it is called outside `from_pretrained`.
    """
    model: Any = CALMForCausalLM.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
    model.head = HEADS[config.head_type](config)
    model.head.apply(model._init_weights)
    model.head.to(model.dtype)
    return model


def fit_head(model: CALMForCausalLM, recipe: Recipe) -> None:
    """Fits a head that needs it: to the autoencoder and to the multi-token loss, where there is one."""
    if not model.head.is_fitted:
        model.head.fit(model.autoencoder, multi_token_loss_before(recipe, model.config))


def with_lora(model: CALMForCausalLM, rank: int):
    """The model with a LoRA adapter on every linear layer of the backbone and the head; all else is frozen."""
    need("peft", "train", "lora_rank")
    from peft import LoraConfig, get_peft_model

    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in layers if not name.startswith("autoencoder.")]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", target_modules=targets)
    return get_peft_model(model, lora)


def for_training(model: CALMForCausalLM, recipe: Recipe, tokenizer):
    """What Trainer gets: the model, parts of it frozen or wrapped as the recipe says.

    Raises:
        InputError: drawn targets that the autoencoder has no use for, or as `teacher_of`.
    """
    if recipe.auxiliary_targets and model.autoencoder.config.encoder_context:
        raise InputError(
            f"auxiliary_targets={recipe.auxiliary_targets}: the autoencoder's encoder sees the patches before "
            "(encoder_context), and drawn ones have none."
        )
    if recipe.lora_rank:
        return with_lora(model, recipe.lora_rank)
    if recipe.freeze_backbone:
        model.model.requires_grad_(False)
    if recipe.auxiliary_weight:
        sizes = model.config.vocab_size, model.config.patch_size
        teacher = teacher_of(recipe, tokenizer, *sizes) if recipe.distil else None
        with_loss = WithAuxiliary(
            model,
            recipe.auxiliary_weight,
            recipe.head_weight,
            decay=recipe.auxiliary_decay,
            num_targets=recipe.auxiliary_targets,
            teacher=teacher,
        )
        if state := multi_token_loss_before(recipe, model.config):
            with_loss.auxiliary.load_state_dict(state)
        return with_loss
    return model


def multi_token_loss_before(recipe: Recipe, config: CALMConfig) -> dict[str, Tensor] | None:
    """Weights that the multi-token loss begins with: those of `init_from`, a checkpoint or the run that it is the last
    one of, or `init_backbone`'s output matrix and embeddings.

    Raises:
        InputError: as `begin_chain`.
    """
    if begins_with_llama(recipe):
        loss = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
        begin_chain(loss, recipe)
        return loss.state_dict()
    if not recipe.init_from:
        return None
    before = Path(recipe.init_from)
    path = (last_checkpoint(before) or before) / AUXILIARY_FILE
    if not path.is_file():
        return None
    return {name.removeprefix("auxiliary."): value for name, value in safetensors.torch.load_file(path).items()}
