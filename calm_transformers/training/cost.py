"""What a recipe costs, before anything is run: parameters by part, FLOPs, memory. Nothing is allocated.

Models are made on the meta device, where tensors have shapes and no values. Head, autoencoder and auxiliary loss are
run there, and their matrix products counted, whatever they do; a product of n weights takes 2n FLOPs. Of the backbone
every linear layer runs once a position, and attention takes 4·P·D a layer and position (scores and weighted sum over a
full context of P positions, as the paper counts). A backward pass takes twice its forward. Element-wise work and
embedding look-ups are left out.

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
from calm_transformers.training.auxiliary import MultiTokenLoss
from calm_transformers.training.recipe import CONFIGS, Recipe


@dataclass
class Cost:
    """Parameters by part, and FLOPs by token.

    Args:
        parameters: part → number of parameters.
        train_flops, inference_flops: part → FLOPs of one token, forward and backward, or one generated token.
        trainable: number of parameters with gradients.
        kept: numbers that one token leaves for the backward pass, about.
        network_calls: of the head's net, for one draw.
    """

    parameters: dict[str, int]
    train_flops: dict[str, float]
    inference_flops: dict[str, float]
    trainable: int
    kept: float
    network_calls: int | None = None


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Work(NamedTuple):
    """What one call does: FLOPs of its matrix products, and how many numbers it leaves for the backward pass."""

    flops: int
    kept: int


def work_of(call: Callable, *args, **kwargs) -> Work:
    """Counts what a call does; on the meta device it does nothing else."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with FlopCounterMode(display=False) as counter:
            result = call(*args, **kwargs)
    del result  # until here what was kept is alive, and no address is given away twice
    return Work(counter.get_total_flops(), sum(kept.values()))


def once(module: nn.Module) -> Work:
    """Every linear layer in the module applied to one vector; kept are inputs and outputs, within a third."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    flops = sum(2 * layer.weight.numel() for layer in layers)
    return Work(flops, sum(layer.in_features + layer.out_features for layer in layers))


def attention_flops(config, num_positions: int) -> int:
    """All layers' scores and weighted sums of one position that attends to `num_positions`."""
    size = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return 4 * num_positions * size * config.num_hidden_layers


