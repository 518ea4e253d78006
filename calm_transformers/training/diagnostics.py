"""Metrics for the training log from one batch; they have their own generator, so that logging changes no training.

Axes: B batch, L tokens, P patches (L = P·K), K tokens per patch, D hidden size, Z latent size, N candidate samples.
"""

import torch
from torch import Tensor, nn

from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import ACTIVE_NATS, CALMAutoencoder

MAX_PATCHES = 256  # enough for a trend, and cheap beside a training step


def diagnose(model: nn.Module, input_ids: Tensor, hidden: Tensor | None, seed: int) -> dict[str, float]:
    """Returns the metrics of an autoencoder or, given `hidden` (B, P, D), of a CALM; {} for other models."""
    if isinstance(model, CALMAutoencoder):
        return diagnose_autoencoder(model, input_ids)
    if isinstance(model, CALMForCausalLM):
        assert hidden is not None, "a CALM's forward gives its hidden states"
        return diagnose_calm(model, input_ids, hidden, seed)
    return {}


@torch.no_grad()
def diagnose_autoencoder(autoencoder: CALMAutoencoder, input_ids: Tensor) -> dict[str, float]:
    """Measures posterior and reconstruction of uncorrupted ids (B, L).

    Returns:
        kl: nats per patch, not clipped; posterior_sigma: mean standard deviation; active_dimensions: number of them in
        Z (see `ACTIVE_NATS`); reconstruction_accuracy: fraction of tokens decoded correctly from the posterior's mean.
    """
    ids_PK = input_ids.reshape(-1, autoencoder.config.patch_size)[:MAX_PATCHES]
    mean_PZ, log_std_PZ = (t[0].float() for t in autoencoder.encoder(ids_PK.reshape(1, -1)))
    kl_PZ = 0.5 * (mean_PZ.square() + (2 * log_std_PZ).exp() - 1 - 2 * log_std_PZ)
    decoded_PK = autoencoder.decoder(mean_PZ.to(autoencoder.dtype)).argmax(-1)
    return {
        "kl": kl_PZ.sum(-1).mean().item(),
        "posterior_sigma": log_std_PZ.exp().mean().item(),
        "active_dimensions": (kl_PZ.mean(0) > ACTIVE_NATS).sum().item(),
        "reconstruction_accuracy": (decoded_PK == ids_PK).float().mean().item(),
    }


@torch.no_grad()
def diagnose_calm(model: CALMForCausalLM, input_ids: Tensor, hidden_BPD: Tensor, seed: int) -> dict[str, float]:
    """Compares two samples of the next patch at up to `MAX_PATCHES` positions with its target.

    Returns:
        distance_to_target, distance_between_samples: mean Euclidean distances in the latent space, the two terms of
        the energy score at β = 1 (a head that has learnt the distribution has them equal), if the head samples latent
        vectors; brier_1: unbiased Brier score of the patch's first token, in [-1, 1], higher is better.
    """
    ids_BPK = input_ids.unflatten(1, (-1, model.config.patch_size))
    context = hidden_BPD[:, :-1].flatten(0, 1)[:MAX_PATCHES]
    target_PK = ids_BPK[:, 1:].flatten(0, 1)[:MAX_PATCHES]
    generator = torch.Generator(context.device).manual_seed(seed)
    samples_NPZ = model.head.sample(context.to(model.dtype), num_samples=2, generator=generator)
    first_NP = model.head.decode(samples_NPZ, model.autoencoder)[..., 0]
    hits = (first_NP == target_PK[:, 0]).float().sum(0)
    scores = {"brier_1": (hits - (first_NP[0] == first_NP[1]).float()).mean().item()}
    if model.head.samples_tokens:
        return scores
    mean_PZ, log_std_PZ = (t[0] for t in model.autoencoder.encoder(target_PK.reshape(1, -1)))
    noise = torch.randn(mean_PZ.shape, generator=generator, device=mean_PZ.device, dtype=mean_PZ.dtype)
    target_PZ = mean_PZ + log_std_PZ.exp() * noise
    return scores | {
        "distance_to_target": (samples_NPZ - target_PZ).float().norm(dim=-1).mean().item(),
        "distance_between_samples": (samples_NPZ[0] - samples_NPZ[1]).float().norm(dim=-1).mean().item(),
    }
