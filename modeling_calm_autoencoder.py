"""The CALM autoencoder: K tokens to one Gaussian latent vector, and back (paper section 2).

Axes: B batch, L tokens, P patches (L = P·K), K tokens per patch, d hidden size, Z latent size, V vocabulary, M single
states of any patches (m of a chunk).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils.generic import ModelOutput

from .configuration_calm import CALMAutoencoderConfig
from .kernels_calm import is_plain_linear, vocabulary_argmax

SUMMABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVE_NATS = 0.01  # a latent dimension is active when its mean KL divergence exceeds this
# Logits computed at once: 64 MiB in float32 on a CPU; a GPU needs larger matmuls to be busy.
LOGITS_CHUNK_SIZE = {"cpu": 2**24, "other": 2**28}


@dataclass
class CALMAutoencoderOutput(ModelOutput):
    """Output of `CALMAutoencoder`.

    Args:
        loss: K · cross-entropy + kl_weight · clipped KL; nats per patch.
        logits (`(B, L, V)`, or `(..., K, V)` of given latents): reconstruction logits.
        reconstruction_loss: cross-entropy, nats per token.
        kl_loss: clipped KL divergence, nats per patch.
        mean, log_std (`(B, P, Z)`): parameters of the posterior.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    kl_loss: Tensor | None = None
    mean: Tensor | None = None
    log_std: Tensor | None = None


class AutoencoderLayer(nn.Module):
    """Computes x + MLP(RMSNorm(x)), on tokens or patches."""

    def __init__(self, config: CALMAutoencoderConfig):
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.norm(hidden))


