"""The room for upstream: every hook of transformers' `generate` that CALM overrides, and nothing of our own loop.

`generate` prepares a call, asks a model's hooks on the way, and dispatches greedy search and sampling to `_sample`,
which hands the call on to `write_patches` (generation_calm.py). Everything else is refused in one sentence, before any
work. Names with a leading underscore are upstream's own: tests/test_upstream.py compares their signatures and callers
with those recorded for the supported versions. Axes: B batch, L tokens.
"""

import copy
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import CompileConfig, GenerationConfig, GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel

from .configuration_calm import CALMConfig
from .generation_calm_virtual_tokens import num_virtual_patches

if TYPE_CHECKING:  # the class that the hooks are mixed into is a model, too

    class _Base(PreTrainedModel, GenerationMixin): ...
else:
    _Base = GenerationMixin


def cache_argument(forward: Callable) -> str:
    """The name of a forward's argument for its cache: "cache", or "past_key_values" before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


CACHE_ARGUMENT = cache_argument(LlamaModel.forward)  # upstream's, in calls, outputs and the arguments of generate()
TOKENS = (
    "CALM has no token probabilities for it to act on; temperature, top_k, top_p and min_p act on candidates, "
    "penalties and bans of tokens on the decoder's logits."
)
MODES = (
    "CALM draws whole patches and decodes in no other way; use do_sample=True with a temperature, or do_sample=False."
)
SCORES = "CALM has no token logits to return; output_scores=True returns each step's candidates."

# The fields of GenerationConfig in transformers 5.17.0 and 5.24.0, by what becomes of them.
LENGTH_SETTINGS = (
    *("eos_token_id", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings"),
)
PROCESSOR_SETTINGS = (  # act on the decoder's logits, position by position
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    "remove_invalid_values",
)
USED_SETTINGS = (
    *LENGTH_SETTINGS,
    *PROCESSOR_SETTINGS,
    *("do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("bos_token_id", "pad_token_id", "num_return_sequences", "prefill_chunk_size"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
)
HARMLESS_SETTINGS = (  # nothing on our way reads them
    *("transformers_version", "_from_model_config", "_commit_hash", "renormalize_logits", "decoder_start_token_id"),
    *("early_stopping", "length_penalty", "diversity_penalty", "low_memory", "continuous_batching_config"),
    *("assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind", "target_lookbehind"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "max_matching_ngram_size", "speculation_type"),
)
UNSUPPORTED_SETTINGS = {  # name → the sentence, and the values beside None at which it asks for nothing
    "top_h": (TOKENS,),
    "typical_p": (TOKENS, 1.0),
    "epsilon_cutoff": (TOKENS, 0.0),
    "eta_cutoff": (TOKENS, 0.0),
    "encoder_repetition_penalty": (TOKENS, 1.0),
    "encoder_no_repeat_ngram_size": (TOKENS, 0),
    "guidance_scale": (TOKENS, 1.0),
    "watermarking_config": (TOKENS,),
    "token_healing": (TOKENS, False),
    "num_beams": (MODES, 1),
    "num_beam_groups": (MODES, 1),
    "constraints": (MODES,),
    "force_words_ids": (MODES,),
    "penalty_alpha": (MODES, 0.0),
    "dola_layers": (MODES,),
    "is_assistant": (MODES, False),
    "prompt_lookup_num_tokens": (MODES,),
    "assistant_early_exit": (MODES,),
    "use_mtp": (MODES, False),
    "output_logits": (SCORES, False),
}
GENERATION_SETTINGS = {*USED_SETTINGS, *HARMLESS_SETTINGS, *UNSUPPORTED_SETTINGS}
MASKED_ATTENTION = ("sdpa", "eager")  # implementations that take a mask of our own making
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # the others depend on the longest row of a pass
SUMMABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes
SAMPLE_SIZE = 64  # values of a weight


@dataclass(frozen=True)
class GenerateCall:
    """What upstream prepared for one call of `generate`, beside the settings and the inputs.

    Args:
        stopping_criteria: asked after each token.
        goes_on: given whether this process has finished and a device, whether a further step must be taken: under
            FSDP and ZeRO all processes take the same number.
        processors: the number of a row and the length of its prompt → its logits processors; `None` where there are
            none.
        pad_token, bos_token (scalars), eos_tokens (`(E,)`): ids, or `None`.
        streamer: gets each token.
        synced_gpus: whether other processes wait for this one's forward passes.
        compile_config: how steps are compiled; `None` leaves them as they are.
    """

    stopping_criteria: Callable[[Tensor, None], Tensor]
    goes_on: Callable[[bool, torch.device], bool]
    processors: Callable[[int, int], LogitsProcessorList] | None = None
    pad_token: Tensor | None = None
    bos_token: Tensor | None = None
    eos_tokens: Tensor | None = None
    streamer: BaseStreamer | None = None
    synced_gpus: bool = False
    compile_config: CompileConfig | None = None


def execution_device(module: nn.Module) -> torch.device | None:
    """The device that accelerate's hooks move a module's weights to, of the first that have such a hook."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):  # several are one that holds them
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def non_finite_weight(model: nn.Module) -> str | None:
    """The name of the first parameter that holds NaN or infinity; `None` where there is none.

    Sums tell, read once for all of them. Weights that are quantised, offloaded or sharded are not looked at.
    """
    weights = {
        name: parameter.data
        for name, parameter in model.named_parameters()
        if type(parameter.data) is Tensor and parameter.dtype in SUMMABLE and parameter.device.type != "meta"
    }
    sums = [weight.sum(dtype=torch.float32).nan_to_num(torch.inf, torch.inf) for weight in weights.values()]
    if sums and bool(torch.stack([each.to(sums[0].device) for each in sums]).isfinite().all()):
        return None
    return next((name for name, weight in weights.items() if not bool(weight.isfinite().all())), None)


