"""The interface of the generative heads: each draws the next patch's latent vector given the backbone's hidden state.

A head is one file, like heads_calm_energy.py, and one line, its import in modeling_calm.py. Its class is defined with
the `head_type` that configurations name it by, and answers every question about itself: how to draw and to score,
which configurations it takes, what it must be fitted to before training, how many network calls a draw costs. What
it costs in FLOPs is counted by running it (training/cost.py).

Axes: N samples per patch, K tokens per patch, D hidden size, Z latent size. "..." stands for any leading axes, as
(B, P). Samples come first: (N, ..., Z).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .configuration_calm import HEADS, CALMConfig, require
from .kernels_calm import fast_products
from .modeling_calm_autoencoder import CALMAutoencoder

LAYER_NORM_EPS = 1e-6  # published code
SAMPLES_CHUNK_SIZE = {"cpu": 2**15, "other": 2**18}  # what a head's layers hold of them at CALM-M's width: 1 GB, 6 GB


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn in place: torch.compile can't trace randn(generator=...) at a size that varies.
    return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(generator=generator)


def in_chunks(function: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    """A function of draws (N, ..., size), each for itself, that is never given more than `SAMPLES_CHUNK_SIZE`."""
    num_rows = draws[0, ..., 0].numel() if len(draws) else 1
    at_once = max(1, SAMPLES_CHUNK_SIZE["cpu" if draws.device.type == "cpu" else "other"] // max(1, num_rows))
    if len(draws) <= at_once:
        return function(draws)
    return torch.cat([function(chunk) for chunk in draws.split(at_once)])


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that the model's weight initialisation sets to zero."""
    linear = nn.Linear(in_features, out_features)
    linear.zero_init = True  # pyright: ignore[reportArgumentType] (torch: a tensor or a module)
    return linear


