"""Training scores of CALM as pure functions: the energy score and the clipped KL divergence.

Axes: B batch, P patches, N head samples, S posterior samples, Z latent size. "..." stands for any leading axes.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

# Patches handled at once: bounds the targets' copy and the (chunk, N, S) distances, so that memory doesn't grow with
# the batch. On a CPU they should stay in the cache; a GPU needs larger chunks to be busy.
PATCHES_PER_CHUNK = {"cpu": 64, "other": 2048}


class _EnergyScore(torch.autograd.Function):
    """Score and its gradient in one pass. Only the gradient is kept for backward."""

    @staticmethod
    def forward(ctx, samples_NPZ: Tensor, targets_SPZ: Tensor, beta: float) -> Tensor:
        chunk = PATCHES_PER_CHUNK["cpu" if samples_NPZ.device.type == "cpu" else "other"]
        scores, grads = [], []
        for samples, targets in zip(samples_NPZ.split(chunk, dim=1), targets_SPZ.split(chunk, dim=1), strict=True):
            samples_PNZ = samples.transpose(0, 1).contiguous()
            repulsion, grad_repulsion = _mean_distance_between_samples(samples_PNZ, beta)
            attraction, grad_attraction = _mean_distance_to_targets(samples_PNZ, targets, beta)
            scores.append(repulsion - 2 * attraction)
            grads.append((grad_repulsion - 2 * grad_attraction).transpose(0, 1))
        ctx.save_for_backward(torch.cat(grads, dim=1))
        return torch.cat(scores)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_score_P: Tensor):
        (grad_NPZ,) = ctx.saved_tensors
        return grad_score_P[:, None] * grad_NPZ, None, None


def _mean_distance_to_targets(samples_PNZ: Tensor, targets_SPZ: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Mean over (n, s) of ‖x_n − y_s‖^β, shape (P,), and its gradient in x, shape (P, N, Z); by matrix products."""
    targets_PSZ = targets_SPZ.transpose(0, 1).to(samples_PNZ.dtype, copy=True, memory_format=torch.contiguous_format)
    # Centring on the posterior keeps the products small, so that subtracting them loses no digits.
    centre = targets_PSZ.mean(1, keepdim=True)
    samples_PNZ, targets_PSZ = samples_PNZ - centre, targets_PSZ.sub_(centre)
    norms = _squared_norm(samples_PNZ).unsqueeze(2) + _squared_norm(targets_PSZ).unsqueeze(1)
    squared = torch.baddbmm(norms, samples_PNZ, targets_PSZ.transpose(1, 2), alpha=-2)
    # Below the rounding error of the subtraction a pair counts as coinciding: distance and gradient are zero.
    squared.masked_fill_(squared <= norms.mul_(4 * torch.finfo(norms.dtype).eps), 0)
    power, slope = _power_and_slope(squared, beta)
    grad = torch.baddbmm(slope.sum(-1, keepdim=True) * samples_PNZ, slope, targets_PSZ, alpha=-1)
    pairs = squared.shape[1] * squared.shape[2]
    return power.sum((1, 2)) / pairs, grad / pairs


def _mean_distance_between_samples(samples_PNZ: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Mean over n ≠ m of ‖x_n − x_m‖^β, shape (P,), and its gradient in x, shape (P, N, Z).

    From exact differences, since the samples of an untrained head nearly coincide.
    """
    num_samples = samples_PNZ.shape[1]
    pairs = num_samples * (num_samples - 1)
    difference_PNNZ = samples_PNZ.unsqueeze(2) - samples_PNZ.unsqueeze(1)
    power, slope = _power_and_slope(_squared_norm(difference_PNNZ), beta)
    grad = difference_PNNZ.mul_(slope.unsqueeze(-1)).sum(2)
    return power.sum((1, 2)) / pairs, grad * (2 / pairs)


def _squared_norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).square_()  # one pass, without the squares in memory


def _power_and_slope(squared: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """d^β and the factor β·d^(β−2) that turns x − y into the gradient of d^β; both 0 where d = 0."""
    factor = squared.pow(beta / 2 - 1).masked_fill_(squared < torch.finfo(squared.dtype).tiny, 0)
    return squared * factor, beta * factor


@torch.compiler.disable()  # it would unroll the chunks: minutes of compilation, again for another number of patches
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
        ValueError: fewer than 2 samples, β outside (0, 2), shapes that don't match, or targets that require
            a gradient.
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
    kind = samples.device.type  # "meta" knows no autocast
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        samples_NPZ = samples.reshape(samples.shape[0], -1, latent_size).to(dtype)
        targets_SPZ = targets.reshape(targets.shape[0], -1, latent_size)
        return _EnergyScore.apply(samples_NPZ, targets_SPZ, float(beta)).reshape(patch_shape)


def clipped_kl(mean: Tensor, log_std: Tensor, clamp: float) -> Tensor:
    """KL divergence of N(mean, std²) from N(0, 1), summed over the latent axis, each dimension at least `clamp`.

    A dimension at the floor has no gradient: it is not pushed further towards the prior (KL clipping, paper 2.2).

    Args:
        mean (`(..., Z)`): of the posterior.
        log_std (`(..., Z)`): natural logarithm of its standard deviation.
        clamp: floor in nats per latent dimension.

    Returns:
        `(...)`: nats per patch.
    """
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)
    return kl.clamp(min=clamp).sum(-1)
