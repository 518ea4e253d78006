"""The flow-matching head, and the net that it shares with the diffusion head (paper 3.2; published code).

Axes: N samples per patch, T solver steps, D hidden size, Z latent size. "..." stands for any leading axes, as (B, P).
Samples come first: (N, ..., Z).
"""

import math

import torch
from torch import Tensor, nn

from .configuration_calm import CALMConfig
from .heads_calm import LAYER_NORM_EPS, GenerativeHead, PatchTarget, standard_normal, zero_linear

TIME_FEATURES = 256  # width of the sinusoidal embedding of time; published code
FLOW_STEPS = 10  # midpoint steps; published code


class ModulatedBlock(nn.Module):
    """Residual MLP whose input is shifted and scaled, and whose output is gated, by the condition (AdaLN)."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.modulation = zero_linear(size, 3 * size)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return hidden + gate * self.mlp(self.norm(hidden) * (1 + scale) + shift)


class ModulatedMLP(nn.Module):
    """The net of the flow and the diffusion head: (x (..., Z), time, context (..., D)) → (..., out_size)."""

    def __init__(self, config: CALMConfig, out_size: int):
        super().__init__()
        size = config.hidden_size
        self.time_embed = nn.Sequential(nn.Linear(TIME_FEATURES, size), nn.SiLU(), nn.Linear(size, size))
        self.context_embed = nn.Linear(size, size)
        self.input_proj = nn.Linear(config.latent_size, size)
        self.blocks = nn.ModuleList(ModulatedBlock(size) for _ in range(config.num_mlp_layers))
        self.out_norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.out_modulation = zero_linear(size, 2 * size)
        self.out_proj = zero_linear(size, out_size)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """time: integer steps, broadcastable to x's leading axes."""
        # In rows, for a solver's time is one number, and quantised layers take no single vectors.
        features = self._time_features(time, x.dtype).view(-1, TIME_FEATURES)
        hidden = self.input_proj(x)
        embedded = self.time_embed(features).view(*time.shape, hidden.shape[-1])
        condition = self.act(embedded + self.context_embed(context))
        for block in self.blocks:
            hidden = block(hidden, condition)
        shift, scale = self.out_modulation(condition).chunk(2, dim=-1)
        return self.out_proj(self.out_norm(hidden) * (1 + scale) + shift)

    @staticmethod
    def _time_features(time: Tensor, dtype: torch.dtype) -> Tensor:
        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=time.device, dtype=torch.float32))
        angles = time.float().unsqueeze(-1) * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class FlowMatchingHead(GenerativeHead, head_type="flow"):
    """Straight-line flow from N(0, 1) to the latent, solved by the midpoint rule (paper 3.2; published code)."""

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.num_steps = config.sampling_steps or FLOW_STEPS
        self.time_logit_mean = config.flow_time_logit_mean
        self.net = ModulatedMLP(config, config.latent_size)

    @property
    def network_calls(self) -> int:
        return 2 * self.num_steps  # the midpoint rule evaluates the net twice a step

    def velocity(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """v(x, t, c) in x's dtype for t in [0, 1]; the net sees ⌊1000·t⌋, as the published one does."""
        return self._velocity(x, (time * 1000).long(), context)

    def _velocity(self, x: Tensor, thousandths: Tensor, context: Tensor) -> Tensor:
        return self.net(x.to(context.dtype), thousandths, context).to(x.dtype)

    def _thousandths(self, device: torch.device) -> Tensor:
        """⌊1000·t⌋ at the start and the middle of each step, (T, 2), in integers: no rounding can lower them."""
        steps = self.num_steps
        return torch.tensor([(1000 * i // steps, 500 * (2 * i + 1) // steps) for i in range(steps)], device=device)

    def draw(self, context: Tensor, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        x = noise.float()  # the state stays in float32: steps would be lost in bfloat16
        for start, middle in self._thousandths(context.device):
            x = self._step(x, start, middle, context)
        return x.to(context.dtype)

    def _step(self, x: Tensor, start: Tensor, middle: Tensor, context: Tensor) -> Tensor:
        """(..., Z) a step on."""
        return x + self._velocity(self._halfway(x, start, context), middle, context) / self.num_steps

    def _halfway(self, x: Tensor, start: Tensor, context: Tensor) -> Tensor:
        """(..., Z) half a step on."""
        return x + self._velocity(x, start, context) / (2 * self.num_steps)

    def compute_loss(
        self,
        context: Tensor,
        target: PatchTarget,
        generator: torch.Generator | None,
        posterior_noise: Tensor | None = None,
        time: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """mean (v − (x1 − x0))².

        Draws: posterior_noise, noise (N, ..., Z) standard normal; time (N, ...) in [0, 1).
        """
        end = target.draw_latents(self.num_samples, generator, posterior_noise).to(context.dtype)
        x, time, start = self._on_the_way(end, generator, time, noise)
        error = self.velocity(x, time, context) - (end - start)
        return error.float().square().mean(-1).mean(0)

    def _on_the_way(
        self, end: Tensor, generator: torch.Generator | None, time: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A point of each path (N, ..., Z) from noise to its end, its time (N, ...), and the noise (N, ..., Z)."""
        if time is None:
            time = self._draw_times(end, generator)
        start = standard_normal(end.shape, end, generator) if noise is None else noise
        return torch.lerp(start, end, time.unsqueeze(-1).to(end.dtype)), time, start

    def _draw_times(self, end: Tensor, generator: torch.Generator | None) -> Tensor:
        times = torch.empty(end.shape[:-1], device=end.device)
        if self.time_logit_mean is None:
            return times.uniform_(generator=generator)
        return torch.sigmoid(times.normal_(self.time_logit_mean, generator=generator))
