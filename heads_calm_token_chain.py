"""The autoregressive patch head: samples a patch's tokens one by one, and returns a latent that decodes to them.

The paper's heads sample a latent vector, which the decoder maps to tokens. This one, not in the paper, samples the
tokens first, p(x_k | hidden state, x_<k), by a small network with an output matrix (whose cost the paper's heads
avoid), and returns the sum of their latent token embeddings. It is a baseline for the paper's heads, and the better
head for small vocabularies. Its loss is the tokens' cross-entropy.

Axes: N samples per patch, A target patches, D hidden size, Z latent size, K tokens per patch, V vocabulary. "..."
stands for any leading axes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_calm import CALMConfig, require
from .heads_calm import GenerativeHead, PatchTarget
from .modeling_calm_autoencoder import CALMAutoencoder

NUM_CONTEXTS = 64  # random patches over which a token's latent is averaged
PATCHES_CHUNK_SIZE = 8192  # patches encoded at once


class TokenChain(nn.Module):
    """Predicts a patch's tokens one by one, p(x_k | hidden, x_<k), by the same small MLP at every position."""

    def __init__(self, hidden_size: int, vocab_size: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.context_proj = nn.Linear(hidden_size, patch_size * hidden_size)
        self.embeddings = nn.ModuleList(nn.Embedding(vocab_size, hidden_size) for _ in range(patch_size - 1))
        self.norm_in, self.norm_out = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        widen, narrow = nn.Linear(hidden_size, 2 * hidden_size), nn.Linear(2 * hidden_size, hidden_size)
        self.mlp = nn.Sequential(widen, nn.SiLU(), narrow)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def states(self, context: Tensor) -> Tensor:
        """Projects hidden states (..., D) to a state for each position, (..., K, D)."""
        return self.context_proj(context).unflatten(-1, (self.patch_size, -1))

    def logits(self, state: Tensor) -> Tensor:
        """Returns a position's logits (..., V) from its state plus the embeddings of the tokens before, (..., D)."""
        return self.lm_head(self.norm_out(state + self.mlp(self.norm_in(state))))

    def teacher_forced(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Returns logits (..., K, V) given hidden states (..., D) and the patch's own tokens (..., K)."""
        before = [embed(tokens[..., k]) for k, embed in enumerate(self.embeddings)]
        state = self.states(context)
        if before:
            state = state + F.pad(torch.stack(before, dim=-2).cumsum(-2), (0, 0, 1, 0))
        return self.logits(state)

    def unroll(self, state: Tensor, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Returns ids (..., K) that `choose` picks at k = 0, 1, … from logits (..., V), given `states` (..., K, D)."""
        chosen, before = [], 0
        for k in range(self.patch_size):
            chosen.append(choose(k, self.logits(state[..., k, :] + before)))
            if k < self.patch_size - 1:
                before = before + self.embeddings[k](chosen[-1])
        return torch.stack(chosen, dim=-1)


@torch.no_grad()
def latent_token_embeddings(autoencoder: CALMAutoencoder, num_contexts: int = NUM_CONTEXTS) -> Tensor:
    """Returns the latent embedding of every token at every position of a patch, (K, V, Z).

    It is the mean latent of random patches with the token there, always the same `num_contexts`, less what the other
    positions add. If latents are nearly additive in the tokens, a patch's embeddings sum to about its posterior mean.
    """
    config, device = autoencoder.config, autoencoder.device
    K, V, Z = config.patch_size, config.vocab_size, config.latent_size
    contexts = torch.randint(V, (num_contexts, K), generator=torch.Generator().manual_seed(0)).to(device)
    codes = torch.empty(K, V, Z, device=device)
    for k in range(K):
        for tokens in torch.arange(V, device=device).split(max(1, PATCHES_CHUNK_SIZE // num_contexts)):
            patches = contexts.repeat(len(tokens), 1, 1)
            patches[:, :, k] = tokens[:, None]
            mean = autoencoder.encode(patches.view(1, -1))[0][0].float()
            codes[k, tokens] = mean.view(len(tokens), num_contexts, Z).mean(1)
    overall = autoencoder.encode(contexts.view(1, -1))[0][0].float().mean(0)
    return codes - overall * (K - 1) / K  # summed over the positions, what the contexts add is counted once


class TokenChainHead(GenerativeHead, head_type="token_chain"):
    """Samples the patch's tokens and returns the sum of their latent token embeddings; see the top of this file.

    The embeddings, `codes` (K, V, Z) in checkpoints, come from the autoencoder, by `fit`, and aren't trained.
    """

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.patch_size = config.patch_size
        self.chain = TokenChain(config.hidden_size, config.vocab_size, config.patch_size)
        codes = torch.zeros(config.patch_size, config.vocab_size, config.latent_size)
        # No buffer: it would stay in memory when the module is offloaded, and check_weights would not miss it.
        self.codes = nn.Parameter(codes, requires_grad=False)

    @classmethod
    def check(cls, config: CALMConfig) -> None:
        super().check(config)
        context = config.autoencoder_config.encoder_context
        require(context == 0, f"encoder_context={context}: latent token embeddings are of patches without context.")

    def train(self, mode: bool = True):
        """As in torch, with frozen codes: `from_pretrained` creates parameters anew and calls this last."""
        self.codes.requires_grad_(False)
        return super().train(mode)

    @property
    def is_fitted(self) -> bool:
        return bool(self.codes.any())

    @torch.no_grad()
    def fit(self, autoencoder: CALMAutoencoder) -> None:
        self.codes.copy_(latent_token_embeddings(autoencoder))

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Sets the codes to zero, by which `is_fitted` knows that `fit` has not been called."""
        nn.init.zeros_(self.codes)

    @property
    def network_calls(self) -> int:
        return self.patch_size

    def initial_noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Returns uniform numbers on [0, 1), one per token, in float32: bfloat16 has too few values."""
        uniform = torch.empty((*shape, self.patch_size), dtype=torch.float32, device=like.device)
        return uniform.uniform_(generator=generator)

    def from_noise(self, noise: Tensor, context: Tensor, generator: torch.Generator | None) -> Tensor:
        """Samples each token by the inverse of its cumulative distribution at `noise` (N, ..., K)."""

        def invert(k: int, logits: Tensor) -> Tensor:
            cumulative = logits.float().softmax(-1).cumsum(-1)  # (..., V), at k = 0 the same for all samples
            return _first_above(cumulative, noise[..., k] * cumulative[..., -1])

        tokens = self.chain.unroll(self.chain.states(context), invert)
        positions = torch.arange(self.patch_size, device=tokens.device)
        return self.codes[positions, tokens].sum(-2).to(context.dtype)

    def compute_loss(self, context: Tensor, target: PatchTarget, generator: torch.Generator | None) -> Tensor:
        """Returns the cross-entropy of the target patches' tokens, nats per token: one pass, whatever N."""
        tokens = target.all_tokens
        contexts = context.expand(len(tokens), *context.shape)
        # In rows: bitsandbytes' 8-bit layers refuse more axes than four.
        logits = self.chain.teacher_forced(contexts.flatten(0, -2), tokens.flatten(0, -2))
        losses = F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten(), reduction="none")
        return losses.view(tokens.shape).mean(-1).mean(0)


def _first_above(ascending: Tensor, values: Tensor) -> Tensor:
    """Returns the index (N, ...) of the first ascending number, (..., V) or (N, ..., V), above each value (N, ...)."""
    if ascending.dim() == values.dim():  # the same for all N
        index = torch.searchsorted(ascending, values.movedim(0, -1).contiguous(), right=True).movedim(-1, 0)
    else:
        index = torch.searchsorted(ascending, values.unsqueeze(-1), right=True).squeeze(-1)
    return index.clamp(max=ascending.shape[-1] - 1)
