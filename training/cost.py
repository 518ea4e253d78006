"""What a recipe costs, before anything is run: parameters by part, FLOPs, memory. Nothing is allocated.

Formula: a linear layer of n weights takes 2n FLOPs each time it is applied; attention takes 4·P·D a layer and position
(scores and weighted sum over a full context of P positions, as the paper counts); a backward pass takes twice its
forward. Element-wise work and embedding look-ups are left out.

Axes: K tokens per patch, P patches of a block, D hidden size, N samples of the loss.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaForCausalLM

from calm.configuration_calm import CALMAutoencoderConfig
from calm.heads_calm import DIFFUSION_SAMPLING_STEPS, FLOW_STEPS
from calm.modeling_calm import CALMForCausalLM
from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.training.auxiliary import MultiTokenLoss
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
        kept: numbers that one token leaves for the backward pass, about.
    """

    parameters: dict[str, int]
    train_flops: dict[str, float]
    inference_flops: dict[str, float]
    trainable: int
    kept: float


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def flops(layer: nn.Linear) -> int:
    return 2 * layer.weight.numel()


def width(layer: nn.Linear) -> int:
    """Numbers kept for the backward pass, its input and its output: within a third of what autograd keeps in all."""
    return layer.in_features + layer.out_features


def linear(module: nn.Module, measure, skip: tuple[str, ...] = ()) -> int:
    """Sum of a measure over the linear layers in the module, but those with a part of their name that begins so."""
    layers = [(name.split("."), layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return sum(measure(layer) for parts, layer in layers if not any(part.startswith(skip) for part in parts))


def attention_flops(config, num_positions: int) -> int:
    """All layers' scores and weighted sums of one position that attends to `num_positions`."""
    size = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return 4 * num_positions * size * config.num_hidden_layers


def encoder(autoencoder: CALMAutoencoder, measure) -> int:
    """One patch through the encoder."""
    module, K = autoencoder.encoder, autoencoder.config.patch_size
    return linear(module, measure) + (K - 1) * linear(module.layers[: module.num_token_layers], measure)


def decoder(autoencoder: CALMAutoencoder, measure) -> int:
    """One patch through the decoder, output matrix included."""
    module, K = autoencoder.decoder, autoencoder.config.patch_size
    by_token = linear(module.layers[module.num_patch_layers :], measure) + measure(module.lm_head)
    return linear(module, measure) + (K - 1) * by_token


def head_in_training(model: CALMForCausalLM, measure) -> int:
    """One patch through the head's loss. What sees only the context runs once, not N times."""
    once = linear(model.head, measure) - linear(model.head, measure, skip=("context",))
    return once + model.config.num_samples * (linear(model.head, measure) - once + later_tokens(model.head, measure))


def head_in_generation(model: CALMForCausalLM, measure) -> int:
    """One draw of the head: all of it at every solver step, but for the context layers."""
    once = linear(model.head.context_layers, measure)
    each = linear(model.head, measure) - once + later_tokens(model.head, measure)
    return once + steps_of_a_draw(model.config) * each


def later_tokens(head: nn.Module, measure) -> int:
    """What the token-flow head does beside one pass through each of its layers: its chain goes on K − 1 times, and
    probabilities are multiplied with embeddings and codes."""
    if not head.predicts_tokens:
        return 0
    K, V, Z = head.codes.shape
    with torch.device("meta"):
        embed, end = nn.Linear(V, head.chain.lm_head.in_features), nn.Linear(K * V, Z)
    again = linear(head.chain.mlp, measure) + measure(head.chain.lm_head) + measure(embed)
    return (K - 1) * again + measure(end)


def steps_of_a_draw(config) -> int:
    if config.head_type == "energy":
        return 1
    if config.head_type in ("flow", "token_flow"):
        return 2 * (config.sampling_steps or FLOW_STEPS)  # the midpoint rule evaluates the net twice a step
    return config.sampling_steps or DIFFUSION_SAMPLING_STEPS


def calm_cost(config, block_size: int) -> Cost:
    with torch.device("meta"):
        model = CALMForCausalLM(config)
    K, head, backbone = config.patch_size, model.head, model.model
    patch_embedding = linear(backbone.embed_proj, flops)
    layers = linear(backbone.layers, flops) + attention_flops(config, block_size // K)
    parameters = {
        "token embedding": count(backbone.embed_tokens),
        "patch embedding": count(backbone.embed_proj),
        "backbone": count(backbone.layers) + count(backbone.norm),
        "head": count(head) - sum(p.numel() for p in head.parameters() if not p.requires_grad),
    }
    kept = linear(backbone.embed_proj, width) + linear(backbone.layers, width) + head_in_training(model, width)
    return Cost(
        parameters | {"autoencoder (frozen)": count(model.autoencoder)},
        {
            "patch embedding": 3 * patch_embedding / K,
            "backbone": 3 * layers / K,
            "head": 3 * head_in_training(model, flops) / K,
            "autoencoder": encoder(model.autoencoder, flops) / K,
        },
        {
            "patch embedding": patch_embedding / K,
            "backbone": layers / K,
            "head": head_in_generation(model, flops) / K,
            "autoencoder": decoder(model.autoencoder, flops) / K,
        },
        sum(parameters.values()),
        kept / K,
    )


def autoencoder_cost(config: CALMAutoencoderConfig) -> Cost:
    with torch.device("meta"):
        model = CALMAutoencoder(config)
    K, parameters = config.patch_size, {"encoder": count(model.encoder)}
    parameters["decoder"] = count(model) - parameters["encoder"]  # the output matrix is the encoder's embedding
    parts = {"encoder": encoder(model, flops) / K, "decoder": decoder(model, flops) / K}
    kept = (encoder(model, width) + decoder(model, width)) / K
    return Cost(parameters, tripled(parts), parts, sum(parameters.values()), kept)


def ar_cost(config, block_size: int) -> Cost:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parameters = {
        "token embedding": count(model.model.embed_tokens),
        "backbone": count(model.model.layers) + count(model.model.norm),
        "output matrix": 0 if config.tie_word_embeddings else count(model.lm_head),
    }
    layers = linear(model.model.layers, flops) + attention_flops(config, block_size)
    parts = {"backbone": layers, "output matrix": flops(model.lm_head)}
    return Cost(parameters, tripled(parts), parts, sum(parameters.values()), linear(model, width))


def tripled(parts: dict[str, float]) -> dict[str, float]:
    """Forward and backward."""
    return {part: 3 * value for part, value in parts.items()}


def recipe_cost(recipe: Recipe, config=None) -> Cost:
    config = config or CONFIGS[recipe.kind](**recipe.model)
    if recipe.kind == "autoencoder":
        return autoencoder_cost(config)
    if recipe.kind == "ar":
        return ar_cost(config, recipe.data.block_size)
    return as_trained(calm_cost(config, recipe.data.block_size), recipe, config)


def as_trained(cost: Cost, recipe: Recipe, config) -> Cost:
    """The cost of a CALM with what the recipe adds (auxiliary loss) and leaves out (head, backbone's gradients)."""
    flops_of = cost.train_flops
    if recipe.auxiliary_weight:
        flops_of["auxiliary loss"] = 3 * auxiliary_flops(config) / config.patch_size
        cost.inference_flops["auxiliary loss"] = 0
    if not recipe.head_weight:
        flops_of["head"] = flops_of["autoencoder"] = 0
    if recipe.freeze_backbone:
        flops_of |= {part: flops_of[part] / 3 for part in ("patch embedding", "backbone")}
    return cost


def auxiliary_flops(config) -> int:
    """One patch through the auxiliary loss, forward."""
    with torch.device("meta"):
        loss = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
    return flops(loss.context_proj) + config.patch_size * (linear(loss.mlp, flops) + flops(loss.lm_head))


def print_cost(recipe: Recipe, config, notes: Iterable[str] = ()) -> None:
    """The dry run's report; the notes stand in front of the figures that they are about."""
    cost, training = recipe_cost(recipe, config), recipe.training
    print("\n".join([f"recipe {recipe.name}", *notes, "", "parameters"]))
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
    weights = (16 * cost.trainable + 4 * (sum(cost.parameters.values()) - cost.trainable)) / 2**30
    micro_batch = training.get("per_device_train_batch_size", 8) * recipe.data.block_size
    activations = (2 if training.get("bf16") else 4) * cost.kept * micro_batch / 2**30
    print(f"\na step of one process: {tokens:,} tokens, {train * tokens:.2e} FLOPs")
    print(f"memory: {weights:.2f} GiB for float32 weights, gradients and Adam,")
    print(f"  about {activations:.2f} GiB for activations of {micro_batch:,} tokens without gradient_checkpointing")
