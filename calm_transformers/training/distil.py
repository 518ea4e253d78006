"""Distils a frozen Llama into the MTP loss: its next-token probabilities are soft targets beside the text's tokens.

Axes: B batch, L tokens, P patches (L = P·K), K tokens per patch, V vocabulary, U tokens that the teacher knows, U ≤ V.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM


@dataclass
class SoftTargets:
    """A teacher's token probabilities for a batch, and their weight in the loss."""

    probabilities: Tensor  # (…, U), of the first U tokens of the vocabulary; all others have probability 0
    weight: float  # the labels' weight is 1 − this

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns (1 − weight) · −log q(label) + weight · −Σ p log q in nats; 0 where the label is −100.

        `logits` (…, V) define q. Where the teacher doesn't know the label, weight is 0.
        """
        log_q = logits.log_softmax(-1)
        hard = F.nll_loss(log_q.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
        num_known = self.probabilities.shape[-1]
        soft = -(self.probabilities * log_q[..., :num_known]).sum(-1)
        weight = self.weight * ((labels >= 0) & (labels < num_known))
        return (1 - weight) * hard + weight * soft


class Teacher:
    """A frozen Llama that is run on the same blocks; no `nn.Module`, so that it is not saved, trained or wrapped."""

    def __init__(self, llama: LlamaForCausalLM, vocab_size: int, patch_size: int, weight: float):
        self.llama = llama.eval()
        self.num_known = min(vocab_size, llama.config.vocab_size)
        self.vocab_size, self.patch_size, self.weight = vocab_size, patch_size, weight

    @torch.no_grad()
    def soft_targets(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SoftTargets:
        """Returns the probabilities `(B, P − 1, K, U)` of all patches but the first, aligned with `target_patches`.

        Args:
            input_ids (`(B, L)`): the model's; tokens that the teacher doesn't know are masked.
            attention_mask (`(B, L)`): the model's.
        """
        if self.llama.device != input_ids.device:  # Trainer moves only the model
            self.llama.to(input_ids.device)  # pyright: ignore[reportArgumentType]  # upstream's wrapper loses `self`
        if self.num_known < self.vocab_size:
            is_known = input_ids < self.num_known
            attention_mask = is_known.long() if attention_mask is None else attention_mask * is_known
            input_ids = input_ids.where(is_known, 0)
        outputs = self.llama(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        # The logits at a token predict the next one; nothing predicts the first patch.
        logits = outputs.logits[:, self.patch_size - 1 : -1, : self.num_known]
        return SoftTargets(logits.float().softmax(-1).unflatten(1, (-1, self.patch_size)), self.weight)
