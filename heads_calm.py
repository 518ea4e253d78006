"""The generative heads of CALM: each draws the next patch's latent vector given the backbone's hidden state.

One interface: `sample(context)` draws, `loss(context, mean, log_std)` scores against the autoencoder's posterior (or
`loss(context, tokens)` against the tokens, see token_flow_calm.py). All randomness can be passed in. A new head takes
a class, a line in modeling_calm.py's `HEADS`, its name in configuration_calm.py's `HEAD_TYPES`, and what its draws
cost in training/cost.py; a file of its own must be imported in modeling_calm.py, or it doesn't travel with the model.

Axes: N samples per patch (or T solver steps), D hidden size, Z latent size. "..." stands for any leading axes, as
(B, P). Samples come first: (N, ..., Z).
"""

import functools
import math

import torch
from torch import Tensor, nn

from .configuration_calm import CALMConfig
from .scores_calm import energy_score

LAYER_NORM_EPS = 1e-6  # published code
TIME_FEATURES = 256  # width of the sinusoidal embedding of time; published code
FLOW_STEPS = 10  # midpoint steps; published code
DIFFUSION_TRAIN_STEPS = 1000  # published code
DIFFUSION_SAMPLING_STEPS = 100  # published code
FIRST_STEP_BIN = 1 / 255  # half width of the bins of the discretised likelihood at t = 0; published code


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn in place: torch.compile can't trace randn(generator=...) at a size that varies.
    return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(generator=generator)


