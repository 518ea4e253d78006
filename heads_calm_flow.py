"""The flow-matching head, and the net that it shares with the diffusion head (paper 3.2; published code).

Axes: N samples per patch, T solver steps, D hidden size, Z latent size. "..." stands for any leading axes, as (B, P).
Samples come first: (N, ..., Z).
"""

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from .configuration_calm import CALMConfig
from .heads_calm import LAYER_NORM_EPS, GenerativeHead, PatchTarget, standard_normal, zero_linear
from .kernels_calm import cached_per_device

TIME_FEATURES = 256  # width of the sinusoidal embedding of time; published code
FLOW_STEPS = 10  # midpoint steps; published code
MODULATION_CHUNK_SIZE = 1024  # of a solver's times and contexts; at D = 1024 with 4 blocks, in float32, 80 MB


class ModulatedBlock(nn.Module):
    """Residual MLP whose input is shifted and scaled, and whose output is gated, by the condition (AdaLN)."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.modulation = zero_linear(size, 3 * size)

    def forward(self, hidden: Tensor, shift: Tensor, factor: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(hidden, gate, self.mlp(torch.addcmul(shift, self.norm(hidden), factor)))

    def condition(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, factor and gate of `forward` from the condition (..., D)."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return shift, 1 + scale, gate


Modulation = list[tuple[Tensor, ...]]  # what a net's blocks and its output know of time and context


class ModulatedMLP(nn.Module):
    """The net of the flow and the diffusion head: (x (..., Z), time, context (..., D)) → (..., out_size).

    Time and context act through each layer's modulation, which knows nothing of x: a solver has those of all its times
    made at once, before its first step, and reads the weights for it once.
    """

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
        return self.given(self.conditions(time, context), x)

    def conditions(self, time: Tensor, context: Tensor) -> Modulation:
        """Of `given`, for integer steps and contexts (..., D) whose axes broadcast."""
        # In rows, for a solver's time is one number, and quantised layers take no single vectors.
        features = self._time_features(time.flatten(), context.dtype)
        embedded = self.time_embed(features).view(*time.shape, context.shape[-1])
        condition = self.act(embedded + self.context_embed(context))
        shift, scale = self.out_modulation(condition).chunk(2, dim=-1)
        blocks = cast(Iterable[ModulatedBlock], self.blocks)
        return [*(block.condition(condition) for block in blocks), (shift, 1 + scale)]

    def precompute_modulation(self, times_T: Tensor, context: Tensor) -> Iterator[Modulation]:
        """Those of one time after the other, for contexts (..., D)."""
        num_contexts = max(1, context[..., 0].numel())
        for chunk in times_T.split(max(1, MODULATION_CHUNK_SIZE // num_contexts)):
            of_chunk = self.conditions(chunk.view(-1, *[1] * (context.dim() - 1)), context)
            for index in range(len(chunk)):
                yield [tuple(values[index] for values in layer) for layer in of_chunk]

    def given(self, conditions: Modulation, x: Tensor) -> Tensor:
        """x (..., Z) → (..., out_size)."""
        hidden = self.input_proj(x)
        *of_blocks, (shift, factor) = conditions
        for block, of_block in zip(self.blocks, of_blocks, strict=True):
            hidden = block(hidden, *of_block)
        return self.out_proj(torch.addcmul(shift, self.out_norm(hidden), factor))

    @staticmethod
    def _time_features(times: Tensor, dtype: torch.dtype) -> Tensor:
        angles = times.float().unsqueeze(-1) * _time_frequencies(times.device)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


@cached_per_device
def _time_frequencies(device: torch.device) -> Tensor:
    half = TIME_FEATURES // 2
    return torch.exp(-math.log(10000) / half * torch.arange(half, device=device, dtype=torch.float32))


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
        return self.net(x.to(context.dtype), (time * 1000).long(), context).to(x.dtype)

    def draw(self, context: Tensor, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        x = begin = noise.float()  # the state stays in float32: steps would be lost in bfloat16
        times = solver_times(self.num_steps, context.device)
        for index, conditions in enumerate(self.net.precompute_modulation(times, context)):
            velocity = self.net.given(conditions, x.to(context.dtype)).to(x.dtype)
            # From where a step begins, half of it on by an even velocity, the whole by the odd one after it.
            x = begin + velocity / (self.num_steps if index % 2 else 2 * self.num_steps)
            begin = x if index % 2 else begin
        return x.to(context.dtype)

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
        end = target.sample_latents(self.num_samples, generator, posterior_noise).to(context.dtype)
        if time is None:
            time = self._draw_times(end, generator)
        start = standard_normal(end.shape, end, generator) if noise is None else noise
        x = torch.lerp(start, end, time.unsqueeze(-1).to(end.dtype))
        error = self.velocity(x, time, context) - (end - start)
        return error.float().square().mean(-1).mean(0)

    def _draw_times(self, end: Tensor, generator: torch.Generator | None) -> Tensor:
        times = torch.empty(end.shape[:-1], device=end.device)
        if self.time_logit_mean is None:
            return times.uniform_(generator=generator)
        return torch.sigmoid(times.normal_(self.time_logit_mean, generator=generator))


@cached_per_device
def solver_times(num_steps: int, device: torch.device) -> Tensor:
    """⌊1000·t⌋ at the start and the middle of each step, (2·T,), in integers: no rounding can lower them."""
    index_T = torch.arange(num_steps, device=device)
    return (torch.stack([1000 * index_T, 500 * (2 * index_T + 1)], dim=-1) // num_steps).flatten()
