"""Configurations of CALM: the autoencoder's, and the language model's, which nests it.

Defaults without another source are those of the published models (arXiv 2510.27688 and its checkpoints). Invalid
values raise `ValueError`, and so does an autoencoder of another K, Z or vocabulary.
"""

import contextlib
import hashlib
import math
from pathlib import Path
from typing import get_args

from transformers.configuration_utils import PretrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.utils import logging
from transformers.utils.versions import require_version

VERSION = "0.1.0"
MAX_LAYERS = 1000
TRANSFORMERS = "transformers>=5.17,<5.25"  # tested; setup.cfg and README say the same
# head_type → class of the head. Heads register themselves when modeling_calm.py imports them; until then their fields
# are not checked.
HEADS: dict[str, type] = {}
AUTO_MAP = {
    "AutoConfig": "configuration_calm.CALMConfig",
    "AutoModel": "modeling_calm.CALMModel",
    "AutoModelForCausalLM": "modeling_calm.CALMForCausalLM",
}
AUTOENCODER_AUTO_MAP = {
    "AutoConfig": "configuration_calm.CALMAutoencoderConfig",
    "AutoModel": "modeling_calm_autoencoder.CALMAutoencoder",
}


def check_transformers() -> None:
    """Warns once if transformers is newer than the tested versions; raises ImportError if it is older."""
    require_version(TRANSFORMERS.partition(",")[0], f'For CALM: pip install "{TRANSFORMERS}".')
    try:
        require_version(TRANSFORMERS)
    except ImportError:
        logging.get_logger(__name__).warning_once(
            f'CALM has not been tested with a transformers so new. If something fails: pip install "{TRANSFORMERS}".'
        )


check_transformers()


def code_version() -> str:
    """Returns the version and a hash of the running code: this file, and those beside it that travel with a model."""
    files = sorted(Path(__file__).parent.glob("*_calm*.py"))
    return f"{VERSION}, {hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()[:12]}"


def require(condition: bool, message: str) -> None:
    """Raises `ValueError` with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_types(config: PretrainedConfig) -> None:
    """Raises `ValueError` for the first field that isn't finite or has another type than its class states."""
    hints = type(config).__annotations__
    for name, value in vars(config).items():
        kinds = get_args(hints.get(name)) or (hints.get(name, object),)
        accepted = (*kinds, int) if float in kinds else kinds
        is_right = isinstance(value, accepted) and (type(value) is not bool or bool in kinds or object in kinds)
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        require(is_right, f"{name}={value!r}: must be of type {names}.")
        require(not isinstance(value, float) or math.isfinite(value), f"{name}={value}: must be a finite number.")


def check_layers(config: PretrainedConfig, **least: int) -> None:
    """Raises `ValueError` for a number of layers below its `least` or beyond any use, which would not end."""
    for name, smallest in least.items():
        count = getattr(config, name)
        require(smallest <= count <= MAX_LAYERS, f"{name}={count}: must lie in [{smallest}, {MAX_LAYERS}].")


@contextlib.contextmanager
def value_errors():
    """Turns any exception into a `ValueError` of one line, which huggingface_hub's are not."""
    try:
        yield
    except Exception as error:
        raise ValueError(" ".join(str(error).split())) from error


