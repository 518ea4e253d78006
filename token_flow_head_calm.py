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
from .flow_head_calm import Conditions, FlowMatchingHead, ModulatedMLP, solver_times
from .heads_calm import PatchTarget
from .token_chain_head_calm import TokenHead

LEAST_TIME_LEFT = 1e-3  # the velocity at t = 1 is a difference over no time


class TokenFlowHead(TokenHead, FlowMatchingHead, head_type="token_flow"):
    """A flow head whose velocity points to the tokens that the net expects; see the top of this file."""

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.net = ModulatedMLP(config, config.patch_size * config.hidden_size)

    def _expectation(self, x: Tensor, conditions: Conditions, states: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents (..., Z) → logits (..., K, V) of the tokens, and the end point expected, (..., Z).

        Args:
            x: the latents.
            conditions: of the net.
            states: the chain's, of the contexts, (..., K, D).
        """
        evidence = self.net.given(conditions, x.to(states.dtype)).unflatten(-1, (self.patch_size, -1))
        logits, probabilities = self.chain.probabilities(states + evidence)
        return logits, probabilities.flatten(-2) @ self.codes.flatten(0, 1)

    def draw(self, context: Tensor, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        """The midpoint rule, but that the last step ends where the net expects it to, in its middle.

        So a draw is a mean of tokens' points; the rule itself would go on beyond them where the net changes its mind.
        """
        x = begin = end = noise.float()
        times, states = solver_times(self.num_steps, context.device), self.chain.states(context)
        for index, conditions in enumerate(self.net.conditions_at(times, context)):
            end = self._expectation(x, conditions, states)[1].to(x.dtype)
            x = self._midpoint_rule(begin, self._towards(end, x, times[index]), index)
            begin = x if index % 2 else begin
        return end.to(context.dtype)

    def velocity(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        thousandths = (time * 1000).long()
        end = self._expectation(x, self.net.conditions(thousandths, context), self.chain.states(context))[1]
        return self._towards(end.to(x.dtype), x, thousandths)

    @staticmethod
    def _towards(end: Tensor, x: Tensor, thousandths: Tensor) -> Tensor:
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
        conditions = self.net.conditions((time * 1000).long(), context)
        logits, _ = self._expectation(x, conditions, self.chain.states(context))
        losses = F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten(), reduction="none")
        return losses.view(tokens.shape).mean(-1).mean(0)
