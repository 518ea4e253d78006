"""Training scores of CALM as pure functions: the energy score and the clipped KL divergence.

Axes: B batch, P patches, N head samples, S posterior samples, Z latent size. "..." stands for any leading axes.
"""

import torch
from torch import Tensor

# Patches handled at once: bounds the (chunk, N, S) distances, so memory doesn't grow with the batch.
PATCHES_PER_CHUNK = 256


class _EnergyScore(torch.autograd.Function):
    """Score and its gradient in one pass, from Gram matrices instead of difference tensors."""

    @staticmethod
    def forward(ctx, samples_PNZ: Tensor, targets_SPZ: Tensor, beta: float) -> Tensor:
        scores, grads = [], []
        for samples, targets in zip(
            samples_PNZ.split(PATCHES_PER_CHUNK), targets_SPZ.split(PATCHES_PER_CHUNK, dim=1), strict=True
        ):
            # Centring on the posterior keeps the products small, so that subtracting them loses no digits.
            centre = targets.mean(dim=0).unsqueeze(1)
            samples, targets = samples - centre, targets.transpose(0, 1) - centre
            attraction, grad_attraction = _mean_distance_to_targets(samples, targets, beta)
            repulsion, grad_repulsion = _mean_distance_between_samples(samples, beta)
            scores.append(repulsion - 2 * attraction)
            grads.append(grad_repulsion - 2 * grad_attraction)
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(scores)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_score_P: Tensor):
        (grad_PNZ,) = ctx.saved_tensors
        return grad_score_P[:, None, None] * grad_PNZ, None, None


def _mean_distance_to_targets(samples_PNZ: Tensor, targets_PSZ: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Mean over (n, s) of ‖x_n − y_s‖^β, shape (P,), and its gradient in x, shape (P, N, Z)."""
    norms = samples_PNZ.square().sum(-1).unsqueeze(2) + targets_PSZ.square().sum(-1).unsqueeze(1)
    squared = torch.baddbmm(norms, samples_PNZ, targets_PSZ.transpose(1, 2), alpha=-2)
    # Below the rounding error of the subtraction a pair counts as coinciding: distance and gradient are zero.
    squared = squared.where(squared > 4 * torch.finfo(squared.dtype).eps * norms, 0)
    pairs = squared.shape[1] * squared.shape[2]
    value, slope = _power_and_slope(squared, beta)
    slope = slope / pairs
    grad = slope.sum(-1, keepdim=True) * samples_PNZ - torch.bmm(slope, targets_PSZ)
    return value.sum((1, 2)) / pairs, grad


def _mean_distance_between_samples(samples_PNZ: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Mean over n ≠ m of ‖x_n − x_m‖^β, shape (P,), and its gradient in x, shape (P, N, Z).

    Sample n is compared with sample n + shift, all n at once: exact differences, and only (P, N, Z) in memory.
    """
    num_samples = samples_PNZ.shape[1]
    pairs = num_samples * (num_samples - 1)
    value = samples_PNZ.new_zeros(samples_PNZ.shape[0])
    grad = torch.zeros_like(samples_PNZ)
    for shift in range(1, num_samples // 2 + 1):
        difference = samples_PNZ - samples_PNZ.roll(-shift, dims=1)
        power, slope = _power_and_slope(difference.square().sum(-1), beta)
        # Each unordered pair stands for two ordered ones, but for shift = N/2 both are already in the roll.
        weight = (1 if 2 * shift == num_samples else 2) / pairs
        value += weight * power.sum(1)
        pull = difference.mul_(weight * slope.unsqueeze(-1))
        grad += pull
        grad -= pull.roll(shift, dims=1)
    return value, grad


def _power_and_slope(squared: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """d^β and the factor β·d^(β−2) that turns x − y into the gradient of d^β; both 0 where d = 0."""
    power = squared.sqrt() if beta == 1 else squared.pow(beta / 2)
    return power, (beta * power / squared).where(squared > 0, 0)


def energy_score(samples: Tensor, targets: Tensor, beta: float = 1.0) -> Tensor:
    """Energy score of the head's samples against draws from the posterior (paper 3.3). Higher is better; the head
    negates it.

        score = mean_{n≠m} ‖x_n − x_m‖^β − 2 · mean_{n,s} ‖x_n − y_s‖^β

    Differentiable (once) in `samples` only; finite, with zero gradient from a pair, where a pair coincides. Computed
    in float32, or float64 if the samples are.

    Args:
        samples (`(N, ..., Z)`): N ≥ 2 head samples per patch.
        targets (`(S, ..., Z)`): S ≥ 1 posterior draws per patch, without gradient.
        beta: exponent, 0 < β < 2 (strictly proper only there).

    Returns:
        `(...)`: the score of each patch.

    Raises:
        ValueError: fewer than 2 samples, β outside (0, 2), or shapes that don't match.
    """
    if samples.shape[0] < 2:
        raise ValueError(f"energy_score got {samples.shape[0]} sample(s): the pairwise term needs at least 2.")
    if not 0 < beta < 2:
        raise ValueError(f"energy_score got beta={beta}: it must lie in (0, 2), where the score is strictly proper.")
    if samples.shape[1:] != targets.shape[1:]:
        raise ValueError(
            f"samples {tuple(samples.shape)} and targets {tuple(targets.shape)} must agree in all but the first axis."
        )
    if targets.requires_grad:
        raise ValueError("energy_score has no gradient in its targets: detach them, the autoencoder is frozen.")
    *patch_shape, latent_size = samples.shape[1:]
    dtype = torch.promote_types(samples.dtype, torch.float32)
    with torch.autocast(samples.device.type, enabled=False):
        samples_PNZ = samples.reshape(samples.shape[0], -1, latent_size).transpose(0, 1).to(dtype)
        targets_SPZ = targets.reshape(targets.shape[0], -1, latent_size).to(dtype)
        return _EnergyScore.apply(samples_PNZ, targets_SPZ, float(beta)).reshape(patch_shape)


def clipped_kl(mean: Tensor, log_std: Tensor, clamp: float) -> Tensor:
    """KL divergence of N(mean, std²) from N(0, 1), summed over the latent axis, each dimension at least `clamp`.

    A dimension at the floor has no gradient: it is not pushed further towards the prior (KL clipping, paper 2.2).

    Args:
        mean, log_std (`(..., Z)`): posterior parameters; log_std is the natural logarithm of the standard deviation.
        clamp: floor in nats per latent dimension.

    Returns:
        `(...)`: nats per patch.
    """
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)
    return kl.clamp(min=clamp).sum(-1)