def draw_posterior(
    mean: Tensor,
    log_std: Tensor,
    num_draws: int,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Draws (N, ..., Z) from N(mean, exp(log_std)²); `noise` (N, ..., Z), standard normal, goes before `num_draws`."""
    if noise is None:
        noise = _normal((num_draws, *mean.shape), mean, generator)
    return torch.addcmul(mean, log_std.exp(), noise)


def _zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that the model's weight initialisation sets to zero."""
    linear = nn.Linear(in_features, out_features)
    linear.zero_init = True
    return linear


class ContextLayer(nn.Module):
    """x + MLP(LayerNorm(x)) on the hidden state, the same for every draw and every solver step."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.norm(hidden))


class GenerativeHead(nn.Module):
    """Interface of the heads. `sample` and `loss` both pass through `forward`, where offloading hooks fire."""

    predicts_tokens = False  # True: `loss` takes the target patches' tokens (..., K) in place of their posterior

    def __init__(self, config: CALMConfig):
        super().__init__()
        self.context_layers = nn.Sequential(
            *(ContextLayer(config.hidden_size) for _ in range(config.num_context_layers))
        )
        self.latent_size = config.latent_size
        self.num_samples = config.num_samples

    def sample(
        self,
        context: Tensor,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        **draws: Tensor,
    ) -> Tensor:
        """Draws latent vectors for each context.

        Args:
            context (`(..., D)`): hidden states.
            num_samples: N draws per context.
            generator: source of all randomness that is not passed in.
            noise (`(N, ..., noise size)`, *optional*): the draws' starting noise; its N goes before `num_samples`.

        Returns:
            `(N, ..., Z)`: independent latent vectors.
        """
        return self(context, num_samples=num_samples, generator=generator, noise=noise, **draws)

    def loss(
        self,
        context: Tensor,
        *target: Tensor,
        generator: torch.Generator | None = None,
        **draws: Tensor,
    ) -> Tensor:
        """Loss of each patch; lower is better.

        Args:
            context (`(..., D)`): hidden states of the patches before.
            target: mean and log_std (`(..., Z)`) of the autoencoder's posterior of the patch to predict or, where
                `predicts_tokens`, the patch's tokens (`(..., K)`).
            generator: source of all randomness that is not passed in.
            draws: recorded draws, named as in the head's `_loss`.

        Returns:
            `(...)`: one value per patch.
        """
        return self(context, *target, is_scored=True, generator=generator, **draws)

    def shared_draws(self, num_samples: int, like: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws for `sample` that every context (R, D) shares, so that a row's samples don't depend on its batch.

        Args:
            like: tensor whose dtype and device the draws take.
        """
        return {"noise": self._noise((num_samples, 1), like, generator)}

    def _noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Starting noise of draws of the given shape: standard normal in the latent's size."""
        return _normal((*shape, self.latent_size), like, generator)

    def forward(self, context: Tensor, *target: Tensor, is_scored: bool = False, **kwargs) -> Tensor:
        context = self.context_layers(context)
        return self._loss(context, *target, **kwargs) if is_scored else self._sample(context, **kwargs)


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
        hidden = self.act(self.sample_proj(self.norm(samples)) + self.context_proj(context))
        gate, up = self.gate_up_proj(self.act(self.hidden_proj(hidden))).chunk(2, dim=-1)
        return samples + self.down_proj(self.act(gate) * up)


class EnergyHead(GenerativeHead):
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
        self.out_proj = _zero_linear(size, config.latent_size)
        self.act = nn.SiLU()

    def _noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform(−0.5, 0.5) in each of `noise_size` dimensions (published code)."""
        noise = torch.empty((*shape, self.noise_size), dtype=like.dtype, device=like.device)
        return noise.uniform_(generator=generator) - 0.5

    def _sample(self, context: Tensor, num_samples: int, generator: torch.Generator | None, noise: Tensor | None):
        if noise is None:
            noise = self._noise((num_samples, *context.shape[:-1]), context, generator)
        samples = self.norm_noise(self.noise_embed(noise))
        context = self.norm_context(self.context_embed(context))
        for block in self.blocks:
            samples = block(samples, context)
        return self.out_proj(self.act(self.out_hidden(self.norm_out(samples))))

    def _loss(
        self,
        context: Tensor,
        mean: Tensor,
        log_std: Tensor,
        generator: torch.Generator | None,
        noise: Tensor | None = None,
        posterior_noise: Tensor | None = None,
    ) -> Tensor:
        """−energy score; draws: noise (N, ..., noise size) uniform, posterior_noise (S, ..., Z) standard normal."""
        samples = self._sample(context, self.num_samples, generator, noise)
        targets = draw_posterior(mean, log_std, self.num_posterior_samples, generator, posterior_noise)
        return -energy_score(samples, targets, self.beta)


class ModulatedBlock(nn.Module):
    """Residual MLP whose input is shifted and scaled, and whose output is gated, by the condition (AdaLN)."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.modulation = _zero_linear(size, 3 * size)

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
        self.out_modulation = _zero_linear(size, 2 * size)
        self.out_proj = _zero_linear(size, out_size)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """time: integer steps, broadcastable to x's leading axes."""
        # In rows, for a solver's time is one number, and quantised layers take no single vectors.
        features = self._time_features(time, x.dtype).view(-1, TIME_FEATURES)
        condition = self.act(self.time_embed(features).view(*time.shape, -1) + self.context_embed(context))
        hidden = self.input_proj(x)
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


class FlowMatchingHead(GenerativeHead):
    """Straight-line flow from N(0, 1) to the latent, solved by the midpoint rule (paper 3.2; published code)."""

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.num_steps = config.sampling_steps or FLOW_STEPS
        self.time_logit_mean = config.flow_time_logit_mean
        self.net = ModulatedMLP(config, config.latent_size)

    def velocity(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """v(x, t, c) in x's dtype for t in [0, 1]; the net sees ⌊1000·t⌋, as the published one does."""
        return self._velocity(x, (time * 1000).long(), context)

    def _velocity(self, x: Tensor, thousandths: Tensor, context: Tensor) -> Tensor:
        return self.net(x.to(context.dtype), thousandths, context).to(x.dtype)

    def _thousandths(self, device: torch.device) -> Tensor:
        """⌊1000·t⌋ at the start and the middle of each step, (T, 2), in integers: no rounding can lower them."""
        steps = self.num_steps
        return torch.tensor([(1000 * i // steps, 500 * (2 * i + 1) // steps) for i in range(steps)], device=device)

    def _sample(self, context: Tensor, num_samples: int, generator: torch.Generator | None, noise: Tensor | None):
        if noise is None:
            noise = self._noise((num_samples, *context.shape[:-1]), context, generator)
        x, step = noise.float(), 1 / self.num_steps  # the state stays in float32: steps would be lost in bfloat16
        for start, middle in self._thousandths(context.device):
            halfway = x + step / 2 * self._velocity(x, start, context)
            x = x + step * self._velocity(halfway, middle, context)
        return x.to(context.dtype)

    def _loss(
        self,
        context: Tensor,
        mean: Tensor,
        log_std: Tensor,
        generator: torch.Generator | None,
        posterior_noise: Tensor | None = None,
        time: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """mean (v − (x1 − x0))².

        Draws: posterior_noise, noise (N, ..., Z) standard normal; time (N, ...) in [0, 1).
        """
        target = draw_posterior(mean, log_std, self.num_samples, generator, posterior_noise).to(context.dtype)
        if time is None:
            time = self._draw_times(target, generator)
        start = _normal(target.shape, target, generator) if noise is None else noise
        x = torch.lerp(start, target, time.unsqueeze(-1).to(target.dtype))
        error = self.velocity(x, time, context) - (target - start)
        return error.float().square().mean(-1).mean(0)

    def _draw_times(self, target: Tensor, generator: torch.Generator | None) -> Tensor:
        times = torch.empty(target.shape[:-1], device=target.device)
        if self.time_logit_mean is None:
            return times.uniform_(generator=generator)
        return torch.sigmoid(times.normal_(self.time_logit_mean, generator=generator))


class DiffusionHead(GenerativeHead):
    """Denoising diffusion with learned variance on the latent (paper 3.2; published code)."""

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.num_steps = config.sampling_steps or DIFFUSION_SAMPLING_STEPS
        self.net = ModulatedMLP(config, 2 * config.latent_size)

    def shared_draws(self, num_samples: int, like: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        draws = super().shared_draws(num_samples, like, generator)
        return draws | {"step_noise": self._noise((self.num_steps, num_samples, 1), like, generator)}

    def _sample(
        self,
        context: Tensor,
        num_samples: int,
        generator: torch.Generator | None,
        noise: Tensor | None,
        step_noise: Tensor | None = None,
    ) -> Tensor:
        """step_noise (T, N, ..., Z): standard normal noise of the steps, in the order they are taken."""
        if noise is None:
            noise = self._noise((num_samples, *context.shape[:-1]), context, generator)
        schedule = diffusion_schedule(self.num_steps, context.device)
        x = noise.float()  # the state stays in float32: steps would be lost in bfloat16
        for index, step in enumerate(reversed(range(self.num_steps))):
            epsilon, variance = (
                self.net(x.to(context.dtype), schedule.timesteps[step], context).float().chunk(2, dim=-1)
            )
            mean = schedule.posterior_mean(x, schedule.denoise(x, epsilon, step), step)
            if step > 0:
                fresh = _normal(x.shape, x, generator) if step_noise is None else step_noise[index]
                mean = mean + (0.5 * schedule.log_variance(variance, step)).exp() * fresh
            x = mean
        return x.to(context.dtype)

    def _loss(
        self,
        context: Tensor,
        mean: Tensor,
        log_std: Tensor,
        generator: torch.Generator | None,
        posterior_noise: Tensor | None = None,
        time: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """MSE of the noise + variational bound (bits per dimension) of the variance, the mean detached.

        Draws: posterior_noise, noise (N, ..., Z) standard normal, time (N, ...) integers in 0 … 999.
        """
        target = draw_posterior(mean, log_std, self.num_samples, generator, posterior_noise).to(context.dtype)
        if time is None:
            time = torch.empty(target.shape[:-1], dtype=torch.long, device=target.device)
            time.random_(DIFFUSION_TRAIN_STEPS, generator=generator)
        if noise is None:
            noise = _normal(target.shape, target, generator)
        schedule = diffusion_schedule(DIFFUSION_TRAIN_STEPS, target.device)
        x = schedule.diffuse(target, noise, time)
        epsilon, variance = self.net(x.to(context.dtype), time, context).float().chunk(2, dim=-1)
        error = (noise - epsilon).float().square().mean(-1)
        return (error + schedule.variational_bound(target, x, epsilon.detach(), variance, time)).mean(0)


class DiffusionSchedule:
    """Cosine noise schedule of 1000 steps, respaced to `num_steps`; tables in float64, arithmetic in float32."""

    def __init__(self, num_steps: int, device: torch.device):
        full = torch.arange(DIFFUSION_TRAIN_STEPS + 1, dtype=torch.float64) / DIFFUSION_TRAIN_STEPS
        alpha_bar = ((full + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        kept = torch.linspace(0, DIFFUSION_TRAIN_STEPS - 1, num_steps, dtype=torch.float64).round().long()
        cumulative = (1 - betas).cumprod(0)[kept]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
        betas = 1 - cumulative / previous
        variance = betas * (1 - previous) / (1 - cumulative)

        def table(values: Tensor) -> Tensor:
            return values.float().to(device)

        self.alphas_cumprod = cumulative
        self.timesteps = kept.to(device)
        self.signal, self.noise = table(cumulative.sqrt()), table((1 - cumulative).sqrt())
        self.inverse_signal, self.noise_to_signal = table(cumulative.rsqrt()), table((1 / cumulative - 1).sqrt())
        self.weight_x0 = table(betas * previous.sqrt() / (1 - cumulative))
        self.weight_xt = table((1 - previous) * (1 - betas).sqrt() / (1 - cumulative))
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
        share = (raw + 1) / 2
        return share * self._at(self.log_betas, step) + (1 - share) * self._at(self.log_posterior, step)

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


@functools.lru_cache
def diffusion_schedule(num_steps: int, device: torch.device) -> DiffusionSchedule:
    """The schedule of so many steps, made once a device."""
    with torch.inference_mode(False):  # tables made in inference mode could not be used in training
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