class AutoencoderEncoder(nn.Module):
    """Maps token ids (B, L) to mean and log standard deviation of the posterior, each (B, P, Z)."""

    def __init__(self, config: CALMAutoencoderConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_token_layers = config.num_encoder_layers // 2
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(AutoencoderLayer(config) for _ in range(config.num_encoder_layers))
        self.squeeze_layer = nn.Linear(config.patch_size * config.hidden_size, config.hidden_size)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_to_latent = nn.Linear(config.hidden_size, 2 * config.latent_size)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        length = input_ids.shape[1]
        if length % self.patch_size:
            raise ValueError(
                f"The autoencoder got {length} tokens per row, not divisible by patch_size={self.patch_size}: pad "
                f"with pad_to_multiple_of={self.patch_size}."
            )
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers[: self.num_token_layers]:
            hidden = layer(hidden)
        hidden = self.squeeze_layer(hidden.unflatten(1, (-1, self.patch_size)).flatten(2))
        for layer in self.layers[self.num_token_layers :]:
            hidden = layer(hidden)
        mean, log_std = self.hidden_to_latent(self.norm(hidden)).chunk(2, dim=-1)
        return mean, log_std


class AutoencoderDecoder(nn.Module):
    """Maps latent vectors (..., Z) to logits (..., K, V)."""

    def __init__(self, config: CALMAutoencoderConfig):
        super().__init__()
        self.patch_size, self.vocab_size = config.patch_size, config.vocab_size
        self.num_patch_layers = config.num_decoder_layers // 2
        self.latent_to_hidden = nn.Linear(config.latent_size, config.hidden_size)
        self.layers = nn.ModuleList(AutoencoderLayer(config) for _ in range(config.num_decoder_layers))
        self.expand_layer = nn.Linear(config.hidden_size, config.patch_size * config.hidden_size)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def expand(self, latents: Tensor) -> Tensor:
        """Maps latent vectors (..., Z) to a state for each token, (..., K, d), by the layers on whole patches."""
        hidden = self.latent_to_hidden(latents)
        for layer in self.layers[: self.num_patch_layers]:
            hidden = layer(hidden)
        return self.expand_layer(hidden).unflatten(-1, (self.patch_size, -1))

    def final_states(self, states: Tensor) -> Tensor:
        """Maps each token's state from `expand` (..., d) to its last hidden state, before the output matrix."""
        for layer in self.layers[self.num_patch_layers :]:
            states = layer(states)
        return self.norm(states)

    @torch.no_grad()
    def most_probable_tokens(
        self, states_Md: Tensor, positions_M: Tensor, forbidden_KV: Tensor | None = None
    ) -> Tensor:
        """Returns the most probable tokens, (M,), of single states from `expand`; of equal logits the lowest id.

        Never holds all logits. An output layer that is quantised, offloaded or adapted is called on a few states at a
        time, for its matrix can't be cut into tiles.
        """
        states_Md = self.final_states(states_Md)
        if is_plain_linear(self.lm_head):
            return vocabulary_argmax(self.lm_head, states_Md, positions_M, forbidden_KV)
        size, ids = max(1, logits_chunk_size(states_Md.device) // self.vocab_size), []
        for states_md, positions_m in zip(states_Md.split(size), positions_M.split(size), strict=True):
            logits_mV = self.lm_head(states_md)
            if forbidden_KV is not None:
                forbidden_mV = forbidden_KV.to(positions_m.device)[positions_m]
                logits_mV = logits_mV.masked_fill(forbidden_mV.to(logits_mV.device), -torch.inf)
            ids.append(logits_mV.argmax(-1))
        return torch.cat(ids)

    def forward(self, latents: Tensor) -> Tensor:
        # Flattened once, since each linear layer without bias would flatten and unflatten by itself.
        states = self.expand(latents)
        return self.lm_head(self.final_states(states.flatten(0, -2))).unflatten(0, states.shape[:-1])


def logits_chunk_size(device: torch.device) -> int:
    return LOGITS_CHUNK_SIZE["cpu" if device.type == "cpu" else "other"]


def clipped_kl(mean: Tensor, log_std: Tensor, clamp: float) -> Tensor:
    """Returns the KL divergence of N(mean, std²) from N(0, 1), (...), nats per patch, each dimension at least `clamp`.

    A dimension at the floor has no gradient: it is not pushed further towards the prior (KL clipping, paper 2.2).
    """
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)
    return kl.clamp(min=clamp).sum(-1)


def execution_device(module: nn.Module) -> torch.device | None:
    """Returns the execution device of the first submodule with an accelerate hook, or None."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):  # a SequentialHook has several
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def non_finite_weight(model: nn.Module) -> str | None:
    """Returns the name of the first parameter that holds NaN or infinity, or `None`.

    One device-host sync for all. Weights that are quantised, offloaded or sharded are not checked.
    """
    weights, total = {}, torch.zeros(())
    for name, parameter in model.named_parameters():
        weight = parameter.data
        if type(weight) is Tensor and weight.dtype in SUMMABLE_DTYPES and weight.device.type != "meta":
            weights[name] = weight
            total = total.to(weight.device) + weight.sum(dtype=torch.float32)
    if bool(total.isfinite()):
        return None
    return next((name for name, weight in weights.items() if not bool(weight.isfinite().all())), None)


def _some_values(weight: Tensor) -> Tensor:
    return weight.detach().flatten()[:: max(1, weight.numel() // 64)].cpu().clone()


class OffloadableModel(PreTrainedModel):
    """A model that knows its device also when its weights are offloaded, and checks that its weights were loaded."""

    _checked: list = []  # the weights that were found finite
    _initialised: dict[str, Tensor] = {}  # of weights that were in no file: some of their initial values

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device of inputs. Offloaded weights are on "meta" between their layers' forwards; pipelines, and callers
        that write `ids.to(model.device)`, need a device that holds values."""
        device = super().device
        return execution_device(self) or device if device.type == "meta" else device

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs) -> Any:
        """Loads as upstream, and records for `check_weights` the weights that were in no file."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # pyright: ignore
        missing = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
        weights = {name: weight for name, weight in model.named_parameters() if weight.device.type != "meta"}
        model._initialised = {name: _some_values(weight) for name, weight in weights.items() if name in missing}
        return (model, info) if output_loading_info else model

    def check_weights(self) -> None:
        """Raises ValueError if a weight still has its initial values, as no file held it, or isn't finite.

        All weights are read once, and again after a change.
        """
        weights = dict(self.named_parameters())
        initial = {name: values for name, values in self._initialised.items() if name in weights}
        if unloaded := [name for name, values in initial.items() if torch.equal(_some_values(weights[name]), values)]:
            others = f" and of {len(unloaded) - 1} more" if len(unloaded) > 1 else ""
            raise ValueError(
                f"The model was loaded without values of {unloaded[0]}{others}, which have their initial values: "
                "load a complete model, or train this one first."
            )
        state = [(id(w), w.dtype, 0 if w.is_inference() else w._version) for w in weights.values()]
        if state == self._checked:
            return
        if (name := non_finite_weight(self)) is not None:
            raise ValueError(
                f"The weight {name} holds NaN or infinity, so that generation would repeat one token: load other "
                "weights, in float16 perhaps bfloat16 ones."
            )
        self._checked = state


class CALMAutoencoder(OffloadableModel):
    """Maps patches of K tokens to Gaussian posteriors over one latent vector, and latent vectors back to tokens.

    Trained first, then frozen inside `CALMForCausalLM`. Hooks of FSDP and of offloading fire: `encode`, `decode` and
    `decode_tokens` pass `forward`, the decoder's `expand` and `most_probable_tokens` the forward of each layer.
    """

    config_class = CALMAutoencoderConfig
    base_model_prefix = "autoencoder"
    main_input_name = "input_ids"
    _tied_weights_keys = {"decoder.lm_head.weight": "encoder.embed_tokens.weight"}
    # There is no attention in here, so whatever the language model around it asks for is supported.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: CALMAutoencoderConfig):
        super().__init__(config)
        self.encoder = AutoencoderEncoder(config)
        self.decoder = AutoencoderDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        latents: Tensor | None = None,
        output_logits: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        **kwargs,
    ) -> CALMAutoencoderOutput:
        """Encodes, samples one latent vector per patch, decodes; with labels also computes the loss.

        In training mode a fraction `token_dropout_rate` of the input tokens is replaced by id 0, and a fraction
        `latent_dropout_rate` of the latent dimensions is dropped.

        Args:
            input_ids (`(B, L)`, *optional*): L is divisible by K.
            labels (`(B, L)`, *optional*): the ids to reconstruct; −100 is left out. A patch's KL term is weighted
                by the fraction of its labels that count.
            latents (`(..., Z)`, *optional*): decodes these and nothing else, to logits of shape (..., K, V).
            output_logits: False only encodes: no sampling, no decoding, and no corruption in training.
            num_items_in_batch: number of labels that count in the whole accumulated batch.
            generator: randomness of latents and token replacement; latent dropout uses torch's own.
            noise (`(B, P, Z)`, *optional*): predrawn, standard normal, for the latents.

        Raises:
            ValueError: both or neither of `input_ids` and `latents`, or labels for what is not to be scored.
        """
        if labels is not None and (latents is not None or not output_logits):
            raise ValueError("The autoencoder got labels, but it scores only what it encodes and decodes.")
        if latents is not None and input_ids is None:
            return CALMAutoencoderOutput(logits=self.decoder(latents))
        if latents is not None or input_ids is None:
            raise ValueError("The autoencoder takes either input_ids, to encode and decode, or latents, to decode.")
        if self.training and output_logits:
            chance = torch.rand(input_ids.shape, generator=generator, device=input_ids.device)
            input_ids = input_ids.masked_fill(chance < self.config.token_dropout_rate, 0)
        mean, log_std = self.encoder(input_ids)
        if not output_logits:
            return CALMAutoencoderOutput(mean=mean, log_std=log_std)
        if noise is None:
            noise = torch.empty_like(mean).normal_(generator=generator)
        noisy = F.dropout(mean + log_std.exp() * noise, self.config.latent_dropout_rate, self.training)
        logits = self.decoder(noisy).flatten(1, 2)
        if labels is None:
            return CALMAutoencoderOutput(logits=logits, mean=mean, log_std=log_std)

        kept = labels != -100
        kept_per_patch = kept.unflatten(1, (-1, self.config.patch_size)).sum(-1)
        kl = clipped_kl(mean.float(), log_std.float(), self.config.kl_clamp)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        items = kept.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        reconstruction_loss, kl_loss = cross_entropy / items, (kl * kept_per_patch).sum() / items
        loss = self.config.patch_size * reconstruction_loss + self.config.kl_weight * kl_loss
        return CALMAutoencoderOutput(loss, logits, reconstruction_loss.detach(), kl_loss.detach(), mean, log_std)

    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes ids (B, L) to mean and log_std, (B, P, Z) each."""
        outputs = self(input_ids, output_logits=False)
        return outputs.mean, outputs.log_std

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latent vectors (..., Z) to logits (..., K, V)."""
        return self(latents=latents).logits

    @torch.no_grad()
    def decode_tokens(self, latents: Tensor, forbidden_KV: Tensor | None = None) -> Tensor:
        """Decodes latent vectors (..., Z) to the most probable tokens, (..., K), that aren't forbidden."""
        rows = max(1, logits_chunk_size(latents.device) // (self.config.patch_size * self.config.vocab_size))
        ids = []
        for chunk in latents.reshape(-1, latents.shape[-1]).split(rows):
            logits = self.decode(chunk)
            if forbidden_KV is not None:
                logits = logits.masked_fill(forbidden_KV.to(logits.device), -torch.inf)
            ids.append(logits.argmax(-1))
        ids = torch.cat(ids) if len(ids) > 1 else ids[0]
        return ids.reshape(*latents.shape[:-1], self.config.patch_size)


CALMAutoencoder.register_for_auto_class("AutoModel")
