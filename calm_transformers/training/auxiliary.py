"""A training-only loss beside the head's: it shapes the backbone and is left behind at export.

Axes: B batch, L tokens, P patches (L = P·K), K tokens per patch, D hidden size, V vocabulary.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_transformers.model.heads_calm_token_chain import TokenChain
from calm_transformers.model.modeling_calm import CALMForCausalLM, target_patches
from calm_transformers.training.distil import Lesson, Teacher

AUXILIARY_FILE = "auxiliary.safetensors"  # beside a checkpoint's weights


class MultiTokenLoss(TokenChain):
    """Cross-entropy of the next patch's K tokens given the hidden state and the patch's tokens before.

    A small autoregressive model within the patch, p(x_k | hidden, x_<k): it teaches the backbone the joint law of the
    patch, which is what the generative head has to draw from.
    """

    def __init__(self, hidden_size: int, vocab_size: int, patch_size: int):
        super().__init__(hidden_size, vocab_size, patch_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)  # as Llama's

    def forward(
        self,
        hidden_BPD: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """Mean nats per counted token, or their sum / `num_items_in_batch`.

        Args:
            hidden_BPD: hidden states; the one at patch p predicts patch p + 1.
            labels (`(B, L)`): the ids at the same positions as the hidden states' patches; −100 is left out.
            num_items_in_batch: number of counted labels in the whole accumulated batch.
            lesson: what a teacher expects of the same tokens.
        """
        labels_BPK = target_patches(labels, self.patch_size)
        logits = self.teacher_forced(hidden_BPD[:, :-1], labels_BPK.clamp(min=0)).float()
        if lesson is None:
            total = F.cross_entropy(logits.flatten(0, 2), labels_BPK.flatten(), reduction="sum")
        else:
            total = lesson.cross_entropy(logits, labels_BPK).sum()
        count = (labels_BPK != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / count

    @torch.no_grad()
    def draw(self, hidden: Tensor, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Patches by this law: hidden states (..., D) → ids (A, ..., K)."""

        def draw(_: int, logits: Tensor) -> Tensor:
            # The largest of logits with Gumbel noise is a draw; unlike multinomial it takes any number of rows.
            gumbel = -torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator).log()
            return (logits.float() + gumbel).argmax(-1)

        states = self.states(hidden).expand(num_draws, *hidden.shape[:-1], -1, -1)
        return torch.stack(self.unroll(states, draw), dim=-1)


class WithAuxiliary(nn.Module):
    """A CALM model with the auxiliary loss added to its own, as one module, so that DDP and FSDP see all parameters.

    `weight`, `head_weight`, `decay` and `num_targets` (A) are a recipe's, as is the teacher.
    """

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch

    def __init__(
        self,
        calm: CALMForCausalLM,
        weight: float,
        head_weight: float = 1.0,
        decay: float = 0.0,
        num_targets: int = 0,
        teacher: Teacher | None = None,
    ):
        super().__init__()
        config = calm.config
        self.calm, self.config, self.weight, self.head_weight = calm, config, weight, head_weight
        self.decay, self.num_targets, self.teacher = decay, num_targets, teacher
        self.auxiliary = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
        self._no_split_modules = calm._no_split_modules

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.calm.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs) -> None:  # its name in transformers 5
        self.calm.activation_checkpointing_enable(**kwargs)

    def forward(
        self,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        progress: float = 0.0,
        **inputs,
    ):
        """As the model's, and in `loss` the auxiliary one too; `progress` is the share of the steps that are done."""
        head_labels = labels if self.head_weight and not self.num_targets else None
        outputs = self.calm(labels=head_labels, num_items_in_batch=num_items_in_batch, use_cache=False, **inputs)
        if labels is not None:
            if self.head_weight and self.num_targets:
                further = partial(self.auxiliary.draw, num_draws=self.num_targets)
                hidden = outputs.last_hidden_state
                outputs["loss"] = self.calm.patch_loss(hidden, labels, num_items_in_batch, further=further)
            lesson = self.teacher and self.teacher.lesson(inputs["input_ids"], inputs.get("attention_mask"))
            auxiliary_loss = self.auxiliary(outputs.last_hidden_state, labels, num_items_in_batch, lesson)
            head_loss = self.head_weight * outputs.loss if self.head_weight else 0
            weight = self.weight * max(0.0, 1 - progress / self.decay) if self.decay else self.weight
            outputs["loss"] = head_loss + weight * auxiliary_loss
            outputs["auxiliary_loss"] = auxiliary_loss.detach()
        return outputs


def without_auxiliary(model: nn.Module) -> nn.Module:
    return model.calm if isinstance(model, WithAuxiliary) else model


def state_without_auxiliary(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A `WithAuxiliary`'s state dict → the model's own."""
    return {key.removeprefix("calm."): value for key, value in state.items() if key.startswith("calm.")}