def calm_cost(config, block_size: int) -> Cost:
    with torch.device("meta"):
        model = CALMForCausalLM(config)
        context, latent = torch.zeros(1, config.hidden_size), torch.zeros(1, config.latent_size)
        tokens = torch.zeros(1, config.patch_size, dtype=torch.long)
    K, head, backbone, autoencoder = config.patch_size, model.head, model.model, model.autoencoder
    embedding, layers = once(backbone.embed_proj), once(backbone.layers)
    layer_flops = layers.flops + attention_flops(config, block_size // K)
    scoring = work_of(head.loss, context, PatchTarget(tokens, posterior=(latent, latent)))
    # The head's loss may ask the autoencoder for the posterior.
    encoding_flops = work_of(head.loss, context, PatchTarget(tokens, autoencoder)).flops - scoring.flops
    with torch.no_grad():
        drawing = work_of(head.sample, context, num_samples=1)
    parameters = {
        "token embedding": count(backbone.embed_tokens),
        "patch embedding": count(backbone.embed_proj),
        "backbone": count(backbone.layers) + count(backbone.norm),
        "head": count(head) - sum(p.numel() for p in head.parameters() if not p.requires_grad),
    }
    return Cost(
        parameters | {"autoencoder (frozen)": count(autoencoder)},
        {
            "patch embedding": 3 * embedding.flops / K,
            "backbone": 3 * layer_flops / K,
            "head": 3 * scoring.flops / K,
            "autoencoder": encoding_flops / K,
        },
        {
            "patch embedding": embedding.flops / K,
            "backbone": layer_flops / K,
            "head": drawing.flops / K,
            "autoencoder": work_of(autoencoder.decode, latent).flops / K,
        },
        sum(parameters.values()),
        (embedding.kept + layers.kept + scoring.kept) / K,
        head.network_calls,
    )


def autoencoder_cost(config: CALMAutoencoderConfig) -> Cost:
    with torch.device("meta"):
        model = CALMAutoencoder(config)
        patch, latent = torch.zeros(1, config.patch_size, dtype=torch.long), torch.zeros(1, config.latent_size)
    K, parameters = config.patch_size, {"encoder": count(model.encoder)}
    parameters["decoder"] = count(model) - parameters["encoder"]  # the output matrix is the encoder's embedding
    work = {"encoder": work_of(model.encode, patch), "decoder": work_of(model.decode, latent)}
    parts = {part: done.flops / K for part, done in work.items()}
    kept = work_of(model, patch, labels=patch).kept / K
    return Cost(parameters, {part: 3 * value for part, value in parts.items()}, parts, sum(parameters.values()), kept)


def ar_cost(config, block_size: int) -> Cost:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parameters = {
        "token embedding": count(model.model.embed_tokens),
        "backbone": count(model.model.layers) + count(model.model.norm),
        "output matrix": 0 if config.tie_word_embeddings else count(model.lm_head),
    }
    layers, output = once(model.model.layers), once(model.lm_head)
    backbone_flops = layers.flops + attention_flops(config, block_size)
    parts: dict[str, float] = {"backbone": backbone_flops, "output matrix": output.flops}
    train_flops = {part: 3 * value for part, value in parts.items()}
    return Cost(parameters, train_flops, parts, sum(parameters.values()), layers.kept + output.kept)


def recipe_cost(recipe: Recipe, config=None, teacher=None) -> Cost:
    """With what the recipe adds to a CALM (auxiliary loss, teacher) and leaves out (head, gradients)."""
    config = config or CONFIGS[recipe.kind](**recipe.model)
    if recipe.kind == "autoencoder":
        return autoencoder_cost(config)
    if recipe.kind == "ar":
        return ar_cost(config, recipe.data.block_size)
    cost = calm_cost(config, recipe.data.block_size)
    flops_of = cost.train_flops
    if recipe.auxiliary_weight:
        with torch.device("meta"):
            loss = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
            hidden = torch.zeros(1, 2, config.hidden_size)
            labels = torch.zeros(1, 2 * config.patch_size, dtype=torch.long)
        scored, drawn = work_of(loss, hidden, labels), work_of(loss.draw, hidden[:, 0], num_draws=1)
        flops_of["auxiliary loss"] = (3 * scored.flops + recipe.auxiliary_targets * drawn.flops) / config.patch_size
        cost.inference_flops["auxiliary loss"] = 0
        flops_of["autoencoder"] *= 1 + recipe.auxiliary_targets
    if teacher is not None:
        of_teacher = ar_cost(teacher, recipe.data.block_size)
        cost.parameters["teacher (frozen)"] = sum(of_teacher.parameters.values())
        flops_of["teacher"], cost.inference_flops["teacher"] = sum(of_teacher.inference_flops.values()), 0
    if not recipe.head_weight:
        flops_of["head"] = flops_of["autoencoder"] = 0
    if recipe.freeze_backbone:
        flops_of |= {part: flops_of[part] / 3 for part in ("patch embedding", "backbone")}
    return cost


def print_cost(recipe: Recipe, config, notes: Iterable[str] = (), teacher=None) -> None:
    """The dry run's report; the notes stand in front of the figures that they are about."""
    cost, training = recipe_cost(recipe, config, teacher), recipe.training
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
    if cost.network_calls is not None:
        print(f"  a draw of the head: {cost.network_calls} network call{'s' if cost.network_calls > 1 else ''}")

    micro_batch = training.get("per_device_train_batch_size", 8) * recipe.data.block_size
    tokens = micro_batch * training.get("gradient_accumulation_steps", 1)
    weights = (16 * cost.trainable + 4 * (sum(cost.parameters.values()) - cost.trainable)) / 2**30
    activations = (2 if training.get("bf16") else 4) * cost.kept * micro_batch / 2**30
    print(f"\na step of one process: {tokens:,} tokens, {train * tokens:.2e} FLOPs")
    print(f"memory: {weights:.2f} GiB for float32 weights, gradients and Adam,")
    print(f"  about {activations:.2f} GiB for activations of {micro_batch:,} tokens without gradient_checkpointing")
