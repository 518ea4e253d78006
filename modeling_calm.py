"""CALM: a Llama backbone over patches of K tokens whose head samples the next patch's latent vector.

Read `CALMForCausalLM.forward` first. Axes: B batch, L tokens, P patches (L = P·K), K tokens per patch, D hidden size,
Z latent size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple

# A head is known once it is imported: those below register themselves in HEADS.
from .configuration_calm import HEADS, CALMConfig, code_version
from .generation_calm import CALMGenerationMixin
from .generation_calm_upstream import CACHE_ARGUMENT
from .heads_calm import PatchTarget
from .heads_calm_energy import EnergyHead  # noqa: F401
from .heads_calm_flow_diffusion import DiffusionHead, FlowMatchingHead  # noqa: F401
from .heads_calm_token_chain import TokenChainHead  # noqa: F401
from .modeling_calm_autoencoder import CALMAutoencoder, OffloadableModel

NO_LOGITS = (
    "CALM has no logits: it samples patches and has no token probabilities (but for the head token_chain, given ids "
    "without labels and cache). Measure quality with BrierLM (calm_transformers.evaluation.brier_lm), and in "
    "lm-evaluation-harness with tasks of the type generate_until."
)


@dataclass
class CALMOutputWithPast(ModelOutput):
    """Output of `CALMForCausalLM`.

    Args:
        loss: mean head loss over the counted target patches.
        last_hidden_state (`(B, P, D)`): position p is the context of patch p + 1.
        cache: over patches; `past_key_values` is its name before transformers 5.24.
        hidden_states, attentions: of every layer, on request.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    compute_logits = cast(Any, None)  # no field: a function where the head knows token probabilities

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache

    @property
    def logits(self) -> Tensor:
        """Logits (B, L, V) of the token after each one, by `token_logits`; AttributeError where there are none."""
        if self.compute_logits is None:
            raise AttributeError(NO_LOGITS)
        return self.compute_logits()

    def __getitem__(self, key):
        if key == "logits" and self.compute_logits is None:
            raise KeyError(NO_LOGITS)
        if key == "logits":
            return self.logits
        return super().__getitem__("cache" if key == "past_key_values" else key)


