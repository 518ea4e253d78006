"""A Llama teaches the multi-token loss: its probabilities of each token given the true ones before take the place of
the text's own token, or share it.

Axes: B batch, L tokens, P patches (L = P·K), K tokens per patch, V vocabulary, U what the teacher knows of it, U ≤ V.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM


@dataclass
class Lesson:
    """What a teacher expects of the tokens of a batch."""

    probabilities: Tensor  # of the tokens that it knows, the vocabulary's first, (…, U); of all others 0
    share: float  # in the loss; the rest is the labels'

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(1 − share) · −log q(label) + share · −Σ p log q, nats; 0 where the label is −100.

        `logits` (…, V) are of q. A label that the teacher doesn't know counts alone.
        """
        log_q = logits.log_softmax(-1)
        hard = F.nll_loss(log_q.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
        num_known = self.probabilities.shape[-1]
        soft = -(self.probabilities * log_q[..., :num_known]).sum(-1)
        share = self.share * ((labels >= 0) & (labels < num_known))
        return (1 - share) * hard + share * soft


class Teacher:
    """A frozen Llama that reads the same blocks. No module: nothing saves, trains or wraps it with the model."""

    def __init__(self, llama: LlamaForCausalLM, vocab_size: int, patch_size: int, share: float):
        self.llama = llama.eval()
        self.num_known = min(vocab_size, llama.config.vocab_size)
        self.vocab_size, self.patch_size, self.share = vocab_size, patch_size, share

    @torch.no_grad()
    def lesson(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Lesson:
        """The probabilities of each patch but the first, `(B, P − 1, K, U)`, as `target_patches` has the labels.

        Args:
            input_ids (`(B, L)`): the model's; tokens that the teacher doesn't know are hidden from it.
            attention_mask (`(B, L)`): the model's.
        """
        if self.llama.device != input_ids.device:  # Trainer moves only what is in the model
            self.llama.to(input_ids.device)  # pyright: ignore[reportArgumentType]  # upstream's wrapper loses `self`
        if self.num_known < self.vocab_size:
            is_known = input_ids < self.num_known
            attention_mask = is_known.long() if attention_mask is None else attention_mask * is_known
            input_ids = input_ids.where(is_known, 0)
        outputs = self.llama(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        # The logits at a token are of the one behind it.
        logits = outputs.logits[:, self.patch_size - 1 : -1, : self.num_known]
        return Lesson(logits.float().softmax(-1).unflatten(1, (-1, self.patch_size)), self.share)
