"""Estimates the cost of a recipe without running it: parameters by part, FLOPs, memory.

Models are built on the meta device. Head, autoencoder and auxiliary loss are run there and their matmuls counted, 2
FLOPs per weight. In the backbone every linear layer runs once per position, and attention takes 4·P·D per layer and
position (scores and weighted sum over a full context of P positions, as the paper counts). A backward pass takes twice
the FLOPs of its forward. Element-wise operations and embedding look-ups are not counted.

Axes: K tokens per patch, P patches of a block, D hidden size, Z latent size.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from calm_transformers.model.configuration_calm import CALMAutoencoderConfig
from calm_transformers.model.heads_calm import PatchTarget
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder
from calm_transformers.training.auxiliary import LOGITS_CHUNK_SIZE, MultiTokenLoss
from calm_transformers.training.distil_temperature import NUM_HEAD_SAMPLES, NUM_PROPOSALS
from calm_transformers.training.recipe import CONFIGS, Recipe


@dataclass
class Cost:
    """Parameters and FLOPs per token of each part of a model.

    Args:
        parameters: part → number of parameters.
        train_flops, inference_flops: part → FLOPs per trained token, forward and backward, or per generated token.
        trainable: number of parameters with gradients.
        saved_activations: estimated number of elements per token that autograd saves for the backward pass.
        network_calls: forward passes of the head's network per sample.
        temporaries: number of elements, in float32, that a loss in chunks holds at once, whatever the batch.
    """

    parameters: dict[str, int]
    train_flops: dict[str, float]
    inference_flops: dict[str, float]
    trainable: int
    saved_activations: float
    network_calls: int | None = None
    temporaries: int = 0


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class CallProfile(NamedTuple):
    """FLOPs of a call's matmuls, and the number of elements that autograd saves for its backward pass."""

    flops: int
    saved_activations: int


def profile_call(call: Callable, *args, **kwargs) -> CallProfile:
    """Runs `call` once and returns its counts."""
    saved = {}  # storage → number of elements

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        with FlopCounterMode(display=False) as counter:
            result = call(*args, **kwargs)
    del result  # keeps the saved tensors alive until here, so that no storage address is reused
    return CallProfile(counter.get_total_flops(), sum(saved.values()))


def linear_flops(module: nn.Module) -> int:
    """Returns the FLOPs of applying each linear layer in the module to one vector."""
    return sum(2 * layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def linear_activations(module: nn.Module) -> int:
    """Estimates, within a third, the elements saved for the backward pass: inputs and outputs of the linear layers."""
    return sum(layer.in_features + layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear))


def attention_flops(config, num_positions: int) -> int:
    """Returns the FLOPs, over all layers, of one position that attends to `num_positions`."""
    attention_size = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return 4 * num_positions * attention_size * config.num_hidden_layers


