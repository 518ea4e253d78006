"""The flow-matching and the diffusion head, their net, and the noise schedule (paper 3.2; published code).

Axes: N samples per patch, T solver steps, D hidden size, Z latent size. "..." stands for any leading axes, as (B, P).
Samples come first: (N, ..., Z).
"""

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from .configuration_calm import CALMConfig, require
from .heads_calm import LAYER_NORM_EPS, GenerativeHead, PatchTarget, in_chunks, standard_normal, zero_linear
from .kernels_calm import cached_per_device, float64_device

TIME_FEATURES = 256  # width of the sinusoidal embedding of time; published code
FLOW_STEPS = 10  # midpoint steps; published code
DIFFUSION_TRAIN_STEPS, DIFFUSION_SAMPLING_STEPS = 1000, 100  # published code
FIRST_STEP_BIN = 1 / 255  # half width of the bins of the discretised likelihood at t = 0; published code
MODULATION_CHUNK_SIZE = 1024  # of a solver's times and contexts; at D = 1024 with 4 blocks, in float32, 80 MB


class ModulatedBlock(nn.Module):
    """Residual MLP whose input is shifted and scaled, and whose output is gated, by time and context (AdaLN)."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.modulation = zero_linear(size, 3 * size)

    def forward(self, hidden: Tensor, shift: Tensor, factor: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(hidden, gate, self.mlp(torch.addcmul(shift, self.norm(hidden), factor)))


Modulation = list[tuple[Tensor, ...]]  # shift and factor of the output, then shift, factor and gate of each block


class ModulatedMLP(nn.Module):
    """Maps x (..., Z), time and context (..., D) to (..., out_size): the net of the flow and the diffusion head.

    Time and context act by modulation alone, which a solver computes for many times at once to read weights seldom.
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
        """`time`: integer steps, broadcastable to x's leading axes."""
        return self.forward_modulated(x, self.modulation(time, context))

    def modulation(self, time: Tensor, context: Tensor) -> Modulation:
        """Returns the modulation for integer steps and contexts (..., D) whose axes broadcast."""
        # In rows, for a solver's time is one number, and quantised layers take no single vectors.
        angles = time.flatten().float().unsqueeze(-1) * _time_frequencies(time.device)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(context.dtype)
        embedded = self.time_embed(features).view(*time.shape, context.shape[-1])
        condition = self.act(embedded + self.context_embed(context))
        layers = [self.out_modulation, *(block.modulation for block in cast(Iterable[ModulatedBlock], self.blocks))]
        parts = [layer(condition).split(condition.shape[-1], dim=-1) for layer in layers]
        return [(shift, 1 + scale, *gate) for shift, scale, *gate in parts]

    def precompute_modulation(self, times_T: Tensor, context: Tensor) -> Iterator[Modulation]:
        """Yields the modulation of one time after the other, for contexts (..., D)."""
        num_contexts = max(1, context[..., 0].numel())
        for chunk in times_T.split(max(1, MODULATION_CHUNK_SIZE // num_contexts)):
            of_chunk = self.modulation(chunk.view(-1, *[1] * (context.dim() - 1)), context)
            for index in range(len(chunk)):
                yield [tuple(values[index] for values in layer) for layer in of_chunk]

    def forward_modulated(self, x: Tensor, modulation: Modulation) -> Tensor:
        hidden = self.input_proj(x)
        (shift, factor), *of_blocks = modulation
        for block, of_block in zip(self.blocks, of_blocks, strict=True):
            hidden = block(hidden, *of_block)
        return self.out_proj(torch.addcmul(shift, self.out_norm(hidden), factor))


@cached_per_device
def _time_frequencies(device: torch.device) -> Tensor:
    half = TIME_FEATURES // 2
    return torch.exp(-math.log(10000) / half * torch.arange(half, device=device, dtype=torch.float32))


class FlowMatchingHead(GenerativeHead, head_type="flow"):
    """Straight-line flow from N(0, 1) to the latent, solved by the midpoint rule (paper 3.2; published code)."""

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.num_steps = config.sampling_steps or FLOW_STEPS
        self.network_calls = 2 * self.num_steps  # the midpoint rule evaluates the net twice per step
        self.time_logit_mean = config.flow_time_logit_mean
        self.net = ModulatedMLP(config, config.latent_size)

    def velocity(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Returns v(x, t, c) in x's dtype for t in [0, 1]; the net gets ⌊1000·t⌋, as the published one does."""
        return self.net(x.to(context.dtype), (time * 1000).long(), context).to(x.dtype)

    def from_noise(self, noise: Tensor, context: Tensor, generator: torch.Generator | None) -> Tensor:
        x = begin = noise.float()  # the state stays in float32: steps would be lost in bfloat16
        times = solver_times(self.num_steps, context.device)
        for index, modulation in enumerate(self.net.precompute_modulation(times, context)):
            velocity = self.net.forward_modulated(x.to(context.dtype), modulation).to(x.dtype)
            # Midpoint rule: even velocities lead from a step's start to its middle, odd ones to its end.
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
        """Returns mean (v − (x1 − x0))²; predrawn: normal posterior_noise and noise (N, ..., Z), time (N, ...) < 1."""
        end = target.sample_latents(self.num_samples, generator, posterior_noise).to(context.dtype)
        if time is None:
            t, mean = torch.empty(end.shape[:-1], device=end.device), self.time_logit_mean
            time = t.uniform_(generator=generator) if mean is None else t.normal_(mean, generator=generator).sigmoid()
        start = standard_normal(end.shape, end, generator) if noise is None else noise
        x = torch.lerp(start, end, time.unsqueeze(-1).to(end.dtype))
        error = self.velocity(x, time, context) - (end - start)
        return error.float().square().mean(-1).mean(0)


@cached_per_device
def solver_times(num_steps: int, device: torch.device) -> Tensor:
    """Returns ⌊1000·t⌋ at the start and the middle of each step, (2·T,), in integers, which rounding can't lower."""
    index_T = torch.arange(num_steps, device=device)
    return (torch.stack([1000 * index_T, 500 * (2 * index_T + 1)], dim=-1) // num_steps).flatten()


class DiffusionHead(GenerativeHead, head_type="diffusion"):
    """Denoising diffusion with learned variance on the latent (paper 3.2; published code)."""

    needs_step_noise = True

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.num_steps = self.network_calls = config.sampling_steps or DIFFUSION_SAMPLING_STEPS
        self.net = ModulatedMLP(config, 2 * config.latent_size)  # the noise ε, and its variance

    @classmethod
    def check(cls, config: CALMConfig) -> None:
        super().check(config)
        num_steps, limit = config.sampling_steps or DIFFUSION_SAMPLING_STEPS, DIFFUSION_TRAIN_STEPS
        require(num_steps <= limit, f"sampling_steps={num_steps}: the diffusion head has {limit} steps at most.")

    def predrawn_noise(
        self, num_samples: int, num_rows: int, like: Tensor, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        noise = super().predrawn_noise(num_samples, num_rows, like, generator)
        return noise | {"step_noise": self.initial_noise((self.num_steps, num_samples, num_rows), like, generator)}

    def from_noise(
        self, noise: Tensor, context: Tensor, generator: torch.Generator | None, step_noise: Tensor | None = None
    ) -> Tensor:
        """Denoises from the last step to the first; `step_noise` (T, N, ..., Z): standard normal, in this order."""
        schedule = diffusion_schedule(self.num_steps, context.device)
        x = noise.float()  # the state stays in float32: steps would be lost in bfloat16
        for index, modulation in enumerate(self.net.precompute_modulation(schedule.timesteps.flip(0), context)):
            step = self.num_steps - 1 - index
            outputs = in_chunks(self.net.forward_modulated, x.to(context.dtype), modulation)
            epsilon, variance = outputs.float().chunk(2, dim=-1)
            x = torch.addcmul(schedule.x_coefficient[step] * x, schedule.epsilon_coefficient[step], epsilon)
            if step > 0:
                fresh = standard_normal(x.shape, x, generator) if step_noise is None else step_noise[index]
                x = torch.addcmul(x, (0.5 * schedule.log_variance(variance, step)).exp(), fresh)
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
        """Returns the noise's MSE + the variational bound, bits per dimension, by which the variance alone is learned.

        Predrawn: standard normal posterior_noise and noise (N, ..., Z), time (N, ...) integers in 0 … 999.
        """
        x0 = target.sample_latents(self.num_samples, generator, posterior_noise).to(context.dtype)
        if time is None:
            uniform = torch.empty(x0.shape[:-1], device=x0.device).uniform_(generator=generator)
            time = (DIFFUSION_TRAIN_STEPS * uniform).long()
        noise = standard_normal(x0.shape, x0, generator) if noise is None else noise
        schedule = diffusion_schedule(DIFFUSION_TRAIN_STEPS, x0.device)
        x = schedule.diffuse(x0, noise, time)
        epsilon, variance = self.net(x.to(context.dtype), time, context).float().chunk(2, dim=-1)
        error = (noise - epsilon).float().square().mean(-1)
        return (error + schedule.variational_bound(x0, x, epsilon.detach(), variance, time)).mean(0)


class DiffusionSchedule:
    """The cosine noise schedule of 1000 steps, respaced to `num_steps`; tables by step, in float32."""

    def __init__(self, num_steps: int, device: torch.device):
        # Computed in float64, so that the last steps' values are right.
        full = torch.arange(DIFFUSION_TRAIN_STEPS + 1, dtype=torch.float64, device=float64_device(device))
        alpha_bar = ((full / DIFFUSION_TRAIN_STEPS + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        kept = torch.linspace(0, len(betas) - 1, num_steps, dtype=full.dtype, device=full.device).round().long()
        cumulative = (1 - betas).cumprod(0)[kept]
        previous = torch.cat([torch.ones_like(cumulative[:1]), cumulative[:-1]])
        betas = 1 - cumulative / previous
        variance = betas * (1 - previous) / (1 - cumulative)

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)

        self.alphas_cumprod, self.timesteps = cumulative, kept.to(device)
        self.signal, self.noise = table(cumulative.sqrt()), table((1 - cumulative).sqrt())
        self.inverse_signal, self.noise_to_signal = table(cumulative.rsqrt()), table((1 / cumulative - 1).sqrt())
        weight_x0 = betas * previous.sqrt() / (1 - cumulative)
        weight_xt = (1 - previous) * (1 - betas).sqrt() / (1 - cumulative)
        self.weight_x0, self.weight_xt = table(weight_x0), table(weight_xt)
        # The mean of a solver's step, `posterior_mean` of `denoise`, is linear in both.
        self.x_coefficient = table(weight_xt + weight_x0 * cumulative.rsqrt())
        self.epsilon_coefficient = table(-weight_x0 * (1 / cumulative - 1).sqrt())
        self.log_betas = table(betas.log())
        # The first step's variance is 0: the published code takes the second's for it.
        self.log_posterior = table(torch.cat([variance[1:2], variance[1:]]).log() if num_steps > 1 else betas.log())

    def diffuse(self, x0: Tensor, noise: Tensor, step) -> Tensor:
        return self.signal[step, None] * x0 + self.noise[step, None] * noise

    def denoise(self, x: Tensor, epsilon: Tensor, step) -> Tensor:
        return self.inverse_signal[step, None] * x - self.noise_to_signal[step, None] * epsilon

    def posterior_mean(self, x: Tensor, x0: Tensor, step) -> Tensor:
        return self.weight_x0[step, None] * x0 + self.weight_xt[step, None] * x

    def log_variance(self, raw: Tensor, step) -> Tensor:
        """Interpolates between the posterior's log variance and log β by the net's output −1 … 1."""
        return torch.lerp(self.log_posterior[step, None], self.log_betas[step, None], (raw + 1) / 2)

    def variational_bound(self, x0: Tensor, x: Tensor, epsilon: Tensor, raw_variance: Tensor, step: Tensor) -> Tensor:
        """Returns the KL of the model's step from the true posterior, at t = 0 the bin's NLL; bits per dimension."""
        x0, x = x0.float(), x.float()
        mean = self.posterior_mean(x, self.denoise(x, epsilon, step), step)
        log_variance = self.log_variance(raw_variance, step)
        true_mean, true_log_variance = self.posterior_mean(x, x0, step), self.log_posterior[step, None]
        gap = true_log_variance - log_variance
        kl = 0.5 * (-1 - gap + gap.exp() + (true_mean - mean).square() * (-log_variance).exp())
        nll = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(step == 0, nll.mean(-1), kl.mean(-1)) / math.log(2)


@cached_per_device
def diffusion_schedule(num_steps: int, device: torch.device) -> DiffusionSchedule:
    return DiffusionSchedule(num_steps, device)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Returns the log-probability of the bin x ± 1/255 under N(mean, std²), open beyond ±0.999 (published code)."""
    precision = (-log_std).exp()
    edges = (precision * (x - mean + half_width) for half_width in (FIRST_STEP_BIN, -FIRST_STEP_BIN))
    # The normal distribution function, by its tanh approximation.
    above, below = (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) for z in edges)
    inner = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inner).clamp(min=1e-12).log()
