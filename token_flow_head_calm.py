"""The token-flow head: a flow in latent space that knows which points of it mean tokens.

Where the flow head predicts a velocity, this one predicts the K tokens that the noisy latent is on its way to, and the
velocity follows: every token has a point in latent space, a patch's end point is the sum of its tokens' points, so the
best estimate of the end point is the sum of the tokens' points weighted by their probabilities. Trained by the
cross-entropy of the tokens at all noise levels. It is not in the paper; that a continuous diffusion of discrete data
may be trained this way is known from Dieleman et al. 2022 (arXiv 2211.15089).

Axes: N samples per patch, D hidden size, Z latent size, K tokens per patch, V vocabulary. "..." stands for any leading
axes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_calm import CALMConfig
from .flow_head_calm import FlowMatchingHead, ModulatedMLP
from .heads_calm import PatchTarget
from .token_chain_head_calm import TokenHead

LEAST_TIME_LEFT = 1e-3  # the velocity at t = 1 is a difference over no time


class TokenFlowHead(TokenHead, FlowMatchingHead, head_type="token_flow"):
    """A flow head whose velocity points to the tokens that the net expects; see the top of this file."""

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.net = ModulatedMLP(config, config.patch_size * config.hidden_size)

    def _expectation(self, x: Tensor, thousandths: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents (..., Z) → logits (..., K, V) of the tokens, and the end point expected, (..., Z)."""
        evidence = self.net(x.to(context.dtype), thousandths, context).unflatten(-1, (self.patch_size, -1))
        logits, probabilities = self.chain.probabilities(self.chain.states(context) + evidence)
        return logits, probabilities.flatten(-2) @ self.codes.flatten(0, 1)

    def draw(self, context: Tensor, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        """The midpoint rule, but that the last step ends where the net expects it to, in its middle.

        So a draw is a mean of tokens' points; the rule itself would go on beyond them where the net changes its mind.
        """
        x = noise.float()
        times = self._thousandths(context.device)
        for start, middle in times[:-1]:
            x = self._step(x, start, middle, context)
        start, middle = times[-1]
        return self._expectation(self._halfway(x, start, context), middle, context)[1].to(context.dtype)

    def _velocity(self, x: Tensor, thousandths: Tensor, context: Tensor) -> Tensor:
        end = self._expectation(x, thousandths, context)[1].to(x.dtype)
        left = (1 - thousandths / 1000).clamp(min=LEAST_TIME_LEFT).to(x.dtype)
        return (end - x) / left.unsqueeze(-1)

    def compute_loss(
        self,
        context: Tensor,
        target: PatchTarget,
        generator: torch.Generator | None,
        time: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy, nats a token, of the target patches' tokens (N, ..., K) seen through noise.

        Draws: noise (N, ..., Z) standard normal; time (N, ...) in [0, 1).
        """
        tokens = target.draw_tokens(self.num_samples)
        end = self.points(tokens).to(context.dtype)
        x, time, _ = self._on_the_way(end, generator, time, noise)
        logits, _ = self._expectation(x, (time * 1000).long(), context)
        losses = F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten(), reduction="none")
        return losses.view(tokens.shape).mean(-1).mean(0)
