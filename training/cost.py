"""What a recipe costs, before anything is run: parameters by part, FLOPs, memory. Nothing is allocated.

Formula: a linear layer of n weights takes 2n FLOPs each time it is applied; attention takes 4·P·D a layer and position
(scores and weighted sum over a full context of P positions, as the paper counts); a backward pass takes twice its
forward. Element-wise work and embedding look-ups are left out.

Axes: K tokens per patch, P patches of a block, D hidden size, N samples of the loss.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaForCausalLM

from calm.configuration_calm import CALMAutoencoderConfig
from calm.heads_calm import DIFFUSION_SAMPLING_STEPS, FLOW_STEPS
from calm.modeling_calm import CALMForCausalLM
from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.training.recipe import CONFIGS, Recipe

PAPER_TOKENS = 5e11  # 250,000 steps of 2 million tokens; paper 4.1
# FLOPs of the whole training and of one generated token, paper table 1.
PAPER_FLOPS = {"calm-m": (3.7e20, 2.9e8), "transformer-s": (6.6e20, 4.4e8)}


@dataclass
class Cost:
    """Parameters by part, and FLOPs by token.

    Args:
        parameters: part → number of parameters.
        train_flops, inference_flops: part → FLOPs of one token, forward and backward, or one generated token.
        trainable: number of parameters with gradients.
    """

    parameters: dict[str, int]
    train_flops: dict[str, float]
    inference_flops: dict[str, float]
    trainable: int


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def linear_flops(module: nn.Module, skip: tuple[str, ...] = ()) -> int:
    """2 × the weights of the linear layers in the module, but those whose own name begins with one of `skip`."""
    return sum(
        2 * layer.weight.numel()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not name.rpartition(".")[2].startswith(skip or ("\0",))
    )


def backbone_flops(model: nn.Module, num_positions: int) -> int:
    """One position through all Llama layers, attending to `num_positions`."""
    config = model.config
    attention_size = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return linear_flops(model.layers) + 4 * num_positions * attention_size * config.num_hidden_layers


def encoder_flops(autoencoder: CALMAutoencoder) -> int:
    """One patch through the encoder."""
    encoder, K = autoencoder.encoder, autoencoder.config.patch_size
    by_token = linear_flops(encoder.layers[: encoder.num_token_layers])
    return linear_flops(encoder) + (K - 1) * by_token


def decoder_flops(autoencoder: CALMAutoencoder) -> int:
    """One patch through the decoder, output matrix included."""
    decoder, K = autoencoder.decoder, autoencoder.config.patch_size
    by_token = linear_flops(decoder.layers[decoder.num_patch_layers :]) + linear_flops(decoder.lm_head)
    return linear_flops(decoder) + (K - 1) * by_token


def head_flops(model: CALMForCausalLM) -> tuple[int, int]:
    """One patch through the head: the forward of the loss, and one generated draw."""
    config, head = model.config, model.head
    if config.head_type == "energy":
        once = linear_flops(head) - linear_flops(head, skip=("context",))  # these see the context only
        return once + config.num_samples * (linear_flops(head) - once), linear_flops(head)
    steps = config.sampling_steps or (2 * FLOW_STEPS if config.head_type == "flow" else DIFFUSION_SAMPLING_STEPS)
    return config.num_samples * linear_flops(head), steps * linear_flops(head)


def calm_cost(config, block_size: int) -> Cost:
    with torch.device("meta"):
        model = CALMForCausalLM(config)
    K, backbone = config.patch_size, backbone_flops(model.model, block_size // config.patch_size)
    head_train, head_draw = head_flops(model)
    patch_embedding = linear_flops(model.model.embed_proj)
    parameters = {
        "token embedding": count(model.model.embed_tokens),
        "patch embedding": count(model.model.embed_proj),
        "backbone": count(model.model.layers) + count(model.model.norm),
        "head": count(model.head),
    }
    return Cost(
        parameters | {"autoencoder (frozen)": count(model.autoencoder)},
        {
            "patch embedding": 3 * patch_embedding / K,
            "backbone": 3 * backbone / K,
            "head": 3 * head_train / K,
            "autoencoder": encoder_flops(model.autoencoder) / K,
        },
        {
            "patch embedding": patch_embedding / K,
            "backbone": backbone / K,
            "head": head_draw / K,
            "autoencoder": decoder_flops(model.autoencoder) / K,
        },
        sum(parameters.values()),
    )


def autoencoder_cost(config: CALMAutoencoderConfig) -> Cost:
    with torch.device("meta"):
        model = CALMAutoencoder(config)
    K, parameters = config.patch_size, {"encoder": count(model.encoder), "decoder": count(model.decoder)}
    parameters["decoder"] = count(model) - parameters["encoder"]  # the output matrix is the encoder's embedding
    parts = {"encoder": encoder_flops(model) / K, "decoder": decoder_flops(model) / K}
    return Cost(parameters, {part: 3 * flops for part, flops in parts.items()}, parts, sum(parameters.values()))


def ar_cost(config, block_size: int) -> Cost:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parameters = {
        "token embedding": count(model.model.embed_tokens),
        "backbone": count(model.model.layers) + count(model.model.norm),
        "output matrix": 0 if config.tie_word_embeddings else count(model.lm_head),
    }
    parts = {"backbone": backbone_flops(model.model, block_size), "output matrix": linear_flops(model.lm_head)}
    return Cost(parameters, {part: 3 * flops for part, flops in parts.items()}, parts, sum(parameters.values()))


def recipe_cost(recipe: Recipe, config=None) -> Cost:
    config = config or CONFIGS[recipe.kind](**recipe.model)
    if recipe.kind == "autoencoder":
        return autoencoder_cost(config)
    return (calm_cost if recipe.kind == "calm" else ar_cost)(config, recipe.data.block_size)


def print_cost(recipe: Recipe, config) -> None:
    """The dry run's report."""
    cost, training = recipe_cost(recipe, config), recipe.training
    print(f"recipe {recipe.name}\n\nparameters")
    for part, number in cost.parameters.items():
        print(f"  {part:<22}{number / 1e6:>12,.2f} M")
    digits = 1 if recipe.kind == "ar" or cost.trainable > 1e9 else 2  # as these models are usually named
    name = "total, no autoencoder" if recipe.kind == "calm" else "total"
    print(f"  {name:<22}{cost.trainable / 1e6:>12,.{digits}f} M")

    print("\nFLOPs a token (2 per weight and use, attention 4·P·D a layer, backward twice the forward)")
    train, inference = sum(cost.train_flops.values()), sum(cost.inference_flops.values())
    rows = [(part, cost.train_flops[part], cost.inference_flops[part]) for part in cost.train_flops]
    for part, trained, generated in [*rows, ("total", train, inference)]:
        print(f"  {part:<22}{trained:>12.2e} trained{generated:>12.2e} generated")
    if recipe.name in PAPER_FLOPS:
        paper_train, paper_inference = PAPER_FLOPS[recipe.name]
        print(f"  {PAPER_TOKENS:.0e} tokens: {train * PAPER_TOKENS:.1e} trained, the paper says {paper_train:.1e}")
        print(f"  a token: {inference:.1e} generated, the paper says {paper_inference:.1e}")
        if recipe.kind == "calm":
            print("  (trained with less: here the head works on the context once, not once per sample)")

    rows = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    tokens = rows * recipe.data.block_size
    frozen = sum(cost.parameters.values()) - cost.trainable
    print(f"\na step of one process: {tokens:,} tokens, {train * tokens:.2e} FLOPs")
    print(f"memory: {(16 * cost.trainable + 4 * frozen) / 2**30:.2f} GiB for float32 weights, gradients and Adam")
