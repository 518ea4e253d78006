"""The autoregressive patch head: samples a patch's tokens one by one, and returns a latent that decodes to them.

The paper's heads sample a latent vector, which the decoder maps to tokens. This one, not in the paper, samples the
tokens first, p(x_k | hidden state, x_<k), by a small network with an output matrix (whose cost the paper's heads
avoid), and returns the sum of their latent token embeddings. It is a baseline for the paper's heads, and the better
head for small vocabularies. Its loss is the tokens' cross-entropy.

Axes: N samples per patch, A target patches, D hidden size, Z latent size, K tokens per patch, V vocabulary. "..."
stands for any leading axes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_calm import CALMConfig
from .generation_calm_algorithms import NO_TRUNCATION, Truncation, truncated
from .heads_calm import GenerativeHead, PatchTarget
from .modeling_calm_autoencoder import CALMAutoencoder

BEAM_WIDTH = 32  # prefixes kept in the search for the most probable patch
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

    def logits(self, state: Tensor) -> Tensor:
        """Returns a position's logits (..., V) from its state plus the embeddings of the tokens before, (..., D)."""
        return self.lm_head(self.norm_out(state + self.mlp(self.norm_in(state))))

    def teacher_forced(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Returns logits (..., K, V) given hidden states (..., D) and the patch's own tokens (..., K)."""
        before = [embed(tokens[..., k]) for k, embed in enumerate(self.embeddings)]
        state = self.context_proj(context).unflatten(-1, (self.patch_size, -1))
        if before:
            state = state + F.pad(torch.stack(before, dim=-2).cumsum(-2), (0, 0, 1, 0))
        return self.logits(state)

    def propose(
        self,
        context: Tensor,
        uniform: Tensor,
        temperature: Tensor | float = 1.0,
        truncation: Truncation = NO_TRUNCATION,
    ) -> tuple[Tensor, Tensor | float]:
        """Samples tokens one by one, each at this temperature; rejection makes the patches exact samples of P^(1/T).

        A token is sampled from p_k^(1/T) / Z_k, where Z_k depends on the tokens before. So a patch is a sample of
        P^(1/T) / Z if accepted with probability ∝ Z_2 … Z_K. A truncation acts on each p_k^(1/T) / Z_k, as upstream's.

        Args:
            context (`(..., D)`): hidden states.
            uniform (`(N, ..., K)`): random numbers on [0, 1), float32.
            temperature: T in (0, 2], or (...) of them in (0, 1].
            truncation: which tokens may be sampled.

        Returns:
            ids (N, ..., K), and the log of the acceptance probability, at most 0, (N, ...) or one for all, float32.
        """
        is_one, log_bound = False, 0.0
        if isinstance(temperature, Tensor):
            temperature = temperature.unsqueeze(-1)
        else:  # above 1, the sum of V equal probabilities is the largest
            is_one, log_bound = temperature == 1, max(0.0, 1 - 1 / temperature) * math.log(self.lm_head.out_features)
        states = self.context_proj(context).unflatten(-1, (self.patch_size, -1))  # (..., K, D)
        tokens, before, log_acceptance = [], 0.0, 0.0
        for k in range(self.patch_size):
            logits = self.logits(states[..., k, :] + before).float()  # (..., V), at k = 0 the same for all samples
            if not is_one:
                logits = logits.log_softmax(-1) / temperature
                log_acceptance = log_acceptance + (logits.logsumexp(-1) - log_bound if k > 0 else 0)
            probability = logits.softmax(-1)
            if truncation != NO_TRUNCATION:
                probability = truncated(probability, truncation)
                log_acceptance = log_acceptance + (probability.sum(-1).log() if k > 0 else 0)
            cumulative = probability.cumsum(-1)
            tokens.append(_first_above(cumulative, uniform[..., k] * cumulative[..., -1]))
            if k < self.patch_size - 1:
                before = before + self.embeddings[k](tokens[-1])
        return torch.stack(tokens, dim=-1), log_acceptance

    def most_probable(self, context: Tensor) -> Tensor:
        """Returns the most probable patch (..., K) for each hidden state (..., D), found by beam search.

        It is the mode unless a prefix beyond the `BEAM_WIDTH` most probable ones is more probable than the patch.
        """
        states = self.context_proj(context).unflatten(-1, (self.patch_size, -1))[None]  # beams first, at first one
        total = states.new_zeros(states.shape[:-2], dtype=torch.float32)
        prefixes = torch.zeros(*total.shape, 0, dtype=torch.long, device=context.device)
        for k in range(self.patch_size):
            state = states[..., k, :]
            for embed, ids in zip(self.embeddings, prefixes.unbind(-1), strict=False):
                state = state + embed(ids)
            logits = self.logits(state).float()
            extended = (total.unsqueeze(-1) + logits.log_softmax(-1)).movedim(0, -2)  # (..., beams, V)
            best = extended.flatten(-2).topk(min(BEAM_WIDTH, extended.shape[-1]), dim=-1)
            total, index = best.values.movedim(-1, 0), best.indices.movedim(-1, 0)
            beam, token = (index // extended.shape[-1]).unsqueeze(-1), (index % extended.shape[-1]).unsqueeze(-1)
            prefixes = torch.cat([prefixes.gather(0, beam.expand(*beam.shape[:-1], k)), token], dim=-1)
        return prefixes[0]


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

    knows_probabilities = True

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.patch_size = config.patch_size
        self.chain = TokenChain(config.hidden_size, config.vocab_size, config.patch_size)
        codes = torch.zeros(config.patch_size, config.vocab_size, config.latent_size)
        # No buffer: it would stay in memory when the module is offloaded, and check_weights would not miss it.
        self.codes = nn.Parameter(codes, requires_grad=False)

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
        return self.latents(self.chain.propose(context, noise)[0]).to(context.dtype)

    def propose(
        self,
        context: Tensor,
        num_samples: int,
        temperature: float,
        truncation: Truncation = NO_TRUNCATION,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples patches at a temperature, to be accepted with a probability; see `TokenChain.propose`.

        Returns latent vectors (N, ..., Z), and the log of the acceptance probability (N, ...). At T = 0 it is the most
        probable patch, once. The other arguments are those of `sample`.
        """

        def compute(context: Tensor) -> tuple[Tensor, Tensor]:
            if temperature == 0:
                tokens, log_acceptance = self.chain.most_probable(context)[None], 0.0
            else:
                shape = num_samples, *context.shape[:-1]
                uniform = self.initial_noise(shape, context, generator) if noise is None else noise
                tokens, log_acceptance = self.chain.propose(context, uniform, temperature, truncation)
            zeros = torch.zeros(tokens.shape[:-1], device=tokens.device)
            return self.latents(tokens).to(context.dtype), zeros + log_acceptance

        return self(context, compute)

    def latents(self, tokens: Tensor) -> Tensor:
        """Returns the latent vectors (..., Z) of patches (..., K)."""
        positions = torch.arange(self.patch_size, device=tokens.device)
        return self.codes[positions, tokens].sum(-2)

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
