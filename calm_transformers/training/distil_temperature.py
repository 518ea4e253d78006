"""Distils temperature into a head: trained on samples of its teacher at every T of a range, one draw is a sample at T.

The backbone and the autoencoder stay as they are. At each position of the training text a temperature is drawn, the
teacher samples patches at it, and the head's own loss takes these as its targets, with the temperature as a condition.

Axes: B batch, L tokens, P patches, R contexts (positions of the text), M targets of a context, N samples of the
teacher, K tokens per patch, D hidden size.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from calm_transformers.model.generation_calm_algorithms import NO_WEIGHT, first_occurrences, occurrence_counts
from calm_transformers.model.heads_calm import GenerativeHead
from calm_transformers.model.heads_calm_token_chain import TokenChain
from calm_transformers.model.kernels_calm import arange, float64_device
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder
from calm_transformers.training.auxiliary import ExtraTargets, TrainedCALM, propose_in_chunks

NUM_HEAD_SAMPLES = 100  # N, of a teacher that knows no probabilities
NUM_PROPOSALS = 64  # N, of one that does
TemperatureTeacher = Callable[[Tensor, Tensor, int], Tensor]  # (R, D), temperatures (R,), M → ids (M, R, K)


class ChainTeacher(nn.Module):
    """Samples from a token chain (the MTP loss, or a token-chain head's) by importance resampling of its proposals."""

    def __init__(self, chain: TokenChain):
        super().__init__()
        self.chain = chain.requires_grad_(False)

    @torch.no_grad()
    def forward(self, context: Tensor, temperature: Tensor, num_targets: int) -> Tensor:
        tokens_NRK, log_weight_NR = propose_in_chunks(self.chain, context, NUM_PROPOSALS, temperature)
        return resample(tokens_NRK, log_weight_NR.softmax(0), num_targets)


class HeadTeacher(nn.Module):
    """Samples from any head by the batch rule (paper, Algorithm 2) on N samples of its own."""

    def __init__(self, head: GenerativeHead, autoencoder: CALMAutoencoder):
        super().__init__()
        self.head = head.requires_grad_(False)
        self._decode = partial(head.decode, autoencoder=autoencoder)  # no submodule: it is the model's

    @torch.no_grad()
    def forward(self, context: Tensor, temperature: Tensor, num_targets: int) -> Tensor:
        tokens_NRK = self._decode(self.head.sample(context, num_samples=NUM_HEAD_SAMPLES))
        weight_RN = weights_by_row(first_occurrences(tokens_NRK.transpose(0, 1)), temperature)
        return resample(tokens_NRK, weight_RN.T, num_targets)


def weights_by_row(first_RN: Tensor, temperature_R: Tensor) -> Tensor:
    """Returns `candidate_weights` (R, N) of rows that each have a temperature of their own, at most 1."""
    counts_RN, place = occurrence_counts(first_RN), float64_device(first_RN.device)
    count_RN, exponent_R1 = counts_RN.to(place, torch.float64), 1 / temperature_R.to(place, torch.float64)[:, None]
    log_weights_RN = torch.lgamma(count_RN + 1) - torch.lgamma(count_RN - exponent_R1 + 1)  # log C(count, exponent)
    too_few_RN = count_RN <= exponent_R1 - 1
    log_weights_RN = torch.where(too_few_RN, (count_RN - first_RN.shape[1]) * NO_WEIGHT, log_weights_RN)
    is_first_RN = first_RN == arange(first_RN.shape[1], first_RN.device)
    return log_weights_RN.to(first_RN.device, torch.float32).masked_fill(~is_first_RN, -math.inf).softmax(-1)


def resample(tokens_NRK: Tensor, weight_NR: Tensor, num_targets: int) -> Tensor:
    """Returns `num_targets` of each context's patches, drawn by weight with replacement, (M, R, K)."""
    index_MR = torch.multinomial(weight_NR.T, num_targets, replacement=True).T
    return tokens_NRK.gather(0, index_MR.unsqueeze(-1).expand(*index_MR.shape, tokens_NRK.shape[-1]))


class TemperatureDistillation(TrainedCALM):
    """A CALM and its teacher; `calm.head` alone is trained, and `calm` alone saved.

    Args:
        calm: the student, whose configuration has `distilled_temperature`.
        teacher: not trained.
        num_targets: M, patches that the teacher samples at each position.
    """

    def __init__(self, calm: CALMForCausalLM, teacher: nn.Module, num_targets: int):
        super().__init__(calm)
        self.teacher, self.num_targets = teacher, num_targets
        calm.model.requires_grad_(False)

    def forward(self, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs):
        """Returns the backbone's outputs, and the loss at the positions whose next patch `labels` (B, L) count."""
        with torch.no_grad():
            outputs = self.calm(use_cache=False, **inputs)
        if labels is not None:
            context_RD, target, is_counted_R = self.calm.patch_targets(outputs.last_hidden_state, labels)
            temperature_R = self.sample_temperatures(len(context_RD), context_RD.device)
            tokens_MRK = self.teacher(context_RD, temperature_R, self.num_targets)
            target = ExtraTargets(tokens_MRK[0], self.calm.autoencoder, tokens_MRK[1:])
            losses_R = self.calm.head.loss(context_RD, target, temperature=temperature_R)
            outputs["loss"] = self.calm.mean_over_items(losses_R, is_counted_R, num_items_in_batch)
        return outputs

    def sample_temperatures(self, num_contexts: int, device: torch.device) -> Tensor:
        """Samples temperatures (R,) whose logarithm is uniform between that of the lowest one and 0."""
        lowest = math.log(self.config.distilled_temperature or 1.0)
        return (lowest * torch.rand(num_contexts, device=device)).exp()
