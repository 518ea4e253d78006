"""The interface of the generative heads: each samples the next patch's latent vector given the hidden state.

A head is one file, like heads_calm_energy.py, and one line, its import in modeling_calm.py. Its class is defined with
the `head_type` that configurations name it by, and says how to sample, how to compute the loss, which configurations
it takes and how many network calls a sample takes. Its FLOPs are counted by running it (training/cost.py).

Axes: N samples per patch, K tokens per patch, D hidden size, Z latent size. "..." stands for any leading axes, as
(B, P). Samples come first: (N, ..., Z).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_calm import HEADS, CALMConfig, require
from .modeling_calm_autoencoder import CALMAutoencoder

LAYER_NORM_EPS = 1e-6  # published code
SAMPLES_CHUNK_SIZE = {"cpu": 2**15, "other": 2**18}  # a head's layers then hold 1 GB and 6 GB at CALM-M's width


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn in place: torch.compile can't trace randn(generator=...) at a size that varies.
    return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(generator=generator)


def in_chunks(function: Callable[..., Tensor], samples: Tensor, *arguments) -> Tensor:
    """Applies a function to samples (N, ..., size), at most `SAMPLES_CHUNK_SIZE` at a time, with more arguments."""
    num_rows = samples[0, ..., 0].numel() if len(samples) else 1
    limit = SAMPLES_CHUNK_SIZE["cpu" if samples.device.type == "cpu" else "other"]
    chunk_size = max(1, limit // max(1, num_rows))
    if len(samples) <= chunk_size:
        return function(samples, *arguments)
    return torch.cat([function(chunk, *arguments) for chunk in samples.split(chunk_size)])


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Returns a linear layer that the model's weight initialisation sets to zero."""
    linear = nn.Linear(in_features, out_features)
    linear.zero_init = True  # pyright: ignore[reportArgumentType] (torch: a tensor or a module)
    return linear


class PatchTarget:
    """The patches that a head predicts in training: their tokens and, on request, the autoencoder's posterior of them.

    Args:
        tokens (`(..., K)`, *optional*): ids.
        autoencoder (*optional*): encodes the tokens at the first request of their posterior.
        posterior (*optional*): mean and log_std, `(..., Z)` each, where they are known.
    """

    def __init__(
        self,
        tokens: Tensor | None = None,
        autoencoder: CALMAutoencoder | None = None,
        posterior: tuple[Tensor, Tensor] | None = None,
    ):
        self._tokens, self._autoencoder, self._posterior = tokens, autoencoder, posterior

    def to(self, device: torch.device, **kwargs) -> "PatchTarget":
        """Returns the target on another device; offloading hooks call this, as they call a tensor's."""
        tokens = None if self._tokens is None else self._tokens.to(device, **kwargs)
        posterior = self._posterior
        if posterior is not None:
            posterior = posterior[0].to(device, **kwargs), posterior[1].to(device, **kwargs)
        return PatchTarget(tokens, self._autoencoder, posterior)

    def rows(self, rows: slice) -> "PatchTarget":
        """Returns the targets of some rows, where there is one axis of patches."""
        tokens = None if self._tokens is None else self._tokens[rows]
        posterior = self._posterior
        return PatchTarget(tokens, self._autoencoder, posterior and (posterior[0][rows], posterior[1][rows]))

    @property
    def tokens(self) -> Tensor:
        if self._tokens is None:
            raise ValueError("This target has no tokens, which the head needs.")
        return self._tokens

    @property
    def all_tokens(self) -> Tensor:
        """Ids (A, ..., K) of the patches over which a loss on tokens is averaged: here the one that follows."""
        return self.tokens[None]

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Returns mean and log standard deviation, (..., Z) each, on the tokens' device."""
        if self._posterior is None:
            self._posterior = self.encode(self.tokens)
        return self._posterior

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log_std, (..., Z) each, of patches (..., K)."""
        if self._autoencoder is None:
            raise ValueError("This target has no autoencoder, which the head needs to encode its tokens.")
        with torch.no_grad():  # as one row, for patches are encoded independently
            parts = self._autoencoder.encode(tokens.reshape(1, -1))
        mean, log_std = (part.view(*tokens.shape[:-1], part.shape[-1]).to(tokens.device) for part in parts)
        return mean, log_std

    def sample_latents(
        self, num_samples: int, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Samples (N, ..., Z) from the posterior, from standard normal `noise` (N, ..., Z) if it is given."""
        mean, log_std = self.posterior()
        if noise is None:
            noise = standard_normal((num_samples, *mean.shape), mean, generator)
        return torch.addcmul(mean, log_std.exp(), noise)


