"""The autoregressive patch head: samples a patch's tokens one by one.

The paper's heads sample a latent vector, which the decoder maps to tokens. This one, not in the paper, samples the
tokens themselves, p(x_k | hidden state, x_<k), by a small network with an output matrix (whose cost the paper's heads
avoid). So it knows their probabilities. It is a baseline for the paper's heads, and the better head for small
vocabularies. Its loss is the tokens' cross-entropy.

Axes: N samples per patch, A target patches, R contexts, G distinct beginnings of patches, D hidden size, K tokens per
patch, V vocabulary. "..." stands for any leading axes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_calm import CALMConfig
from .generation_calm_algorithms import NO_TRUNCATION, Truncation, truncated
from .heads_calm import GenerativeHead, PatchTarget
from .kernels_calm import arange

BELOW_1 = 1 - 2**-20  # keeps thresholds below the last sum in float32, so no token of probability 0 is sampled
BEAM_WIDTH = 32  # prefixes kept in the search for the most probable patch


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
        return self.lm_head(self.features(state))

    def features(self, state: Tensor) -> Tensor:
        """Returns what the output matrix takes, (..., D), from the same states."""
        return self.norm_out(state + self.mlp(self.norm_in(state)))

    def teacher_forced(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Returns logits (..., K, V) given hidden states (..., D) and the patch's own tokens (..., K)."""
        return self.lm_head(self.teacher_forced_features(context, tokens))

    def teacher_forced_features(self, context: Tensor, tokens: Tensor) -> Tensor:
        before = [embed(tokens[..., k]) for k, embed in enumerate(self.embeddings)]
        state = self.context_proj(context).unflatten(-1, (self.patch_size, -1))
        if before:
            state = state + F.pad(torch.stack(before, dim=-2).cumsum(-2), (0, 0, 1, 0))
        return self.features(state)

    def propose(
        self,
        context: Tensor,
        uniform: Tensor,
        temperature: Tensor | float = 1.0,
        truncation: Truncation = NO_TRUNCATION,
        forbidden_KV: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples tokens one by one, each at this temperature; rejection makes the patches exact samples of P^(1/T).

        A token is sampled from p_k^(1/T) / Z_k, where Z_k depends on the tokens before. So a patch is a sample of
        P^(1/T) / Z if accepted with probability ∝ Z_2 … Z_K. A truncation acts on each p_k^(1/T) / Z_k, as upstream's.

        Args:
            context (`(..., D)`): hidden states; flattened, of R contexts.
            uniform (`(N, ..., K)`): random numbers on [0, 1), float32; may have one context for all.
            temperature: T in (0, 2], or (R,) of them in (0, 1].
            truncation: which tokens may be sampled.
            forbidden_KV (`(K, V)` bool, *optional*): tokens that are forbidden at a position.

        Returns:
            ids (N, ..., K), and the log of the acceptance probability, at most 0, (N, ...), float32.
        """
        shape, context = (len(uniform), *context.shape[:-1]), context.reshape(-1, context.shape[-1])
        uniform = uniform.expand(*shape, -1).reshape(len(uniform), -1, self.patch_size)
        is_plain, log_bound = False, 0.0
        if not isinstance(temperature, Tensor):  # above 1, the sum of V equal probabilities is the largest
            is_plain = temperature == 1 and truncation == NO_TRUNCATION
            log_bound = max(0.0, 1 - 1 / temperature) * math.log(self.lm_head.out_features)
        row_G = arange(len(context), context.device)  # the context of each beginning
        states_RKD = self.context_proj(context).unflatten(-1, (self.patch_size, -1))
        before_GD, group_NR = torch.zeros_like(context), row_G.expand(uniform.shape[:-1])
        log_acceptance_NR, tokens = torch.zeros_like(uniform[..., 0]), []
        for k in range(self.patch_size):
            logits_GV = self.logits(states_RKD[row_G, k] + before_GD).float()
            if forbidden_KV is not None:
                logits_GV = logits_GV.masked_fill(forbidden_KV[k], -torch.inf)
            exponent = 1 / (temperature[row_G, None] if isinstance(temperature, Tensor) else temperature)
            if not is_plain:
                logits_GV = logits_GV.log_softmax(-1) * exponent
            probability_GV = logits_GV.softmax(-1)  # p^(1/T) / Z, so that any token tells Z
            if truncation != NO_TRUNCATION:
                probability_GV = truncated(probability_GV, truncation)
            cumulative_NRV = probability_GV.cumsum(-1).index_select(0, group_NR.flatten()).view(*group_NR.shape, -1)
            thresholds_NR1 = uniform[..., k, None] * (BELOW_1 * cumulative_NRV[..., -1:])
            index_NR1 = torch.searchsorted(cumulative_NRV, thresholds_NR1, right=True)
            tokens.append(index_NR1.squeeze(-1).clamp(max=cumulative_NRV.shape[-1] - 1))  # compiled sums may differ
            if k > 0 and not is_plain:
                chosen = group_NR, tokens[-1]
                log_sum_NR = logits_GV[chosen] - probability_GV[chosen].log() + cumulative_NRV[..., -1].log()
                log_acceptance_NR = log_acceptance_NR + log_sum_NR - log_bound
            if k < self.patch_size - 1:
                group_NR, parent_G, token_G = _split_groups(group_NR, tokens[-1], self.lm_head.out_features)
                row_G, before_GD = row_G[parent_G], before_GD[parent_G] + self.embeddings[k](token_G)
        return torch.stack(tokens, dim=-1).view(*shape, -1), log_acceptance_NR.view(shape)

    def most_probable(self, context: Tensor, forbidden_KV: Tensor | None = None) -> Tensor:
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
            if forbidden_KV is not None:
                logits = logits.masked_fill(forbidden_KV[k], -torch.inf)
            extended = (total.unsqueeze(-1) + logits.log_softmax(-1)).movedim(0, -2)  # (..., beams, V)
            best = extended.flatten(-2).topk(min(BEAM_WIDTH, extended.shape[-1]), dim=-1)
            total, index = best.values.movedim(-1, 0), best.indices.movedim(-1, 0)
            beam, token = (index // extended.shape[-1]).unsqueeze(-1), (index % extended.shape[-1]).unsqueeze(-1)
            prefixes = torch.cat([prefixes.gather(0, beam.expand(*beam.shape[:-1], k)), token], dim=-1)
        return prefixes[0]


class TokenChainHead(GenerativeHead, head_type="token_chain"):
    """Samples the patch's tokens; see the top of this file."""

    samples_tokens = True

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        self.patch_size = self.network_calls = config.patch_size
        self.chain = TokenChain(config.hidden_size, config.vocab_size, config.patch_size)

    def initial_noise(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Returns uniform numbers on [0, 1), one per token, in float32: bfloat16 has too few values."""
        uniform = torch.empty((*shape, self.patch_size), dtype=torch.float32, device=like.device)
        return uniform.uniform_(generator=generator)

    def from_noise(self, noise: Tensor, context: Tensor, generator: torch.Generator | None) -> Tensor:
        """Samples token ids (N, ..., K), each by the inverse of its cumulative distribution at `noise`."""
        return self.chain.propose(context, noise)[0]

    def propose(
        self,
        context: Tensor,
        num_samples: int,
        temperature: float,
        truncation: Truncation = NO_TRUNCATION,
        forbidden_KV: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples patches at a temperature, to be accepted with a probability; see `TokenChain.propose`.

        Returns token ids (N, ..., K), and the log of the acceptance probability (N, ...). At T = 0 it is the most
        probable patch, once. The other arguments are those of `sample`.
        """

        def compute(context: Tensor) -> tuple[Tensor, Tensor]:
            if temperature == 0:
                tokens = self.chain.most_probable(context, forbidden_KV)[None]
                return tokens, torch.zeros(tokens.shape[:-1], device=tokens.device)
            uniform = noise
            if uniform is None:
                uniform = self.initial_noise((num_samples, *context.shape[:-1]), context, generator)
            return self.chain.propose(context, uniform, temperature, truncation, forbidden_KV)

        return self(context, compute)

    def token_logits(self, context: Tensor, tokens: Tensor) -> Tensor:
        return self(context, self.chain.teacher_forced, tokens)

    def compute_loss(self, context: Tensor, target: PatchTarget, generator: torch.Generator | None) -> Tensor:
        """Returns the cross-entropy of the target patches' tokens, nats per token: one pass, whatever N."""
        tokens = target.all_tokens
        contexts = context.expand(len(tokens), *context.shape)
        # In rows: bitsandbytes' 8-bit layers refuse more axes than four.
        logits = self.chain.teacher_forced(contexts.flatten(0, -2), tokens.flatten(0, -2))
        losses = F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten(), reduction="none")
        return losses.view(tokens.shape).mean(-1).mean(0)


def _split_groups(group_NR: Tensor, tokens_NR: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups samples by their patches' beginnings, given the groups without the last token and that token.

    Returns each sample's group (N, R), and each group's parent and last token, (G,). On a CPU equal beginnings share a
    group, and the network is run once for all; elsewhere, where the host would wait for G, each sample is its own.
    """
    if len(tokens_NR) > 1 and tokens_NR.device.type == "cpu" and not torch.compiler.is_compiling():
        keys_G, group_NR = (group_NR * vocab_size + tokens_NR).unique(return_inverse=True)
        return group_NR, keys_G // vocab_size, keys_G % vocab_size
    own_NR = arange(tokens_NR.numel(), tokens_NR.device).view(tokens_NR.shape)
    return own_NR, group_NR.flatten(), tokens_NR.flatten()