class NoCache(Cache):
    """Keeps nothing. Without any cache upstream looks for packed sequences, and the host waits for the device."""

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class CALMPreTrainedModel(OffloadableModel, LlamaPreTrainedModel):
    config: CALMConfig
    config_class = CALMConfig
    base_model_prefix = "model"
    # Head and autoencoder can be listed here because everything calls them through their forwards.
    _no_split_modules: list[str] = ["LlamaDecoderLayer", "CALMAutoencoder"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and getattr(module, "zero_init", False):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        getattr(module, "init_own_weights", lambda: None)()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Returns the embeddings if their number stays; any other number raises ValueError."""
        size, step = self.config.vocab_size, pad_to_multiple_of or 1
        if -(-(size if new_num_tokens is None else new_num_tokens) // step) * step == size:
            return self.get_input_embeddings()
        raise ValueError("Can't resize: the vocabulary is the frozen autoencoder's; new tokens need a new one.")


class CALMModel(CALMPreTrainedModel, LlamaModel):
    """Llama over patches: K token embeddings are compressed to one input vector (paper 3.1)."""

    _keys_to_ignore_on_load_unexpected = [r"^head\.", r"^autoencoder\."]

    def __init__(self, config: CALMConfig):
        super().__init__(config)
        size = config.hidden_size
        self.embed_proj = nn.Sequential(
            nn.Linear(config.patch_size * size, 2 * size),
            nn.SiLU(),
            nn.Linear(2 * size, size),
            nn.LayerNorm(size, eps=1e-6),
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`(B, L)`): whole patches.
            attention_mask (`(B, L)` or `(B, P)`, past included): by token or by patch; a patch is attended to when
                any of its tokens is. The cached part alone may be by patch, as prefix tuning's virtual tokens are.
            position_ids (`(B, P)`): of patches; by default they count the patches attended to.
            cache: over patches; `past_key_values` is its name before transformers 5.24.
            inputs_embeds (`(B, L, D)`): token embeddings in place of ids.
            use_cache: whether to make a cache where none is given.
            past_key_values: see `cache`.

        Raises:
            ValueError: two caches, L is not divisible by K, or a mask or positions of another length.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        if input_ids is not None and (input_ids.dim() != 2 or input_ids.is_floating_point()):
            raise ValueError(
                f"input_ids is a tensor of shape {tuple(input_ids.shape)} and type {input_ids.dtype}: the model takes "
                "integers of shape (batch, length)."
            )
        patches = self.embed_patches(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        if past_key_values is not None:
            if cache is not None:
                raise ValueError("cache and past_key_values are one argument: pass one of them.")
            cache = past_key_values
        past, num_patches = cache.get_seq_length() if cache is not None else 0, patches.shape[1]
        if attention_mask is not None:
            attention_mask = self.patch_mask(attention_mask, past + num_patches, past)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        if position_ids is not None and position_ids.shape[-1] != num_patches:
            raise ValueError(
                f"position_ids has length {position_ids.shape[-1]}; positions count patches: {num_patches}."
            )
        return super().forward(
            inputs_embeds=patches,
            attention_mask=attention_mask,
            position_ids=position_ids,  # pyright: ignore[reportArgumentType] (upstream: LongTensor)
            use_cache=use_cache,
            **{CACHE_ARGUMENT if past_key_values is None else "past_key_values": cache},  # upstream warns of it
            **kwargs,
        )

    def embed_patches(self, inputs_embeds: Tensor) -> Tensor:
        """Maps token embeddings (B, L, D) to the backbone's inputs (B, P, D)."""
        batch_size, length, size = inputs_embeds.shape
        if length % self.config.patch_size:
            raise ValueError(
                f"The model got {length} tokens per row, not divisible by patch_size={self.config.patch_size}: pad "
                f"with pad_to_multiple_of={self.config.patch_size} (an argument of tokenizers and data collators; "
                "an adapter's virtual tokens count, too; generate() fills prompts by itself). For likelihoods no "
                "length is right: CALM has no logits."
            )
        num_patches = length // self.config.patch_size
        return self.embed_proj(inputs_embeds.reshape(batch_size, num_patches, self.config.patch_size * size))

    def patch_mask(self, attention_mask: Tensor, num_patches: int, past: int = 0) -> Tensor:
        """Returns a mask by patch, (B, num_patches); masks that aren't 2-D are returned as they are.

        Takes a mask by patch, by token, or by patch for the `past` ones and by token for the rest.
        """
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            return attention_mask
        length, num_tokens = attention_mask.shape[1], num_patches * self.config.patch_size
        if length == num_patches:
            return attention_mask
        if length == num_tokens:
            return attention_mask.unflatten(1, (num_patches, -1)).amax(-1)
        if length == past + (num_patches - past) * self.config.patch_size:
            new = attention_mask[:, past:].unflatten(1, (num_patches - past, -1)).amax(-1)
            return torch.cat([attention_mask[:, :past], new], dim=1)
        raise ValueError(
            f"attention_mask has length {length}: it must count {num_patches} patches or {num_tokens} tokens, with "
            "those in the cache."
        )


class CALMForCausalLM(CALMPreTrainedModel, CALMGenerationMixin):
    """The continuous autoregressive language model: backbone, generative head, frozen autoencoder."""

    def __init__(self, config: CALMConfig):
        config.check()  # its fields may have been changed since it was made
        saved, config.code_version = getattr(config, "code_version", None), code_version()
        if saved not in (None, config.code_version):
            logging.get_logger(__name__).warning_once(f"Saved with CALM's code {saved}; {config.code_version} runs.")
        super().__init__(config)
        self.model = CALMModel(config)
        self.head = HEADS[config.head_type](config)
        self._no_split_modules = [*self._no_split_modules, type(self.head).__name__]
        self.autoencoder = CALMAutoencoder(config.autoencoder_config)
        self.post_init()
        # Upstream has just added the backbone's own. Token-chain heads had codes before they sampled tokens.
        self._keys_to_ignore_on_load_unexpected = {r"^head\.codes$"}
        self.train(self.training)

    def train(self, mode: bool = True):
        """Sets the mode as in torch, but the autoencoder stays frozen and in eval mode.

        `from_pretrained` creates parameters anew and calls this last: so the autoencoder is frozen here.
        """
        super().train(mode)
        self.autoencoder.eval().requires_grad_(False)
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        generator: torch.Generator | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CALMOutputWithPast:
        """Embeds patches, runs the backbone, and with labels computes the head's loss on the next patches.

        Arguments are those of `CALMModel.forward` (`use_cache` is off with labels), a generator for the loss, and:

        - labels (`(B, L)`): the ids at the input's positions; they are shifted here, by one patch. A patch is a target
          when it isn't the first and none of its labels is −100.
        - num_items_in_batch: number of labels that are not −100 in the whole accumulated batch. Exact if the collator
          sets each row's first patch and its partial patches to −100.

        With a head that samples tokens, ids alone may have any length: the last patch is filled up. The output then
        has `logits`, see `token_logits`.
        """
        ids_BL, others = None, (labels, cache, past_key_values, attention_mask)
        if self.head.samples_tokens and input_ids is not None and all(each is None for each in others):
            ids_BL = input_ids
            input_ids = F.pad(ids_BL, (0, -ids_BL.shape[-1] % self.config.patch_size))
        use_cache = False if use_cache is None and labels is not None else use_cache
        if use_cache is False and all(each is None for each in (*others[1:], position_ids)):
            cache = None if self.model.gradient_checkpointing else NoCache(layers=[])
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs | {"return_dict": True},
        )
        loss = None
        if labels is not None:
            loss = self.patch_loss(outputs.last_hidden_state, labels, num_items_in_batch, generator)
        output = CALMOutputWithPast(
            loss=loss,
            last_hidden_state=outputs.last_hidden_state,
            cache=None if isinstance(cache, NoCache) else getattr(outputs, CACHE_ARGUMENT),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if ids_BL is not None:
            output.compute_logits = partial(self.token_logits, ids_BL)
        return output

    def token_logits(self, input_ids: Tensor) -> Tensor:
        """Returns the logits (B, L, V) of the token after each of these (B, L), where the head knows them.

        The first token ends a patch, as in generation from it alone, and patches follow. Padding is on the right.
        """
        patch_size, length = self.config.patch_size, input_ids.shape[1]
        first_BK = self.pack_for_generation(input_ids[:, :1])["input_ids"]
        patches_BPK = F.pad(input_ids[:, 1:], (0, 1 + -length % patch_size)).unflatten(1, (-1, patch_size))
        inputs_BL = torch.cat([first_BK, patches_BPK[:, :-1].flatten(1)], dim=1)
        hidden_BPD = self.model(input_ids=inputs_BL, use_cache=False).last_hidden_state
        return self.head.token_logits(hidden_BPD, patches_BPK).flatten(1, 2)[:, :length]

    def patch_loss(
        self,
        hidden_BPD: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        generator: torch.Generator | None = None,
        **noise: Tensor,
    ) -> Tensor:
        """Returns the head's loss on the targets in `labels`; arguments as in `forward`.

        `hidden_BPD` are the input's hidden states, `noise` is the head's predrawn noise.

        Raises:
            ValueError: labels of another length than the input.
        """
        context, target, is_counted = self.patch_targets(hidden_BPD, labels)
        losses = self.head.loss(context, target, generator=generator, **noise)
        return self.mean_over_items(losses, is_counted, num_items_in_batch)

    def mean_over_items(self, loss_R: Tensor, is_counted_R: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Returns the mean loss of patches that count, or their sum · K / num_items_in_batch, the count of labels."""
        total = loss_R.where(is_counted_R, 0).sum()
        if num_items_in_batch is None:
            return total / is_counted_R.sum().clamp(min=1)
        return total / (num_items_in_batch / self.config.patch_size)

    def patch_targets(self, hidden_BPD: Tensor, labels: Tensor) -> tuple[Tensor, PatchTarget, Tensor]:
        """Returns the hidden states (R, D) before R = B·(P − 1) patches, these, and which count, (R,).

        Patches count whose tokens all have labels. The others are computed as well, as if of token 0: to leave them
        out the host would have to wait for the device, and torch.compile couldn't know how many there are.
        """
        patch_size, num_tokens = self.config.patch_size, self.config.patch_size * hidden_BPD.shape[1]
        if labels.shape[1] != num_tokens:
            raise ValueError(f"labels have length {labels.shape[1]}, but the input has {num_tokens} tokens.")
        labels_RK = target_patches(labels.long().to(hidden_BPD.device), patch_size).flatten(0, 1)
        target = PatchTarget(labels_RK.clamp(min=0), self.autoencoder)
        return hidden_BPD[:, :-1].flatten(0, 1), target, (labels_RK != -100).all(-1)


def target_patches(labels_BL: Tensor, patch_size: int) -> Tensor:
    """Returns the patches that the hidden states predict, (B, P − 1, K), a view: all but a row's first patch."""
    return labels_BL.unflatten(1, (-1, patch_size))[:, 1:]


CALMModel.register_for_auto_class("AutoModel")
CALMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