def calm_cost(config, block_size: int) -> Cost:
    with torch.device("meta"):
        model = CALMForCausalLM(config)
        context, latent = torch.zeros(1, config.hidden_size), torch.zeros(1, config.latent_size)
        tokens = torch.zeros(1, config.patch_size, dtype=torch.long)
    K, head, backbone, autoencoder = config.patch_size, model.head, model.model, model.autoencoder
    embedding_flops = linear_flops(backbone.embed_proj)
    layer_flops = linear_flops(backbone.layers) + attention_flops(config, block_size // K)
    head_loss = profile_call(head.loss, context, PatchTarget(tokens, posterior=(latent, latent)))
    # With no posterior given, the head's loss may run the encoder.
    encoding_flops = profile_call(head.loss, context, PatchTarget(tokens, autoencoder)).flops - head_loss.flops
    with torch.no_grad():
        sampling = profile_call(head.sample, context, num_samples=1)
    backbone_activations = linear_activations(backbone.embed_proj) + linear_activations(backbone.layers)
    parameters = {
        "token embedding": count_parameters(backbone.embed_tokens),
        "patch embedding": count_parameters(backbone.embed_proj),
        "backbone": count_parameters(backbone.layers) + count_parameters(backbone.norm),
        "head": count_parameters(head),
    }
    return Cost(
        parameters=parameters | {"autoencoder (frozen)": count_parameters(autoencoder)},
        train_flops={
            "patch embedding": 3 * embedding_flops / K,
            "backbone": 3 * layer_flops / K,
            "head": 3 * head_loss.flops / K,
            "autoencoder": encoding_flops / K,
        },
        inference_flops={
            "patch embedding": embedding_flops / K,
            "backbone": layer_flops / K,
            "head": sampling.flops / K,
            "autoencoder": 0 if head.samples_tokens else profile_call(autoencoder.decode, latent).flops / K,
        },
        trainable=sum(parameters.values()),
        saved_activations=(backbone_activations + head_loss.saved_activations) / K,
        network_calls=head.network_calls,
    )


def autoencoder_cost(config: CALMAutoencoderConfig) -> Cost:
    with torch.device("meta"):
        model = CALMAutoencoder(config)
        patch, latent = torch.zeros(1, config.patch_size, dtype=torch.long), torch.zeros(1, config.latent_size)
    K, parameters = config.patch_size, {"encoder": count_parameters(model.encoder)}
    parameters["decoder"] = count_parameters(model) - parameters["encoder"]  # its output matrix is tied to the encoder
    profiles = {"encoder": profile_call(model.encode, patch), "decoder": profile_call(model.decode, latent)}
    inference_flops = {part: profile.flops / K for part, profile in profiles.items()}
    train_flops = {part: 3 * flops for part, flops in inference_flops.items()}
    activations = profile_call(model, patch, labels=patch).saved_activations / K
    return Cost(parameters, train_flops, inference_flops, sum(parameters.values()), activations)


def ar_cost(config, block_size: int) -> Cost:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parameters = {
        "token embedding": count_parameters(model.model.embed_tokens),
        "backbone": count_parameters(model.model.layers) + count_parameters(model.model.norm),
        "output matrix": 0 if config.tie_word_embeddings else count_parameters(model.lm_head),
    }
    backbone_flops = linear_flops(model.model.layers) + attention_flops(config, block_size)
    inference_flops: dict[str, float] = {"backbone": backbone_flops, "output matrix": linear_flops(model.lm_head)}
    train_flops = {part: 3 * flops for part, flops in inference_flops.items()}
    activations = linear_activations(model.model.layers) + linear_activations(model.lm_head)
    return Cost(parameters, train_flops, inference_flops, sum(parameters.values()), activations)


def recipe_cost(recipe: Recipe, config=None, teacher=None) -> Cost:
    """Returns a recipe's cost. `config` is by default the model section's.

    With `distil_temperature`, `teacher` is the configuration of the model whose head teaches, None for the MTP loss.
    """
    config = config or CONFIGS[recipe.kind](**recipe.model)
    if recipe.kind == "autoencoder":
        return autoencoder_cost(config)
    if recipe.kind == "ar":
        return ar_cost(config, recipe.data.block_size)
    cost = calm_cost(config, recipe.data.block_size)
    train_flops = cost.train_flops
    if recipe.auxiliary_weight:
        with torch.device("meta"):
            loss = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
            hidden = torch.zeros(1, 2, config.hidden_size)
            labels = torch.zeros(1, 2 * config.patch_size, dtype=torch.long)
        with torch.no_grad():  # which skips the gradient that is computed with the loss
            loss_flops = profile_call(loss, hidden, labels).flops
        cost.parameters["MTP loss (not exported)"] = count_parameters(loss)
        cost.trainable += count_parameters(loss)
        saved = profile_call(loss, hidden, labels).saved_activations - loss.lm_head.weight.numel()  # its gradient
        cost.saved_activations += saved / config.patch_size
        cost.temporaries = 4 * LOGITS_CHUNK_SIZE  # logits, their logarithms and gradients
        target_flops = profile_call(loss.sample, hidden[:, 0], num_samples=1).flops
        train_flops["MTP loss"] = (3 * loss_flops + recipe.auxiliary_targets * target_flops) / config.patch_size
        cost.inference_flops["MTP loss"] = 0
        train_flops["autoencoder"] *= 1 + recipe.auxiliary_targets
    if recipe.distil_temperature:
        add_temperature_teacher(cost, config, teacher)
    if not recipe.head_weight:
        train_flops["head"] = train_flops["autoencoder"] = 0
    if recipe.freeze_backbone or recipe.distil_temperature:
        train_flops |= {part: train_flops[part] / 3 for part in ("patch embedding", "backbone")}  # no backward pass
    return cost


def add_temperature_teacher(cost: Cost, config, teacher) -> None:
    """Adds the samples of a teacher of temperature, and its parameters; every target is encoded."""
    with torch.device("meta"):
        context = torch.zeros(1, config.hidden_size)
        chain = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
    if teacher is None:
        parameters, flops = count_parameters(chain), profile_call(chain.sample, context, NUM_PROPOSALS).flops
    else:
        head_cost = calm_cost(teacher, teacher.patch_size)
        parameters = head_cost.parameters["head"]
        per_token = head_cost.inference_flops["head"] + head_cost.inference_flops["autoencoder"]
        flops = NUM_HEAD_SAMPLES * per_token * config.patch_size
    cost.parameters["teacher (frozen)"] = parameters
    cost.train_flops["teacher"], cost.inference_flops["teacher"] = flops / config.patch_size, 0
    cost.train_flops["autoencoder"] *= config.num_samples
    cost.trainable = cost.parameters["head"]


def print_cost(recipe: Recipe, config, notes: Iterable[str] = (), teacher=None) -> None:
    """Prints the report of a dry run: notes on what was assumed, parameters, FLOPs and memory."""
    cost, training = recipe_cost(recipe, config, teacher), recipe.training
    print("\n".join([f"recipe {recipe.name}", *notes, "", "parameters"]))
    for part, number in cost.parameters.items():
        print(f"  {part:<24}{number / 1e6:>12,.2f} M")
    exported = sum(number for part, number in cost.parameters.items() if "(" not in part)
    digits = 1 if recipe.kind == "ar" or exported > 1e9 else 2  # as in these models' usual names
    name = "total, no autoencoder" if recipe.kind == "calm" else "total"
    print(f"  {name:<24}{exported / 1e6:>12,.{digits}f} M")

    print("\nFLOPs per token (2 per weight and use, attention 4·P·D per layer, backward twice the forward)")
    train, inference = sum(cost.train_flops.values()), sum(cost.inference_flops.values())
    rows = [(part, cost.train_flops[part], cost.inference_flops[part]) for part in cost.train_flops]
    for part, trained, generated in [*rows, ("total", train, inference)]:
        print(f"  {part:<22}{trained:>12.2e} trained{generated:>12.2e} generated")
    if cost.network_calls is not None:
        print(f"  one sample of the head: {cost.network_calls} network call{'s' if cost.network_calls > 1 else ''}")

    batch_tokens = training.get("per_device_train_batch_size", 8) * recipe.data.block_size
    tokens_per_step = batch_tokens * training.get("gradient_accumulation_steps", 1)
    # 16 bytes: weight, gradient and Adam's two moments; frozen: the weight alone.
    weights_gib = (16 * cost.trainable + 4 * (sum(cost.parameters.values()) - cost.trainable)) / 2**30
    activations = (2 if training.get("bf16") else 4) * cost.saved_activations * batch_tokens
    activations_gib = (activations + 4 * cost.temporaries) / 2**30
    print(f"\none step of one process: {tokens_per_step:,} tokens, {train * tokens_per_step:.2e} FLOPs")
    print(f"memory: {weights_gib:.2f} GiB for float32 weights, gradients and Adam,")
    without = "without gradient_checkpointing"
    print(f"  about {activations_gib:.2f} GiB for activations of {batch_tokens:,} tokens {without}")
