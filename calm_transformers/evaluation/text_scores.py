"""Scores given texts patch by patch with a CALM: from samples, and by log-probabilities where its head knows them.

Axes: B texts, P patches, K tokens per patch, N samples per patch, S posterior samples, D hidden size, Z latent size, M
scored patches (m per chunk).
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.generic import ModelOutput

from calm_transformers.model.generation_calm_algorithms import first_occurrences, occurrence_counts
from calm_transformers.model.generation_calm_upstream import checked_ids
from calm_transformers.model.heads_calm import PatchTarget
from calm_transformers.model.kernels_calm import cpu_kernels

if TYPE_CHECKING:
    from calm_transformers.model.modeling_calm import CALMForCausalLM

SAMPLES_CHUNK_SIZE = {"cpu": 2**12, "other": 2**16}


@dataclass
class TextScores(ModelOutput):
    """Scores per patch, higher is better; 0 where `is_scored` is False.

    Args:
        energy (`(B, P)`): energy score of the model's latent vectors x against the text's own y,
            E‖x − x'‖^β − 2 E‖x − y‖^β (paper 3.3). Its unit depends on the autoencoder: it compares texts, not models.
            None of heads that sample tokens (`token_chain`).
        log_probability (`(B, P, K)`): of each token given those before it, in nats, of heads that sample tokens alone.
        brier (`(B, P, K)`): unbiased estimate of Brier-n, n = 1 … K first tokens of the patch, 2 P(y) − Σ P(x)²; at
            most 1. Also compares models with the same tokenizer and K.
        prefix_match_rate (`(B, P, K)`): fraction of samples whose first n tokens are the text's, an estimate of P(y).
        patches (`(B, P, K)`): token ids.
        is_scored (`(B, P)`): False for a text's first patch, which is not predicted, and for padding.
    """

    energy: Tensor | None = None
    log_probability: Tensor | None = None
    brier: Tensor | None = None
    prefix_match_rate: Tensor | None = None
    patches: Tensor | None = None
    is_scored: Tensor | None = None

    def means(self) -> dict[str, Tensor]:
        """Returns the means over each text's scored patches; NaN without any.

        They are "brier" (B, K), and "energy" (B,) or "log_probability" (B,), that of a patch.
        """
        assert self.is_scored is not None and self.brier is not None
        num_scored_B = self.is_scored.sum(-1)
        sums = {"energy": self.energy, "log_probability": self.log_probability}
        means = {name: value.flatten(1).sum(-1) / num_scored_B for name, value in sums.items() if value is not None}
        return means | {"brier": self.brier.sum(1) / num_scored_B[:, None]}


@torch.no_grad()
def score_texts(
    model: CALMForCausalLM,
    texts: str | list[str] | Tensor,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    num_samples: int = 100,
    generator: torch.Generator | None = None,
) -> TextScores:
    """Scores every patch of the texts: one forward pass, then `num_samples` samples of each next patch.

    Use it to find where a text surprises the model, to compare models on a text, and to rank continuations of equal
    length after the same prefix. Energy and Brier scores are no probabilities: the Brier scores of one short text are
    imprecise, as a patch that is never sampled scores about 0, and the energy score mostly reflects how predictable a
    text is.

    Args:
        model: the CALM.
        texts: one or several strings, or ids `(B, L)`. They are cut into patches like prompts; strings that spell a
            special token are tokenized as text, as in training.
        tokenizer: required for strings.
        attention_mask (`(B, L)`, *optional*): 0 at padding ids.
        num_samples: N, samples per patch, at least 2.
        generator: random generator of all samples.

    Raises:
        ValueError: invalid texts or ids, strings without a tokenizer, an empty text without a BOS token, fewer than 2
            samples, or from `check_weights`.
    """
    is_integer = isinstance(num_samples, numbers.Integral) and not isinstance(num_samples, bool)
    if not is_integer or num_samples < 2:
        raise ValueError(f"num_samples={num_samples}: must be an integer of at least 2, as scores compare pairs.")
    if not isinstance(texts, Tensor):
        texts, attention_mask = _tokenized(texts, tokenizer)
    model.check_weights()
    ids_BL = checked_ids(texts, attention_mask, model.config.vocab_size, "score_texts()").to(model.device)
    mask_BL = torch.ones_like(ids_BL) if attention_mask is None else attention_mask.to(ids_BL.device).long()
    bos_token = None if model.generation_config is None else model.generation_config.bos_token_id
    if bos_token is None and not mask_BL.any(-1).all():
        raise ValueError("score_texts() got an empty text, and the model has no bos_token_id to start it.")
    inputs = model.pack_for_generation(ids_BL, mask_BL, bos_token=bos_token)
    patch_size = model.config.patch_size
    patches_BPK = inputs["input_ids"].unflatten(1, (-1, patch_size))
    mask_BP = inputs["attention_mask"].bool()
    is_scored_BP = mask_BP & (mask_BP.cumsum(-1) > 1)
    with cpu_kernels(mask_BP.numel(), model.config.hidden_size):
        hidden_BPD = model(**inputs, use_cache=False).last_hidden_state
    context_MD, target_MK = hidden_BPD[:, :-1][is_scored_BP[:, 1:]], patches_BPK[is_scored_BP]

    chunk_size = max(1, SAMPLES_CHUNK_SIZE["cpu" if ids_BL.device.type == "cpu" else "other"] // num_samples)
    chunks = zip(context_MD.split(chunk_size), target_MK.split(chunk_size), strict=True)  # one, empty, of no patches
    scores = [_score_patches(model, context, target, num_samples, generator) for context, target in chunks]
    outputs = {}
    for name in scores[0]:
        scores_M = torch.cat([chunk[name] for chunk in scores])
        outputs[name] = scores_M.new_zeros(*is_scored_BP.shape, *scores_M.shape[1:])
        outputs[name][is_scored_BP] = scores_M
    return TextScores(**outputs, patches=patches_BPK, is_scored=is_scored_BP)


def _tokenized(texts: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Tokenizes texts, pads them on the right with id 0, and returns ids and attention mask, (B, L) each."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("score_texts() takes a text, a non-empty list of texts, or ids as a tensor (batch, length).")
    if not callable(tokenizer):
        raise ValueError("score_texts() got text: pass tokenizer=..., or ids as a tensor.")
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"score_texts() got {len(texts)} texts; text {number} is invalid at character {error.start}: "
                "a lone surrogate."
            ) from None
    batch: Any = tokenizer(list(texts), split_special_tokens=True)  # as in training
    rows = [torch.tensor(ids, dtype=torch.long) for ids in batch["input_ids"]]
    masks = [torch.ones_like(ids_L) for ids_L in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)


def _score_patches(
    model: CALMForCausalLM, context_mD: Tensor, target_mK: Tensor, num_samples: int, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Returns the scores of patches given hidden states, named as in `TextScores`, (m,) or (m, K)."""
    with cpu_kernels(num_samples * len(context_mD), model.config.hidden_size):
        samples_Nm = model.head.sample(context_mD, num_samples=num_samples, generator=generator)
        tokens_mNK = model.head.decode(samples_Nm, model.autoencoder).movedim(0, 1)
    if model.head.samples_tokens:
        log_probs_mKV = model.head.token_logits(context_mD, target_mK).float().log_softmax(-1)
        scores = {"log_probability": log_probs_mKV.gather(-1, target_mK[..., None])[..., 0]}
    else:
        target = PatchTarget(target_mK, model.autoencoder)
        targets_SmZ = target.sample_latents(model.config.num_posterior_samples, generator)
        scores = {"energy": _energy(samples_Nm.float(), targets_SmZ.float(), model.config.beta)}
    match_rate_mK = (tokens_mNK == target_mK[:, None]).cumprod(-1).float().mean(1)
    firsts = (first_occurrences(tokens_mNK[..., : n + 1]) for n in range(tokens_mNK.shape[-1]))
    counts_mNK = torch.stack([occurrence_counts(first_mN) for first_mN in firsts], dim=-1)
    collisions_mK = (counts_mNK - 1).float().mean(1) / (num_samples - 1)
    return scores | {"brier": 2 * match_rate_mK - collisions_mK, "prefix_match_rate": match_rate_mK}


def _energy(samples_NmZ: Tensor, targets_SmZ: Tensor, beta: float) -> Tensor:
    """Returns energy scores (m,) as `heads_calm_energy.energy_score`, without storing (N, N, m, Z) differences."""
    samples_mNZ, targets_mSZ = samples_NmZ.transpose(0, 1), targets_SmZ.transpose(0, 1)
    num_samples, mode = len(samples_NmZ), "donot_use_mm_for_euclid_dist"  # which is exact
    repulsion_mNN = torch.cdist(samples_mNZ, samples_mNZ, compute_mode=mode).pow_(beta)
    attraction_mNS = torch.cdist(samples_mNZ, targets_mSZ, compute_mode=mode).pow_(beta)
    return repulsion_mNN.sum((1, 2)) / (num_samples * (num_samples - 1)) - 2 * attraction_mNS.mean((1, 2))