class PatchTarget:
    """The patches that a head is trained to draw: their tokens and, when asked, the autoencoder's posterior of them.

    Args:
        tokens (`(..., K)`, *optional*): ids.
        autoencoder (*optional*): whose posterior it is; encodes at the first request.
        posterior (*optional*): mean and log_std, `(..., Z)` each, where they are known.
        further (`(A, ..., K)`, *optional*): ids of patches that might as well have followed; draws take all 1 + A in
            turn.
    """

    def __init__(
        self,
        tokens: Tensor | None = None,
        autoencoder: CALMAutoencoder | None = None,
        posterior: tuple[Tensor, Tensor] | None = None,
        further: Tensor | None = None,
    ):
        self._tokens, self._autoencoder, self._posterior, self._further = tokens, autoencoder, posterior, further

    def to(self, device: torch.device, **kwargs) -> "PatchTarget":
        """On another device; offloading hooks call it, as they call a tensor's."""
        tokens, further = (t if t is None else t.to(device, **kwargs) for t in (self._tokens, self._further))
        posterior = None
        if self._posterior is not None:
            mean, log_std = self._posterior
            posterior = mean.to(device, **kwargs), log_std.to(device, **kwargs)
        return PatchTarget(tokens, self._autoencoder, posterior, further)

    @property
    def tokens(self) -> Tensor:
        if self._tokens is None:
            raise ValueError("This target has a posterior alone; the head asks for its tokens.")
        return self._tokens

    @property
    def num_patches(self) -> int:
        """Patches that draws take in turn, 1 + A."""
        return 1 if self._further is None else 1 + len(self._further)

    def draw_tokens(self, num_draws: int) -> Tensor:
        """Ids (N, ..., K): the tokens, and those of the further patches, in turn."""
        tokens = self.tokens[None]
        if self._further is not None:
            tokens = torch.cat([tokens, self._further])
        return tokens[torch.arange(num_draws, device=tokens.device) % len(tokens)]

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and natural logarithm of the standard deviation, (..., Z) each, on the tokens' device."""
        if self._posterior is None:
            self._posterior = self._encode(self.tokens)
        return self._posterior

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self._autoencoder is None:
            raise ValueError("This target has tokens alone; the head asks for their posterior.")
        with torch.no_grad():
            parts = self._autoencoder.encode(tokens.reshape(1, -1))
        mean, log_std = (part.view(*tokens.shape[:-1], part.shape[-1]).to(tokens.device) for part in parts)
        return mean, log_std

    def sample_latents(
        self, num_draws: int, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Draws (N, ..., Z) from the posterior; `noise` (N, ..., Z), standard normal, goes before `num_draws`."""
        mean, log_std = self.posterior()
        if noise is None:
            noise = standard_normal((num_draws, *mean.shape), mean, generator)
        if self._further is not None:
            pairs = zip((mean, log_std), self._encode(self._further), strict=True)
            turns = torch.arange(len(noise), device=mean.device) % (1 + len(self._further))
            mean, log_std = (torch.cat([own[None], others])[turns] for own, others in pairs)
        return torch.addcmul(mean, log_std.exp(), noise)


class ContextLayer(nn.Module):
    """x + MLP(LayerNorm(x)) on the hidden state, the same for every draw and every solver step."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.norm(hidden))


class GenerativeHead(nn.Module):
    """Base of the heads: `class MyHead(GenerativeHead, head_type="mine")` defines `draw` and `compute_loss`.

    Callers use `sample` and `loss`; both pass through `forward`, where offloading and FSDP hooks fire.
    """

    network_calls = 1  # of the head's net, for one draw
    draws_further_noise = False  # whether `draw` asks the generator again: it then sees all draws at once
    is_fitted = True  # whether `fit` has been called, in heads that need it

    def __init_subclass__(cls, head_type: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if head_type is not None:
            HEADS[head_type] = cls

    def __init__(self, config: CALMConfig):
        super().__init__()
        self.context_layers = nn.Sequential(
            *(ContextLayer(config.hidden_size) for _ in range(config.num_context_layers))
        )
        self.latent_size = config.latent_size
        self.num_samples = config.num_samples

    # what a head defines

    @classmethod
    def check(cls, config: CALMConfig) -> None:
        """Raises `ValueError` where the configuration makes no sense for this head."""
        require(config.num_samples >= 1, f"num_samples={config.num_samples}: must be at least 1.")

    def fit(self, autoencoder: CALMAutoencoder, multi_token_loss: dict[str, Tensor] | None = None) -> None:
        """Makes a new head ready for training, in heads that need it (`is_fitted`).

        Args:
            autoencoder: the trained one.
            multi_token_loss: weights of the `MultiTokenLoss` that the backbone was trained with, where it was.
        """

    def draw(self, context: Tensor, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latent vectors (N, ..., Z) from their starting noise; `context` (..., D) has passed the context layers."""
        raise NotImplementedError

    def compute_loss(self, context: Tensor, target: PatchTarget, generator: torch.Generator | None) -> Tensor:
        """See `loss`; `context` has passed the context layers, and `target` is on its device."""
        raise NotImplementedError

    def initial_noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Starting noise of draws of the given shape: standard normal in the latent's size."""
        return standard_normal((*shape, self.latent_size), like, generator)

    # what callers use

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
            **draws: further recorded draws, named as in the head's `draw`.

        Returns:
            `(N, ..., Z)`: independent latent vectors.
        """
        num_draws = (num_samples if noise is None else len(noise)) * context[..., 0].numel()
        with fast_products(num_draws, context.shape[-1]):
            return self(context, num_samples=num_samples, generator=generator, noise=noise, **draws)

    def loss(
        self, context: Tensor, target: PatchTarget, generator: torch.Generator | None = None, **draws: Tensor
    ) -> Tensor:
        """Loss of each patch; lower is better.

        Args:
            context (`(..., D)`): hidden states of the patches before.
            target: the patches to predict, of the same leading axes.
            generator: source of all randomness that is not passed in.
            **draws: recorded draws, named as in the head's `compute_loss`.

        Returns:
            `(...)`: one value per patch.
        """
        return self(context, target, generator=generator, **draws)

    def predrawn_noise(
        self, num_samples: int, num_rows: int, like: Tensor, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Draws for `sample`, of as many contexts (R, D) as rows, in the dtype and on the device of `like`; one row's
        can be shared by any number of contexts."""
        return {"noise": self.initial_noise((num_samples, num_rows), like, generator)}

    def forward(self, context: Tensor, target: PatchTarget | None = None, **kwargs) -> Tensor:
        context = self.context_layers(context)
        if target is None:
            return self._sample(context, **kwargs)
        return self.compute_loss(context, target.to(context.device), **kwargs)

    def _sample(
        self,
        context: Tensor,
        num_samples: int,
        generator: torch.Generator | None,
        noise: Tensor | None,
        **draws: Tensor,
    ) -> Tensor:
        if noise is None:
            noise = self.initial_noise((num_samples, *context.shape[:-1]), context, generator)
        if self.draws_further_noise:
            return self.draw(context, noise, generator, **draws)
        return in_chunks(lambda chunk: self.draw(context, chunk, generator, **draws), noise)
