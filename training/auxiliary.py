"""A training-only loss beside the head's: it shapes the backbone and is left behind at export.

Axes: B batch, L tokens, P patches (L = P·K), K tokens per patch, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiTokenLoss(nn.Module):
    """Cross-entropy of the next patch's K tokens, each read off the patch's hidden state by a linear head of its own.

    Args:
        hidden_size: D.
        vocab_size: V.
        patch_size: K.
    """

    def __init__(self, hidden_size: int, vocab_size: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.heads = nn.ModuleList(nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(patch_size))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.02)  # as Llama's output matrix

    def forward(self, hidden_BPD: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Mean nats per counted token, or their sum / `num_items_in_batch`.

        Args:
            hidden_BPD: hidden states; the one at patch p predicts patch p + 1.
            labels (`(B, L)`): the ids at the same positions as the hidden states' patches; −100 is left out.
        """
        labels_BPK = labels.unflatten(1, (-1, self.patch_size))[:, 1:]
        context = hidden_BPD[:, :-1].flatten(0, 1)
        total = sum(
            F.cross_entropy(head(context).float(), labels_BPK[..., k].flatten(), reduction="sum")
            for k, head in enumerate(self.heads)
        )
        count = (labels_BPK != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / count


class WithAuxiliary(nn.Module):
    """A CALM model with the auxiliary loss added to its own, as one module, so that DDP and FSDP see all parameters.

    Args:
        calm: a `CALMForCausalLM`.
        weight: of the auxiliary loss.
    """

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch

    def __init__(self, calm: nn.Module, weight: float):
        super().__init__()
        config = calm.config
        self.calm, self.config, self.weight = calm, config, weight
        self.auxiliary = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
        self._no_split_modules = calm._no_split_modules

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.calm.gradient_checkpointing_enable(**kwargs)

    def forward(self, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs):
        outputs = self.calm(labels=labels, num_items_in_batch=num_items_in_batch, **inputs)
        if labels is not None:
            auxiliary_loss = self.auxiliary(outputs.last_hidden_state, labels, num_items_in_batch)
            outputs.loss = outputs.loss + self.weight * auxiliary_loss
            outputs["auxiliary_loss"] = auxiliary_loss.detach()
        return outputs


def without_auxiliary(model: nn.Module) -> nn.Module:
    return model.calm if isinstance(model, WithAuxiliary) else model


def state_without_auxiliary(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A `WithAuxiliary`'s state dict → the model's own."""
    return {key.removeprefix("calm."): value for key, value in state.items() if key.startswith("calm.")}
