"""The energy head: one pass of a small network turns noise into a sample of the next latent vector (paper 3.2, 3.3).

Axes: N samples per patch, S posterior samples, D hidden size, Z latent size. "..." stands for any leading axes, as
(B, P). Samples come first: (N, ..., Z).
"""

import torch
from torch import Tensor, nn

from .configuration_calm import CALMConfig, require
from .heads_calm import LAYER_NORM_EPS, GenerativeHead, PatchTarget, zero_linear
from .scores_calm import energy_score


class EnergyBlock(nn.Module):
    """Residual gated MLP on the noise path, conditioned on the context.

    The published first layer acts on concat(LayerNorm(e), c). Its two halves are two modules here, so that the
    context's half is computed once for all N samples.
    """

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
        # In rows: a linear layer without bias then needs no second view.
        projected = self.sample_proj(self.norm(samples).flatten(0, -2)).view(samples.shape)
        hidden = self.act(projected + self.context_proj(context))
        gate, up = self.gate_up_proj(self.act(self.hidden_proj(hidden))).chunk(2, dim=-1)
        return samples + self.down_proj(self.act(gate) * up)


class EnergyHead(GenerativeHead, head_type="energy"):
    """One-step generator trained with the energy score (paper 3.2 and 3.3)."""

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        size = config.hidden_size
        self.noise_size = config.noise_size
        self.num_posterior_samples = config.num_posterior_samples
        self.beta = config.beta
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
        require(
            config.num_samples >= 2, f"num_samples={config.num_samples}: the pairwise term needs at least 2 samples."
        )

    def initial_noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform(−0.5, 0.5) in each of `noise_size` dimensions (published code)."""
        noise = torch.empty((*shape, self.noise_size), dtype=like.dtype, device=like.device)
        return noise.uniform_(-0.5, 0.5, generator=generator)

    def draw(self, context: Tensor, noise: Tensor, generator: torch.Generator | None) -> Tensor:
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
        """−energy score; draws: noise (N, ..., noise size) uniform, posterior_noise (S, ..., Z) standard normal."""
        samples = self._sample(context, self.num_samples, generator, noise)
        targets = target.draw_latents(self.num_posterior_samples, generator, posterior_noise)
        return -energy_score(samples, targets, self.beta)