def _sample(weight: Tensor) -> Tensor:
    return weight.detach().flatten()[:: max(1, weight.numel() // SAMPLE_SIZE)].cpu().clone()


class OffloadableModel(PreTrainedModel):
    """A model that knows what upstream's doesn't: where inputs belong when weights are offloaded, and whether its
    weights are those of a model that was trained."""

    _checked: tuple = ()  # the weights that were found finite
    _filled: dict[str, Tensor] = {}  # of the weights that were in no file: some of the values that they got instead

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where inputs belong. Offloaded weights are on "meta" between their layers' forwards; pipelines, and callers
        that write `ids.to(model.device)`, need a device that holds values."""
        device = super().device
        return execution_device(self) or device if device.type == "meta" else device

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs) -> Any:
        """As upstream, which initialises weights that no file has; they are noted for `check_weights`."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # pyright: ignore
        missing = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
        weights = {name: weight for name, weight in model.named_parameters() if name in missing}
        model._filled = {name: _sample(weight) for name, weight in weights.items() if weight.device.type != "meta"}
        return (model, info) if output_loading_info else model

    def check_weights(self) -> None:
        """Makes sure that the weights can be used. They are read once, and again when some have been changed.

        Raises:
            ValueError: one of them was in no file and is as it was initialised, or holds NaN or infinity; the
                sentence names it.
        """
        weights = dict(self.named_parameters())
        filled = [n for n, values in self._filled.items() if n in weights and torch.equal(_sample(weights[n]), values)]
        if filled:
            others = f" and of {len(filled) - 1} more" if len(filled) > 1 else ""
            raise ValueError(
                f"The model was loaded without values of {filled[0]}{others}, which are as they were initialised: "
                "load a complete model, or train this one first."
            )
        state = [(id(w), w.dtype, 0 if w.is_inference() else w._version) for w in weights.values()]
        if (*state,) == self._checked:
            return
        if (name := non_finite_weight(self)) is not None:
            raise ValueError(
                f"The weight {name} holds NaN or infinity, so that nothing could be written but one token: load other "
                "weights, in float16 perhaps bfloat16 ones."
            )
        self._checked = (*state,)


class RowProcessors(LogitsProcessorList):
    """Upstream's processors of a whole batch, for whoever asks for them, and those of each row by itself: `of_row`
    takes its number and the length of its prompt."""

    def __init__(self, processors: list, of_row: Callable[[int, int], LogitsProcessorList]):
        super().__init__(processors)
        self.of_row = of_row


class _ViewForUpstream:
    """A model as upstream's preparations take it: with positions that count tokens, and whatever they note down kept
    to this call. The model itself stays as it is, for other threads may be generating with it."""

    def __init__(self, model):
        self.model, self.config = model, copy.copy(model.config)
        self.config.max_position_embeddings *= model.config.patch_size

    def __getattr__(self, name):
        attribute = getattr(self.model, name)
        is_own_method = inspect.ismethod(attribute) and attribute.__self__ is self.model
        return types.MethodType(attribute.__func__, self) if is_own_method else attribute


def checked_processors(processors) -> list:
    """A caller's `logits_processor` as a list; `ValueError` where it is a single one, or holds something else."""
    given = [] if processors is None else processors
    if isinstance(given, list | tuple) and all(callable(each) or hasattr(each, "after_prompt") for each in given):
        return list(given)
    raise ValueError(f"logits_processor={given!r}: must be a list of processors, as logits_processor=[processor].")


def checked_ids(inputs: Tensor, mask: Tensor | None, vocab_size: int, method: str = "generate()") -> Tensor:
    """The prompts' ids (B, L), int64.

    Raises:
        ValueError: not a batch of ids of the vocabulary, or a mask of another shape.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 2:
        what = f"a tensor of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"{method} got {what}: it takes ids as a tensor of shape (batch, length).")
    if inputs.shape[0] == 0:
        raise ValueError(f"{method} got an empty batch: pass at least one prompt.")
    is_integer = not inputs.dtype.is_floating_point and not inputs.dtype.is_complex and inputs.dtype != torch.bool
    if not is_integer and inputs.numel():  # a tokenizer makes an empty float tensor of empty texts
        raise ValueError(f"{method} got ids of type {inputs.dtype}: token ids are whole numbers, as torch.long.")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"{method} got an attention_mask that is a {type(mask).__name__}: it takes a tensor.")
    if mask is not None and mask.shape != inputs.shape:
        raise ValueError(
            f"{method} got an attention_mask of shape {tuple(mask.shape)}, but ids of shape "
            f"{tuple(inputs.shape)}: they must be equal."
        )
    inputs = inputs.long()
    ids = inputs if mask is None else inputs[mask.bool()]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        bad = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
        raise ValueError(f"{method} got token id {bad}, outside the vocabulary 0 … {vocab_size - 1}.")
    return inputs


class PatchGenerationMixin(_Base):
    """`GenerationMixin` for a model that writes whole patches: the hooks, around two methods of the model."""

    config: CALMConfig
    generate: Callable[..., Any]  # upstream's, which types `self` as a protocol that no model satisfies
    check_weights: Callable[[], None]
    check_settings: Callable[[GenerationConfig], None]  # raises ValueError where settings of our own make no sense
    write_patches: Callable[..., Any]  # the loop: prompts (B, L) → prompts and new tokens, as `_sample` returns them

    @property
    def _upstream(self) -> Any:
        """Upstream's own hooks. It types their `self` as a protocol that no model satisfies, hence `Any`."""
        return super()

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None,
        stopping_criteria: Callable[[Tensor, None], Tensor],
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs,
    ) -> Any:
        processors = None
        if logits_processor:  # a list that is not from our hook is every row's
            processors = getattr(logits_processor, "of_row", lambda row, length: logits_processor)
        call = GenerateCall(
            stopping_criteria=stopping_criteria,
            goes_on=lambda finished, device: self._has_unfinished_sequences(finished, synced_gpus, device=device),
            processors=processors,
            pad_token=generation_config._pad_token_tensor,
            bos_token=generation_config._bos_token_tensor,
            eos_tokens=generation_config._eos_token_tensor,
            streamer=streamer,
            synced_gpus=synced_gpus,
            compile_config=None if generation_config.disable_compile else generation_config.compile_config,
        )
        return self.write_patches(input_ids, generation_config, call, model_kwargs)

    def _validate_model_kwargs(self, model_kwargs):
        generator = model_kwargs.get("generator")
        generators = generator if isinstance(generator, list | tuple) else [] if generator is None else [generator]
        if not all(isinstance(each, torch.Generator) for each in generators):
            raise ValueError(
                f"generator={generator!r}: must be a torch.Generator on the model's device, as "
                "torch.Generator(device).manual_seed(0), or a list of them, one a row."
            )
        if num_virtual_patches(self):  # then upstream would look for our own arguments in PEFT's method
            own = inspect.signature(getattr(type(self), "prepare_inputs_for_generation")).parameters  # noqa: B009
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        self._upstream._validate_model_kwargs(model_kwargs)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs: dict[str, Any]):
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "generate() got inputs_embeds: CALM packs token ids into patches and feeds generated ids back, so "
                "pass input_ids instead."
            )
        cache = model_kwargs.get(CACHE_ARGUMENT)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "generate() got a filled cache: how a prompt is cut into patches depends on its whole "
                "length, so pass the whole prompt without it."
            )
        inputs, name, model_kwargs = self._upstream._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        inputs = checked_ids(inputs, model_kwargs.get("attention_mask"), self.config.vocab_size)
        if inputs.shape[1] == 0 and len(inputs) > 1:
            # Upstream looks at the last column of a batch. Empty prompts are all alike: one, expanded later.
            model_kwargs["num_empty_prompts"] = len(inputs)
            inputs = inputs[:1]
            if model_kwargs.get("attention_mask") is not None:
                model_kwargs["attention_mask"] = model_kwargs["attention_mask"][:1]
        return inputs, name, model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, num_empty_prompts=1, **model_kwargs
    ):
        return self._upstream._expand_inputs_for_generation(
            expand_size * num_empty_prompts, is_encoder_decoder, input_ids, **model_kwargs
        )

    def _get_deprecated_gen_repo(self, generation_mode: GenerationMode, *args, **kwargs) -> None:
        """None; another mode is refused here, where upstream would send the reader to a repository that decodes so."""
        if generation_mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
            raise ValueError(
                f"CALM has no {generation_mode.value.replace('_', ' ')}: it draws whole patches and has no token "
                "probabilities; use do_sample=True with a temperature, or do_sample=False."
            )

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        for name, (why, *off) in UNSUPPORTED_SETTINGS.items():
            value = getattr(generation_config, name, None)
            if value is not None and value not in off:
                said = f"={value}" if isinstance(value, bool | int | float | str | list | tuple | dict) else ""
                raise ValueError(f"{name}{said}: {why}")
        chunk = generation_config.prefill_chunk_size
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
            raise ValueError(f"prefill_chunk_size={chunk!r}: must be a positive whole number of tokens, or None.")
        self.check_settings(generation_config)
        self.check_weights()

    def _prepare_generation_config(self, generation_config, *args, **kwargs):
        prepared, model_kwargs = self._upstream._prepare_generation_config(generation_config, *args, **kwargs)
        if all(getattr(each, "top_k", None) is None for each in (generation_config, self.generation_config)):
            prepared.top_k = kwargs.get("top_k")  # upstream puts 50 where nobody asked for any
        if "cache" in model_kwargs:  # before 5.24, upstream would make another
            model_kwargs[CACHE_ARGUMENT] = model_kwargs.pop("cache")
        return prepared, model_kwargs

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        logits_processor: Sequence | None = None,
        device: torch.device | None = None,
        **kwargs,
    ) -> RowProcessors:
        """The processors of each row as upstream would make them if the row were alone.

        Sampling and lengths are none of theirs: what acts on a distribution acts on candidates, see `PatchSampling`.
        """
        settings = copy.copy(generation_config)
        settings.do_sample, settings.min_length, settings.min_new_tokens, settings.renormalize_logits = (False,) * 4
        make, allows = self._upstream._get_logits_processor, prefix_allowed_tokens_fn
        given = checked_processors(logits_processor)

        def of_length(length: int, allowed: Callable | None) -> LogitsProcessorList:
            own = copy.copy(settings)
            own.max_length += length - input_ids_seq_length
            # One that has a method `after_prompt` is asked for the processor of texts with a prompt so long.
            custom = [each.after_prompt(length) if hasattr(each, "after_prompt") else each for each in given]
            return make(own, length, None, allowed, LogitsProcessorList(custom), device)

        def of_row(row: int, length: int) -> LogitsProcessorList:
            # Upstream numbers a row's candidates.
            return of_length(length, None if allows is None else lambda _, ids: allows(row, ids))  # pyright: ignore

        return RowProcessors(of_length(max(input_ids_seq_length, 1), allows), of_row)  # an empty prompt gets a BOS

    def compute_transition_scores(self, *args, **kwargs):
        """Refused: there is no score a token."""
        raise ValueError(
            "compute_transition_scores: CALM has no token probabilities; model.compute_patch_scores(outputs.scores) "
            "gives the logarithm of each written patch's weight among its step's candidates."
        )

    def _prepare_generated_length(self, *args, **kwargs):
        return self._upstream._prepare_generated_length.__func__(_ViewForUpstream(self), *args, **kwargs)

    def _get_stopping_criteria(self, *args, **kwargs):
        return self._upstream._get_stopping_criteria.__func__(_ViewForUpstream(self), *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        patches = self._cached_patches(max_cache_length)
        if getattr(generation_config, "max_cache_len", None) is not None:  # tokens, too
            generation_config = copy.copy(generation_config)
            generation_config.max_cache_len = self._cached_patches(generation_config.max_cache_len)
        prepare = self._upstream._prepare_cache_for_generation.__func__
        return prepare(_ViewForUpstream(self), generation_config, model_kwargs, generation_mode, batch_size, patches)

    def _cached_patches(self, num_tokens: int) -> int:
        return num_virtual_patches(self) + -(-num_tokens // self.config.patch_size) + 1

    def generate_batch(self, *args, **kwargs):
        raise NotImplementedError("CALM has no continuous batching: use generate() with a left-padded batch.")

    @property
    def init_continuous_batching(self):  # type: ignore[override]
        """Absent, so that servers which ask for it with `hasattr` generate in the ordinary way."""
        raise AttributeError("CALM has no continuous batching: use generate() with a left-padded batch.")

    continuous_batching_context_manager = init_continuous_batching  # type: ignore[assignment]
