"""The token-chain head: a patch's tokens one after the other, by a small network, and the latent that means them.

The heads of the paper draw a latent in one piece and leave the decoder to say which tokens it is. This one draws the
tokens first, p(x_k | hidden state, x_<k), and hands on the sum of their points in latent space. So it has an output
matrix, and the paper's reason for continuous vectors, that a large vocabulary in patches of many tokens would make one
too costly, does not hold for it. It is not in the paper: a yardstick for the heads that are, and the better head of
small vocabularies. Trained by the tokens' cross-entropy.

Axes: N samples per patch, A further targets, D hidden size, Z latent size, K tokens per patch, V vocabulary. "..."
stands for any leading axes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_calm import CALMConfig, require
from .heads_calm import GenerativeHead, PatchTarget
from .modeling_calm_autoencoder import CALMAutoencoder

NUM_CONTEXTS = 64  # random patches over which a token's point is averaged
PATCHES_CHUNK_SIZE = 8192  # patches encoded at once


class TokenChain(nn.Module):
    """A patch's tokens one after the other: p(x_k | state_k, x_<k), the same small MLP at every place."""

    def __init__(self, hidden_size: int, vocab_size: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.context_proj = nn.Linear(hidden_size, patch_size * hidden_size)
        self.embeddings = nn.ModuleList(nn.Embedding(vocab_size, hidden_size) for _ in range(patch_size - 1))
        self.norm_in, self.norm_out = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size), nn.SiLU(), nn.Linear(2 * hidden_size, hidden_size)
        )
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def states(self, context: Tensor) -> Tensor:
        """Hidden states (..., D) → what each place knows of them, (..., K, D)."""
        return self.context_proj(context).unflatten(-1, (self.patch_size, -1))

    def logits(self, state: Tensor) -> Tensor:
        """state_k, the tokens before included, (..., D) → (..., V)."""
        return self.lm_head(self.norm_out(state + self.mlp(self.norm_in(state))))

    def teacher_forced(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Logits (..., K, V) given hidden states (..., D) and the patch's own tokens (..., K)."""
        given = [embed(tokens[..., k]) for k, embed in enumerate(self.embeddings)]
        state = self.states(context)
        if given:
            state = state + F.pad(torch.stack(given, dim=-2).cumsum(-2), (0, 0, 1, 0))
        return self.logits(state)

    def unroll(self, state: Tensor, choose: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """What is chosen at each place, given what was chosen at the places before it.

        Args:
            state: `states` of them all, (..., K, D).
            choose: place k and its logits (..., V) → ids (...).
        """
        chosen, given = [], 0
        for k in range(self.patch_size):
            chosen.append(choose(k, self.logits(state[..., k, :] + given)))
            if k < self.patch_size - 1:
                given = given + self.embeddings[k](chosen[-1])
        return chosen


@torch.no_grad()
def latent_token_embeddings(autoencoder: CALMAutoencoder, num_contexts: int = NUM_CONTEXTS) -> Tensor:
    """The point of every token at every place of a patch, (K, V, Z): the mean latent of random patches that have it
    there, always the same `num_contexts`, less what the other places add. Where latents are nearly additive in the
    tokens, a patch's points sum to about the mean of its posterior.
    """
    config = autoencoder.config
    K, V, Z = config.patch_size, config.vocab_size, config.latent_size
    device = autoencoder.device
    contexts = torch.randint(V, (num_contexts, K), generator=torch.Generator().manual_seed(0)).to(device)
    codes = torch.empty(K, V, Z, device=device)
    per_chunk = max(1, PATCHES_CHUNK_SIZE // num_contexts)
    for k in range(K):
        for tokens in torch.arange(V, device=device).split(per_chunk):
            patches = contexts.repeat(len(tokens), 1, 1)
            patches[:, :, k] = tokens[:, None]
            mean = autoencoder.encode(patches.view(1, -1))[0][0].float()
            codes[k, tokens] = mean.view(len(tokens), num_contexts, Z).mean(1)
    overall = autoencoder.encode(contexts.view(1, -1))[0][0].float().mean(0)
    return codes - overall * (K - 1) / K  # summed over the places, what the contexts add is counted once


class TokenChainHead(GenerativeHead, head_type="token_chain"):
    """Draws the patch's tokens from the chain, and hands on the sum of their codes; see the top of this file.

    The codes come from the autoencoder, by `fit`, and are saved with the weights.
    """

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.patch_size = config.patch_size
        self.chain = TokenChain(config.hidden_size, config.vocab_size, config.patch_size)
        # No buffer: these stay in memory when a module is offloaded, and check_weights misses none that no file had.
        codes = torch.zeros(config.patch_size, config.vocab_size, config.latent_size)
        self.codes = nn.Parameter(codes, requires_grad=False)

    @classmethod
    def check(cls, config: CALMConfig) -> None:
        super().check(config)
        context = config.autoencoder_config.encoder_context
        require(context == 0, f"encoder_context={context}: the codes of the token_chain head are of patches alone.")

    def train(self, mode: bool = True):
        """As in torch, but the codes stay frozen: `from_pretrained` creates parameters anew and calls this last."""
        super().train(mode)
        self.codes.requires_grad_(False)
        return self

    @property
    def is_fitted(self) -> bool:
        return bool(self.codes.any())

    def fit(self, autoencoder: CALMAutoencoder, multi_token_loss: dict[str, Tensor] | None = None) -> None:
        """Computes the codes, and takes over the chain of the backbone's multi-token loss."""
        self.codes.copy_(latent_token_embeddings(autoencoder))
        if multi_token_loss is not None:
            self.chain.load_state_dict(multi_token_loss)

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Codes that aren't fitted are zeros, no chance memory."""
        nn.init.zeros_(self.codes)

    def points(self, tokens: Tensor) -> Tensor:
        """Ids (..., K) → the points (..., Z) that mean them."""
        return self.codes[torch.arange(self.patch_size, device=tokens.device), tokens].sum(-2)

    @property
    def network_calls(self) -> int:
        return self.patch_size

    def initial_noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """One number in [0, 1) a token, in float32: bfloat16 has too few of them."""
        uniform = torch.empty((*shape, self.patch_size), dtype=torch.float32, device=like.device)
        return uniform.uniform_(generator=generator)

    def draw(self, context: Tensor, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        """Each token where its number of `noise` (N, ..., K) falls in the cumulated probabilities."""

        def invert(k: int, logits: Tensor) -> Tensor:
            reached = logits.float().softmax(-1).cumsum(-1)  # (..., V), the same for all draws, where k = 0
            return _first_above(reached, noise[..., k] * reached[..., -1])

        tokens = self.chain.unroll(self.chain.states(context), invert)
        return self.points(torch.stack(tokens, dim=-1)).to(context.dtype)

    def compute_loss(self, context: Tensor, target: PatchTarget, generator: torch.Generator | None) -> Tensor:
        """Cross-entropy, nats a token, of the target patches' tokens, further ones too: one pass, whatever N."""
        tokens = target.draw_tokens(target.num_patches)
        contexts = context.expand(len(tokens), *context.shape)
        # In rows: bitsandbytes' 8-bit layers refuse more axes than four.
        logits = self.chain.teacher_forced(contexts.flatten(0, -2), tokens.flatten(0, -2))
        losses = F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten(), reduction="none")
        return losses.view(tokens.shape).mean(-1).mean(0)


def _first_above(reached: Tensor, chance: Tensor) -> Tensor:
    """Index of the first of the ascending values (..., V) or (N, ..., V) that is above each of (N, ...)."""
    if reached.dim() == chance.dim():  # the same values for all N
        index = torch.searchsorted(reached, chance.movedim(0, -1).contiguous(), right=True).movedim(-1, 0)
    else:
        index = torch.searchsorted(reached, chance.unsqueeze(-1), right=True).squeeze(-1)
    return index.clamp(max=reached.shape[-1] - 1)