class ContextLayer(nn.Module):
    """Computes x + MLP(LayerNorm(x)) on the hidden state, once for all samples and solver steps."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.norm(hidden))


class TemperatureEmbedding(nn.Module):
    """Embeds a temperature T as a vector that is added to the context; it is 0 at T = 1, whatever the weights."""

    def __init__(self, size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, size), nn.SiLU(), zero_linear(size, size))

    def forward(self, temperature: Tensor | float, context: Tensor) -> Tensor:
        """Returns (..., D) for temperatures (...), or (D,) for one; `context` has the dtype and the device."""
        if isinstance(temperature, Tensor):
            log_inverse = -temperature.log().to(context.dtype)
        else:
            log_inverse = context.new_full((), -math.log(temperature))
        rows = log_inverse.flatten().unsqueeze(-1)  # quantised layers take no single vectors
        return (rows * self.mlp(rows)).view(*log_inverse.shape, -1)


class GenerativeHead(nn.Module):
    """Base of the heads: `class MyHead(GenerativeHead, head_type="mine")` defines `from_noise` and `compute_loss`.

    What callers use passes through `forward`, where offloading and FSDP hooks fire.
    """

    network_calls = 1  # of the head's net, for one sample
    samples_tokens = False  # token ids in place of latent vectors; then `propose` and `token_logits` are defined
    needs_step_noise = False  # whether `from_noise` draws more random numbers: it then gets all samples at once

    def __init_subclass__(cls, head_type: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if head_type is not None:
            HEADS[head_type] = cls

    def __init__(self, config: CALMConfig):
        super().__init__()
        self.latent_size, self.num_samples = config.latent_size, config.num_samples
        layers = [ContextLayer(config.hidden_size) for _ in range(config.num_context_layers)]
        self.context_layers = nn.Sequential(*layers)
        self.lowest_temperature = config.distilled_temperature or 1.0  # that `sample` takes
        if config.distilled_temperature is not None:
            self.temperature_embedding = TemperatureEmbedding(config.hidden_size)

    # what a head defines

    @classmethod
    def check(cls, config: CALMConfig) -> None:
        """Raises ValueError where the configuration makes no sense for this head."""
        require(config.num_samples >= 1, f"num_samples={config.num_samples}: must be at least 1.")

    def from_noise(self, noise: Tensor, context: Tensor, generator: torch.Generator | None) -> Tensor:
        """Maps starting noise to samples (N, ..., Z); `context` (..., D) has passed the context layers."""
        raise NotImplementedError

    def compute_loss(self, context: Tensor, target: PatchTarget, generator: torch.Generator | None) -> Tensor:
        """Returns the loss, see `loss`; `context` is the output of the context layers, and `target` on its device."""
        raise NotImplementedError

    def propose(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Samples patches at a temperature, to be accepted with a probability; see heads_calm_token_chain.py."""
        raise NotImplementedError

    def token_logits(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Returns the logits (..., K, V) of a patch's tokens (..., K), each given those before it."""
        raise NotImplementedError

    def initial_noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Returns starting noise of samples of the given shape: standard normal in the latent's size."""
        return standard_normal((*shape, self.latent_size), like, generator)

    # what callers use

    def sample(
        self,
        context: Tensor,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        temperature: float = 1.0,
        **step_noise: Tensor,
    ) -> Tensor:
        """Samples independent latent vectors (N, ..., Z) for each context, the hidden states (..., D).

        A head with `samples_tokens` returns ids (N, ..., K); `decode` takes either.

        `temperature` lies between `lowest_temperature` and 1. Noise is drawn from `generator` unless it is passed in:
        starting noise (N, ..., noise size), whose N replaces `num_samples`, and `step_noise`, named as in the head's
        `from_noise`.
        """
        noise_arguments = {"generator": generator, "noise": noise, **step_noise}
        return self(context, self._sample, temperature=temperature, num_samples=num_samples, **noise_arguments)

    def decode(self, samples: Tensor, autoencoder: CALMAutoencoder) -> Tensor:
        """Returns the token ids (N, ..., K) of samples."""
        return samples if self.samples_tokens else autoencoder.decode_tokens(samples)

    def loss(
        self, context: Tensor, target: PatchTarget, generator: torch.Generator | None = None, **arguments: Any
    ) -> Tensor:
        """Returns the loss of each target patch, (...), given hidden states (..., D); lower is better.

        Other arguments: `temperature` (...), at which the targets are samples, and noise that is not to be drawn from
        `generator`, named as in the head's `compute_loss`.
        """
        return self(context, self._loss, target, generator=generator, **arguments)

    def predrawn_noise(
        self, num_samples: int, num_rows: int, like: Tensor, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Draws the noise of `sample` for `num_rows` contexts, as its keyword arguments, in the dtype of `like`.

        With `num_rows=1` the noise broadcasts over any number of contexts.
        """
        return {"noise": self.initial_noise((num_samples, num_rows), like, generator)}

    def forward(self, context: Tensor, compute: Callable, *args, temperature: Tensor | float = 1.0, **kwargs) -> Any:
        """Returns `compute` of the context, conditioned on the temperature, after the context layers."""
        if isinstance(temperature, Tensor) or temperature != 1:
            context = context + self.temperature_embedding(temperature, context)
        return compute(self.context_layers(context), *args, **kwargs)

    def _loss(self, context: Tensor, target: PatchTarget, **kwargs) -> Tensor:
        return self.compute_loss(context, target.to(context.device), **kwargs)

    def _sample(self, context: Tensor, num_samples: int, generator, noise: Tensor | None, **step_noise) -> Tensor:
        if noise is None:
            noise = self.initial_noise((num_samples, *context.shape[:-1]), context, generator)
        if self.needs_step_noise:
            return self.from_noise(noise, context, generator, **step_noise)
        return in_chunks(self.from_noise, noise, context, generator)
