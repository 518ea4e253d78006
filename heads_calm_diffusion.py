"""The diffusion head and its schedule (paper 3.2; published code).

Axes: N samples per patch, T solver steps, D hidden size, Z latent size. "..." stands for any leading axes, as (B, P).
Samples come first: (N, ..., Z).
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .configuration_calm import CALMConfig, require
from .heads_calm import GenerativeHead, PatchTarget, in_chunks, standard_normal
from .heads_calm_flow import ModulatedMLP
from .kernels_calm import cached_per_device, float64_device

DIFFUSION_TRAIN_STEPS = 1000  # published code
DIFFUSION_SAMPLING_STEPS = 100  # published code
FIRST_STEP_BIN = 1 / 255  # half width of the bins of the discretised likelihood at t = 0; published code


class DiffusionHead(GenerativeHead, head_type="diffusion"):
    """Denoising diffusion with learned variance on the latent (paper 3.2; published code)."""

    draws_further_noise = True

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.num_steps = config.sampling_steps or DIFFUSION_SAMPLING_STEPS
        self.net = ModulatedMLP(config, 2 * config.latent_size)

    @classmethod
    def check(cls, config: CALMConfig) -> None:
        super().check(config)
        require(
            (config.sampling_steps or 1) <= DIFFUSION_TRAIN_STEPS,
            f"sampling_steps={config.sampling_steps}: the diffusion head has {DIFFUSION_TRAIN_STEPS} steps at most.",
        )

    @property
    def network_calls(self) -> int:
        return self.num_steps

    def predrawn_noise(
        self, num_samples: int, num_rows: int, like: Tensor, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        draws = super().predrawn_noise(num_samples, num_rows, like, generator)
        return draws | {"step_noise": self.initial_noise((self.num_steps, num_samples, num_rows), like, generator)}

    def draw(
        self,
        context: Tensor,
        noise: Tensor,
        generator: torch.Generator | None,
        step_noise: Tensor | None = None,
    ) -> Tensor:
        """step_noise (T, N, ..., Z): standard normal noise of the steps, in the order they are taken."""
        schedule = diffusion_schedule(self.num_steps, context.device)
        x = noise.float()  # the state stays in float32: steps would be lost in bfloat16
        all_conditions = self.net.precompute_modulation(schedule.timesteps.flip(0), context)
        for index, conditions in enumerate(all_conditions):
            step = self.num_steps - 1 - index
            outputs = in_chunks(partial(self.net.given, conditions), x.to(context.dtype))
            epsilon, variance = outputs.float().chunk(2, dim=-1)
            x = torch.addcmul(schedule.of_x[step] * x, schedule.of_epsilon[step], epsilon)
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
        """MSE of the noise + variational bound (bits per dimension) of the variance, the mean detached.

        Draws: posterior_noise, noise (N, ..., Z) standard normal, time (N, ...) integers in 0 … 999.
        """
        x0 = target.sample_latents(self.num_samples, generator, posterior_noise).to(context.dtype)
        if time is None:
            time = torch.empty(x0.shape[:-1], dtype=torch.long, device=x0.device)
            time.random_(DIFFUSION_TRAIN_STEPS, generator=generator)
        if noise is None:
            noise = standard_normal(x0.shape, x0, generator)
        schedule = diffusion_schedule(DIFFUSION_TRAIN_STEPS, x0.device)
        x = schedule.diffuse(x0, noise, time)
        epsilon, variance = self.net(x.to(context.dtype), time, context).float().chunk(2, dim=-1)
        error = (noise - epsilon).float().square().mean(-1)
        return (error + schedule.variational_bound(x0, x, epsilon.detach(), variance, time)).mean(0)


class DiffusionSchedule:
    """Cosine noise schedule of 1000 steps, respaced to `num_steps`; tables in float64, arithmetic in float32."""

    def __init__(self, num_steps: int, device: torch.device):
        # Tables are of float64, so that the last steps' are right.
        float64: dict[str, Any] = {"dtype": torch.float64, "device": float64_device(device)}
        full = torch.arange(DIFFUSION_TRAIN_STEPS + 1, **float64) / DIFFUSION_TRAIN_STEPS
        alpha_bar = ((full + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        kept = torch.linspace(0, DIFFUSION_TRAIN_STEPS - 1, num_steps, **float64).round().long()
        cumulative = (1 - betas).cumprod(0)[kept]
        previous = torch.cat([torch.ones(1, **float64), cumulative[:-1]])
        betas = 1 - cumulative / previous
        variance = betas * (1 - previous) / (1 - cumulative)

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)

        self.alphas_cumprod = cumulative
        self.timesteps = kept.to(device)
        self.signal, self.noise = table(cumulative.sqrt()), table((1 - cumulative).sqrt())
        self.inverse_signal, self.noise_to_signal = table(cumulative.rsqrt()), table((1 / cumulative - 1).sqrt())
        weight_x0 = betas * previous.sqrt() / (1 - cumulative)
        weight_xt = (1 - previous) * (1 - betas).sqrt() / (1 - cumulative)
        self.weight_x0, self.weight_xt = table(weight_x0), table(weight_xt)
        # The mean of a solver's step, `posterior_mean` of `denoise`, is linear in both.
        self.of_x = table(weight_xt + weight_x0 * cumulative.rsqrt())
        self.of_epsilon = table(-weight_x0 * (1 / cumulative - 1).sqrt())
        self.log_betas = table(betas.log())
        # The first step's variance is 0: the published code takes the second's for it.
        self.log_posterior = table(torch.cat([variance[1:2], variance[1:]]).log() if num_steps > 1 else betas.log())

    def diffuse(self, x0: Tensor, noise: Tensor, step) -> Tensor:
        return self._at(self.signal, step) * x0 + self._at(self.noise, step) * noise

    def denoise(self, x: Tensor, epsilon: Tensor, step) -> Tensor:
        return self._at(self.inverse_signal, step) * x - self._at(self.noise_to_signal, step) * epsilon

    def posterior_mean(self, x: Tensor, x0: Tensor, step) -> Tensor:
        return self._at(self.weight_x0, step) * x0 + self._at(self.weight_xt, step) * x

    def log_variance(self, raw: Tensor, step) -> Tensor:
        """Learned range: raw −1 … 1 interpolates between the posterior's log variance and log β."""
        return torch.lerp(self._at(self.log_posterior, step), self._at(self.log_betas, step), (raw + 1) / 2)

    def variational_bound(self, x0: Tensor, x: Tensor, epsilon: Tensor, raw_variance: Tensor, step: Tensor) -> Tensor:
        """KL of the model's step from the true posterior; at t = 0 the discretised likelihood. Bits per dimension."""
        x0, x = x0.float(), x.float()
        mean = self.posterior_mean(x, self.denoise(x, epsilon, step), step)
        log_variance = self.log_variance(raw_variance, step)
        true_mean, true_log_variance = self.posterior_mean(x, x0, step), self._at(self.log_posterior, step)
        gap = true_log_variance - log_variance
        kl = 0.5 * (-1 - gap + gap.exp() + (true_mean - mean).square() * (-log_variance).exp())
        nll = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(step == 0, nll.mean(-1), kl.mean(-1)) / math.log(2)

    @staticmethod
    def _at(values: Tensor, step) -> Tensor:
        picked = values[step]
        return picked.unsqueeze(-1) if picked.dim() else picked


@cached_per_device
def diffusion_schedule(num_steps: int, device: torch.device) -> DiffusionSchedule:
    """The schedule of so many steps."""
    return DiffusionSchedule(num_steps, device)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the bin x ± 1/255 under N(mean, std²), open-ended beyond ±0.999, by the tanh
    approximation of the normal distribution function (published code)."""
    precision = (-log_std).exp()

    def cdf(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    above, below = cdf(precision * (x - mean + FIRST_STEP_BIN)), cdf(precision * (x - mean - FIRST_STEP_BIN))
    inner = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inner).clamp(min=1e-12).log()
