"""The energy head: one pass of a small network turns noise into a sample of the next latent vector (paper 3.2, 3.3).

Axes: N samples per patch, S posterior samples, D hidden size, P patches, Z latent size. "..." stands for any leading
axes, as (B, P). Samples come first: (N, ..., Z).
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .configuration_calm import CALMConfig, require
from .heads_calm import LAYER_NORM_EPS, GenerativeHead, PatchTarget, zero_linear

TARGETS_CHUNK_SIZE = 2048  # patches whose posterior samples are held at once: 100 MB at S = 100, Z = 128
PATCHES_CHUNK_SIZE = {"cpu": 64, "other": 2048}  # patches scored at once; on a CPU they should stay in the cache


class EnergyBlock(nn.Module):
    """Residual gated MLP. The published first layer takes concat(LayerNorm(e), c); here c's half runs once."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.sample_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.context_proj = nn.Linear(hidden_size, hidden_size)
        self.hidden_proj = nn.Linear(hidden_size, hidden_size)
        self.gate_up_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.down_proj = nn.Linear(hidden_size, hidden_size)
        self.act = nn.SiLU()

    def forward(self, samples: Tensor, context: Tensor) -> Tensor:
        # Flattened here, since a linear layer without bias would flatten and unflatten by itself at more cost.
        projected = self.sample_proj(self.norm(samples).flatten(0, -2)).view(samples.shape)
        hidden = self.act(projected + self.context_proj(context))
        gate, up = self.gate_up_proj(self.act(self.hidden_proj(hidden))).chunk(2, dim=-1)
        return samples + self.down_proj(self.act(gate) * up)


class EnergyHead(GenerativeHead, head_type="energy"):
    """One-step generator trained with the energy score (paper 3.2 and 3.3)."""

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        size = config.hidden_size
        self.noise_size, self.beta = config.noise_size, config.beta
        self.num_posterior_samples = config.num_posterior_samples
        self.noise_embed = nn.Linear(config.noise_size, size)
        self.context_embed = nn.Linear(size, size)
        self.norm_noise = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.norm_context = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(EnergyBlock(size) for _ in range(config.num_mlp_layers))
        self.norm_out = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.out_hidden = nn.Linear(size, size)
        self.out_proj = zero_linear(size, config.latent_size)
        self.act = nn.SiLU()

    @classmethod
    def check(cls, config: CALMConfig) -> None:
        super().check(config)
        n = config.num_samples
        require(n >= 2, f"num_samples={n}: the pairwise term needs at least 2 samples.")

    def initial_noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform(−0.5, 0.5) in each of `noise_size` dimensions (published code)."""
        noise = torch.empty((*shape, self.noise_size), dtype=like.dtype, device=like.device)
        return noise.uniform_(-0.5, 0.5, generator=generator)

    def from_noise(self, noise: Tensor, context: Tensor, generator: torch.Generator | None) -> Tensor:
        samples = self.norm_noise(self.noise_embed(noise))
        context = self.norm_context(self.context_embed(context))
        for block in self.blocks:
            samples = block(samples, context)
        return self.out_proj(self.act(self.out_hidden(self.norm_out(samples))))

    def compute_loss(
        self,
        context: Tensor,
        target: PatchTarget,
        generator: torch.Generator | None,
        noise: Tensor | None = None,
        posterior_noise: Tensor | None = None,
    ) -> Tensor:
        """Returns −energy score; predrawn: uniform noise (N, ..., noise size), normal posterior_noise (S, ..., Z)."""
        samples, S = self._sample(context, self.num_samples, generator, noise), self.num_posterior_samples
        if posterior_noise is not None or context.dim() != 2 or len(context) <= TARGETS_CHUNK_SIZE:
            return -energy_score(samples, target.sample_latents(S, generator, posterior_noise), self.beta)
        parts = [slice(i, i + TARGETS_CHUNK_SIZE) for i in range(0, len(context), TARGETS_CHUNK_SIZE)]
        scores = [energy_score(samples[:, i], target.rows(i).sample_latents(S, generator), self.beta) for i in parts]
        return -torch.cat(scores)


class _EnergyScore(torch.autograd.Function):
    """Score and its gradient in one pass. Only the gradient is kept for backward."""

    @staticmethod
    def forward(ctx, samples_NPZ: Tensor, targets_SPZ: Tensor, beta: float) -> Tensor:
        chunk = PATCHES_CHUNK_SIZE["cpu" if samples_NPZ.device.type == "cpu" else "other"]
        if torch.compiler.is_compiling():  # it would unroll the chunks: minutes, again for another number of patches
            chunk = max(1, samples_NPZ.shape[1])
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
    power, slope = _power_and_gradient_factor(squared, beta)
    grad = torch.baddbmm(slope.sum(-1, keepdim=True) * samples_PNZ, slope, targets_PSZ, alpha=-1)
    pairs = squared.shape[1] * squared.shape[2]
    return power.sum((1, 2)) / pairs, grad / pairs


def _mean_distance_between_samples(samples_PNZ: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """As above, of ‖x_n − x_m‖^β over n ≠ m; by exact differences, as an untrained head's samples nearly coincide."""
    pairs = samples_PNZ.shape[1] * (samples_PNZ.shape[1] - 1)
    difference_PNNZ = samples_PNZ.unsqueeze(2) - samples_PNZ.unsqueeze(1)
    power, slope = _power_and_gradient_factor(_squared_norm(difference_PNNZ), beta)
    return power.sum((1, 2)) / pairs, difference_PNNZ.mul_(slope.unsqueeze(-1)).sum(2) * (2 / pairs)


def _squared_norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).square_()  # one pass, without the squares in memory


def _power_and_gradient_factor(squared: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """d^β and the factor β·d^(β−2) that turns x − y into the gradient of d^β; both 0 where d = 0."""
    factor = squared.pow(beta / 2 - 1).masked_fill_(squared < torch.finfo(squared.dtype).tiny, 0)
    return squared * factor, beta * factor


def energy_score(samples: Tensor, targets: Tensor, beta: float = 1.0) -> Tensor:
    """Returns each patch's energy score (...) of samples x (N, ..., Z), N ≥ 2, and posterior samples y (S, ..., Z).

        score = mean_{n≠m} ‖x_n − x_m‖^β − 2 · mean_{n,s} ‖x_n − y_s‖^β    (paper 3.3)

    Higher is better; the head negates it. Strictly proper for 0 < β < 2. Differentiable (once) in `samples` only;
    finite, with zero gradient from a pair, where a pair coincides. Computed in float32, or float64 if the samples are.

    Raises:
        ValueError: shapes that don't match, or targets with a gradient.
    """
    if samples.shape[1:] != targets.shape[1:]:
        shapes = f"samples {tuple(samples.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes} must agree in all but the first axis.")
    if targets.requires_grad:
        raise ValueError("energy_score has no gradient in its targets: detach them, the autoencoder is frozen.")
    kind = samples.device.type  # "meta" knows no autocast
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        samples_NPZ, targets_SPZ = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in (samples, targets))
        samples_NPZ = samples_NPZ.to(torch.promote_types(samples.dtype, torch.float32))
        return _EnergyScore.apply(samples_NPZ, targets_SPZ, float(beta)).reshape(samples.shape[1:-1])