class CALMAutoencoderConfig(PretrainedConfig):
    """Configuration of the autoencoder that maps K tokens to one latent vector and back.

    Args:
        vocab_size: V, shared with the language model.
        hidden_size, intermediate_size: widths d of its layers and f of their gated MLPs.
        num_encoder_layers, num_decoder_layers: of n layers the first n // 2 stand before the squeeze (encoder) or
            the expansion (decoder), the others after it. At least 1 each.
        patch_size, latent_size: K tokens per latent vector, of size Z.
        hidden_act, mlp_bias, rms_norm_eps, initializer_range: as in Llama.
        token_dropout, latent_dropout: probabilities in training of replacing an input token by id 0 and of dropping
            a latent dimension (paper 2.2); `None`, as published, takes `ae_dropout` for both.
        kl_clamp: floor of the KL divergence, nats per latent dimension (paper 2.2).
        kl_weight: weight of the KL term beside K times the cross-entropy (paper 2.2).
    """

    model_type = "calm_autoencoder"
    base_config_key = "autoencoder_config"

    vocab_size: int = 128257
    hidden_size: int = 512
    intermediate_size: int = 1280
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    patch_size: int = 4
    latent_size: int = 128
    hidden_act: str = "silu"
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    ae_dropout: float = 0.15
    token_dropout: float | None = None
    latent_dropout: float | None = None
    kl_clamp: float = 0.5
    kl_weight: float = 1e-3
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    def __post_init__(self, **kwargs):
        # The decoder's output matrix is the encoder's embedding; published configs say False and tie all the same.
        self.tie_word_embeddings = True
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raises `ValueError` for the first field that makes no sense."""
        check_types(self)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "patch_size", "latent_size"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1.")
        check_layers(self, num_encoder_layers=1, num_decoder_layers=1)
        for name in ("ae_dropout", "token_dropout", "latent_dropout"):
            rate = getattr(self, name)
            require(rate is None or 0 <= rate < 1, f"{name}={rate}: must lie in [0, 1).")
        require(self.kl_clamp >= 0, f"kl_clamp={self.kl_clamp}: must not be negative (nats per dimension).")
        require(self.kl_weight >= 0, f"kl_weight={self.kl_weight}: must not be negative.")

    @property
    def token_dropout_rate(self) -> float:
        return self.ae_dropout if self.token_dropout is None else self.token_dropout

    @property
    def latent_dropout_rate(self) -> float:
        return self.ae_dropout if self.latent_dropout is None else self.latent_dropout

    def to_dict(self):
        output = super().to_dict()
        output.pop("_pre_quantization_dtype", None)  # upstream leaves out its own alone, and json takes no torch.dtype
        output["auto_map"] = dict(AUTOENCODER_AUTO_MAP)  # of the autoencoder by itself
        return output


class CALMConfig(LlamaConfig):
    """Configuration of the continuous autoregressive language model: Llama's, and the fields of head and autoencoder.

    Positions are patches: `max_position_embeddings` counts patches, not tokens.

    Args:
        patch_size, latent_size: K tokens per patch, and Z, the size of the latent vector that the head predicts.
        head_type: "energy", "flow" or "diffusion", as published; "token_chain" samples the patch's tokens
            one by one, for small vocabularies (see heads_calm_token_chain.py).
        noise_size: size of the energy head's noise, Uniform(−0.5, 0.5) in each dimension.
        num_mlp_layers: residual blocks in the head.
        num_context_layers: residual MLPs applied to the hidden state first, once for all samples. A head that is
            trained on a frozen backbone learns much faster with one (docs/inside/log.md).
        num_samples: N, samples per patch in the training loss (energy: head samples; flow and diffusion: targets).
        num_posterior_samples: S, posterior samples per patch in the energy loss.
        beta: exponent of the energy score, 0 < β < 2; 1 is the least whose gradient is bounded where samples nearly
            coincide.
        flow_time_logit_mean: the flow head's training times are sigmoid(Normal(this, 1)); `None` is the published
            uniform distribution. Values below 0 favour early times, which decide what a sample becomes.
        sampling_steps: solver steps of the flow head, respaced steps of the diffusion head; `None` is 10 and 100.
        distilled_temperature: the lowest T < 1 at which the head samples in one draw, trained for every T from there
            to 1 by the recipe distil-temperature; `None` is T = 1 alone, as published.
        autoencoder_config: a `CALMAutoencoderConfig` or its dictionary; `None` takes the published one with this
            configuration's K, Z and vocabulary.
        prompt_filler_token_id: fills the first patch of a prompt on its left; `None` is the pad token.
    """

    model_type = "calm"
    # Upstream declares a property of the class, and its own models assign to it as here.
    sub_configs = {"autoencoder_config": CALMAutoencoderConfig}  # pyright: ignore[reportAssignmentType]
    keys_to_ignore_at_inference = ["cache", "past_key_values", "last_hidden_state", "hidden_states", "attentions"]
    # Llama's plans would split the backbone alone, which is not tested here.
    base_model_tp_plan = base_model_pp_plan = None

    vocab_size: int = CALMAutoencoderConfig.vocab_size
    patch_size: int = 4
    latent_size: int = 128
    head_type: str = "energy"
    noise_size: int = 64
    num_mlp_layers: int = 4
    num_context_layers: int = 0
    num_samples: int = 8
    num_posterior_samples: int = 100
    beta: float = 1.0
    flow_time_logit_mean: float | None = None
    sampling_steps: int | None = None
    distilled_temperature: float | None = None
    autoencoder_config: CALMAutoencoderConfig = None  # pyright: ignore[reportAssignmentType] (or its fields, in a dict)
    prompt_filler_token_id: int | None = None

    def __setattr__(self, name, value):
        with value_errors():
            super().__setattr__(name, value)

    def __post_init__(self, **kwargs):
        nested = self.autoencoder_config
        if nested is None:
            nested = {name: getattr(self, name) for name in ("patch_size", "latent_size", "vocab_size")}
        if isinstance(nested, dict):
            self.autoencoder_config = CALMAutoencoderConfig(**nested)
        self.check()
        with value_errors():
            super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raises `ValueError` for the first field that makes no sense."""
        check_types(self)
        own = ("patch_size", "latent_size", "noise_size", "num_posterior_samples", "intermediate_size")
        for name in (*own, "num_attention_heads", "max_position_embeddings"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1.")
        check_layers(self, num_hidden_layers=1, num_mlp_layers=1, num_context_layers=0)
        if HEADS:
            require(self.head_type in HEADS, f"head_type={self.head_type!r}: must be one of {tuple(HEADS)}.")
            HEADS[self.head_type].check(self)
        require(0 < self.beta < 2, f"beta={self.beta}: must lie in (0, 2), where the energy score is strictly proper.")
        lowest = self.distilled_temperature
        require(lowest is None or 0 < lowest < 1, f"distilled_temperature={lowest}: must lie in (0, 1), or be None.")
        steps = self.sampling_steps
        require(steps is None or steps >= 1, f"sampling_steps={steps}: must be at least 1, or None for the default.")
        for name in ("patch_size", "latent_size", "vocab_size"):
            own, nested = getattr(self, name), getattr(self.autoencoder_config, name)
            require(own == nested, f"{name}={own}, but the autoencoder's is {nested}: they must be equal.")
        for name in ("prompt_filler_token_id", "pad_token_id", "bos_token_id"):
            is_known = (token := getattr(self, name)) is None or 0 <= token < self.vocab_size
            require(is_known, f"{name}={token}: must be an id below vocab_size={self.vocab_size}.")

    def to_dict(self):
        output = super().to_dict()
        output["autoencoder_config"] = self.autoencoder_config.to_dict()
        output["autoencoder_config"].pop("auto_map")
        # Every copy names its own code: a class loaded from the Hub would leave "repository--module.Class" here.
        output["auto_map"] = dict(AUTO_MAP)
        return output

    def to_diff_dict(self):
        """Returns what config.json holds: of the autoencoder, too, only what differs from its defaults."""
        output = super().to_diff_dict() | {"autoencoder_config": self.autoencoder_config.to_diff_dict()}
        output["autoencoder_config"].pop("auto_map")
        return output


CALMAutoencoderConfig.register_for_auto_class()
CALMConfig.register_for_auto_class()
