"""The multi-token prediction (MTP) loss, which trains the backbone beside the head's loss and is not exported.

Axes: B batch, L tokens, P patches (L = P·K), K tokens per patch, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm_transformers.model.heads_calm import PatchTarget, standard_normal
from calm_transformers.model.heads_calm_token_chain import TokenChain
from calm_transformers.model.modeling_calm import CALMForCausalLM, target_patches
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder

AUXILIARY_FILE = "auxiliary.safetensors"  # in a checkpoint folder
LOGITS_CHUNK_SIZE = 2**25  # logits held at once, 128 MB in float32, and a few copies
IGNORED = -100  # labels that aren't predicted


class MultiTokenLoss(TokenChain):
    """MTP loss: the cross-entropy of the next patch's K tokens under p(x_k | hidden, x_<k).

    This small autoregressive model trains the backbone to encode the joint distribution of the next patch, which the
    generative head has to sample from.
    """

    def __init__(self, hidden_size: int, vocab_size: int, patch_size: int):
        super().__init__(hidden_size, vocab_size, patch_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)  # as in Llama

    def forward(self, hidden_BPD: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Returns the cross-entropy in nats: the mean per label, or the sum over all labels / `num_items_in_batch`.

        Args:
            hidden_BPD: hidden states; the one at patch p predicts patch p + 1.
            labels (`(B, L)`): token ids of the same P patches; −100 is ignored.
            num_items_in_batch: number of labels in the whole accumulated batch.
        """
        labels_BPK = target_patches(labels, self.patch_size)
        features = self.teacher_forced_features(hidden_BPD[:, :-1], labels_BPK.clamp(min=0))
        total = linear_cross_entropy(features.flatten(0, 2), self.lm_head.weight, labels_BPK.flatten())
        count = (labels_BPK != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / count

    @torch.no_grad()
    def sample(self, hidden: Tensor, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples `num_samples` (A) patches per hidden state: (..., D) → ids (A, ..., K)."""
        return propose_in_chunks(self, hidden, num_samples, generator=generator)[0]


def propose_in_chunks(
    chain: TokenChain,
    context: Tensor,
    num_samples: int,
    temperature: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns what `TokenChain.propose` does, in chunks, for contexts (..., D) and temperatures (...) in (0, 1]."""
    num_rows = max(1, LOGITS_CHUNK_SIZE // (num_samples * chain.lm_head.out_features))
    contexts = context.reshape(-1, context.shape[-1]).split(num_rows)
    temperatures = [1.0] * len(contexts) if temperature is None else temperature.flatten().split(num_rows)
    parts = []
    for context_RD, temperature_R in zip(contexts, temperatures, strict=True):
        uniform = torch.empty(num_samples, len(context_RD), chain.patch_size, device=context.device)
        parts.append(chain.propose(context_RD, uniform.uniform_(generator=generator), temperature_R))
    shape = (num_samples, *context.shape[:-1])
    tokens, log_acceptance = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return tokens.view(*shape, -1), log_acceptance.view(shape)


def linear_cross_entropy(states_RD: Tensor, weight_VD: Tensor, labels_R: Tensor) -> Tensor:
    """Returns the sum of the cross-entropies of labels under the logits states · weightᵀ, without storing these."""
    kind = states_RD.device.type  # "meta" knows no autocast
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        states_RD, weight_VD = states_RD.to(dtype), weight_VD.to(dtype)
    return _LinearCrossEntropy.apply(states_RD, weight_VD, labels_R, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum and, where gradients are enabled at the call, its gradient in one pass over chunks of rows."""

    @staticmethod
    def forward(ctx, states_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, is_grad_enabled: bool) -> Tensor:
        num_rows = max(1, LOGITS_CHUNK_SIZE // len(weight_VD))
        total = torch.zeros((), device=states_RD.device)
        grad_weight, grads = torch.zeros_like(weight_VD, dtype=torch.float32), []
        for states, labels in zip(states_RD.split(num_rows), labels_R.split(num_rows), strict=True):
            log_q = (states @ weight_VD.T).float().log_softmax(-1)
            total += F.nll_loss(log_q, labels, ignore_index=IGNORED, reduction="sum")
            if is_grad_enabled and any(ctx.needs_input_grad):  # the latter is true without gradients, too
                counts = (labels != IGNORED).to(log_q.dtype).unsqueeze(-1)
                grad = log_q.exp_().mul_(counts).scatter_add_(1, labels.clamp(min=0).unsqueeze(-1), -counts)
                grad = grad.to(weight_VD.dtype)
                grads.append(grad @ weight_VD)
                grad_weight += grad.T @ states
        if grads:
            ctx.save_for_backward(torch.cat(grads), grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor):
        grad_states, grad_weight = ctx.saved_tensors
        return grad_total * grad_states, grad_total * grad_weight, None, None


class ExtraTargets(PatchTarget):
    """A target whose latent samples cycle over the patch that followed and other patches, sampled by the MTP model.

    Args:
        tokens (`(..., K)`): ids of the patch that followed.
        autoencoder: encodes all patches.
        extra_tokens (`(A, ..., K)`): ids of the other patches.
    """

    def __init__(self, tokens: Tensor, autoencoder: CALMAutoencoder, extra_tokens: Tensor):
        super().__init__(tokens, autoencoder)
        self._autoencoder, self.extra_tokens = autoencoder, extra_tokens

    def to(self, device: torch.device, **kwargs) -> PatchTarget:
        tokens, extra_tokens = self.tokens.to(device, **kwargs), self.extra_tokens.to(device, **kwargs)
        return ExtraTargets(tokens, self._autoencoder, extra_tokens)

    def rows(self, rows: slice) -> PatchTarget:
        return ExtraTargets(self.tokens[rows], self._autoencoder, self.extra_tokens[:, rows])

    @property
    def all_tokens(self) -> Tensor:
        """Ids (1 + A, ..., K) of all patches, the one that followed first."""
        return torch.cat([self.tokens[None], self.extra_tokens])

    def sample_latents(self, num_samples: int, generator=None, noise: Tensor | None = None) -> Tensor:
        """Returns samples (N, ..., Z); sample n is from the posterior of patch n mod (1 + A) of `all_tokens`."""
        mean, _ = self.posterior()
        noise = standard_normal((num_samples, *mean.shape), mean, generator) if noise is None else noise
        patch_of_sample = torch.arange(len(noise), device=mean.device) % (1 + len(self.extra_tokens))
        parameters = zip(self.posterior(), self.encode(self.extra_tokens), strict=True)  # the means, the log_stds
        mean, log_std = (torch.cat([true[None], extra])[patch_of_sample] for true, extra in parameters)
        return torch.addcmul(mean, log_std.exp(), noise)


class TrainedCALM(nn.Module):
    """A CALM model, `calm`, and what its loss needs, in one module, so that DDP and FSDP see all parameters."""

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch

    def __init__(self, calm: CALMForCausalLM):
        super().__init__()
        self.calm, self.config = calm, calm.config
        self._no_split_modules = calm._no_split_modules

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.calm.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs) -> None:  # the name in transformers 5
        self.calm.activation_checkpointing_enable(**kwargs)


class WithAuxiliary(TrainedCALM):
    """A CALM model and its auxiliary (MTP) loss.

    `weight`, `head_weight`, `num_targets` (A) are a recipe's auxiliary_weight, head_weight, auxiliary_targets.
    """

    def __init__(self, calm: CALMForCausalLM, weight: float, head_weight: float = 1.0, num_targets: int = 0):
        super().__init__(calm)
        config = calm.config
        self.weight, self.head_weight, self.num_targets = weight, head_weight, num_targets
        self.auxiliary = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)

    def forward(self, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs):
        """Returns the model's outputs with both losses, weighted."""
        # Without labels, calm computes no loss; with pseudo-targets the head's follows below.
        head_labels = labels if self.head_weight and not self.num_targets else None
        outputs = self.calm(labels=head_labels, num_items_in_batch=num_items_in_batch, use_cache=False, **inputs)
        if labels is not None:
            if self.head_weight and self.num_targets:
                context, target, is_counted = self.calm.patch_targets(outputs.last_hidden_state, labels)
                extra_tokens = self.auxiliary.sample(context, self.num_targets)
                target = ExtraTargets(target.tokens, self.calm.autoencoder, extra_tokens)
                losses = self.calm.head.loss(context, target)
                outputs["loss"] = self.calm.mean_over_items(losses, is_counted, num_items_in_batch)
            auxiliary_loss = self.auxiliary(outputs.last_hidden_state, labels, num_items_in_batch)
            head_loss = self.head_weight * outputs.loss if self.head_weight else 0
            outputs["loss"] = head_loss + self.weight * auxiliary_loss
            outputs["auxiliary_loss"] = auxiliary_loss.detach()
        return outputs


def without_auxiliary(model: nn.Module) -> nn.Module:
    """Returns the model in a `TrainedCALM`, or any other model itself."""
    return model.calm if isinstance(model, TrainedCALM) else model


def calm_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the CALM model's state dict out of a `TrainedCALM`'s."""
    return {key.removeprefix("calm."): value for key, value in state.items() if key.startswith("calm.")}
