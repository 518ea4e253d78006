"""The hooks of upstream's (transformers') `generate` that CALM overrides, and PEFT's virtual tokens.

`generate` calls the hooks of `PatchGenerationMixin` in their order there: they prepare and check the configuration,
the inputs, the lengths, the cache, logits processors and stopping criteria. The last one, `_sample`, passes all this
as a `GenerateCall` to `generate_patches` (generation_calm.py). What isn't supported raises a one-line error
before any work. Names with a leading underscore are upstream's own: tests/test_upstream.py compares their signatures
and callers with those recorded for the supported versions.

Axes: B batch, L tokens, P patches, K tokens per patch.
"""

import contextlib
import copy
import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import CompileConfig, GenerationConfig, GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.utils import logging

from .configuration_calm import CALMConfig
from .generation_calm_samplers import PatchSampling

UPSTREAM: Any = GenerationMixin  # its hooks' `self` is typed as a protocol that no model satisfies


def cache_argument(forward: Callable) -> str:
    """Returns the name of a forward's argument for its cache: "cache", before transformers 5.24 "past_key_values"."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


CACHE_ARGUMENT = cache_argument(LlamaModel.forward)  # upstream's, in calls, outputs and the arguments of generate()
TOKENS = (
    "CALM has no token probabilities for it to act on; temperature, top_k, top_p and min_p act on candidates, "
    "penalties and bans of tokens on the decoder's logits."
)
MODES = "CALM only samples whole patches: use do_sample=True with a temperature, or do_sample=False."
SCORES = "CALM has no token logits to return; output_scores=True returns each step's candidates."

# The fields of GenerationConfig in transformers 5.17.0 and 5.24.0, by how they are treated.
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
HARMLESS_SETTINGS = (  # nothing that runs for CALM reads them
    *("transformers_version", "_from_model_config", "_commit_hash", "renormalize_logits", "decoder_start_token_id"),
    *("early_stopping", "length_penalty", "diversity_penalty", "low_memory", "continuous_batching_config"),
    *("assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind", "target_lookbehind"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "max_matching_ngram_size", "speculation_type"),
)
# Name → the error's sentence, and the values beside None that change nothing.
UNSUPPORTED_SETTINGS: dict[str, tuple] = {
    **dict.fromkeys(("top_h", "watermarking_config"), (TOKENS,)),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), (TOKENS, 1.0)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), (TOKENS, 0.0)),
    **{"encoder_no_repeat_ngram_size": (TOKENS, 0), "token_healing": (TOKENS, False)},
    **dict.fromkeys(("constraints", "force_words_ids", "prompt_lookup_num_tokens"), (MODES,)),
    **dict.fromkeys(("dola_layers", "assistant_early_exit"), (MODES,)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (MODES, 1)),
    **dict.fromkeys(("is_assistant", "use_mtp"), (MODES, False)),
    **{"penalty_alpha": (MODES, 0.0), "output_logits": (SCORES, False)},
}
# What upstream compares once it generates, or the hooks here compute with.
COUNT_SETTINGS = ("max_length", "max_new_tokens", "max_cache_len", "min_length", "min_new_tokens")
COUNT_SETTINGS += ("num_beams", "num_return_sequences", "no_repeat_ngram_size")
ID_SETTINGS = ("eos_token_id", "forced_eos_token_id", "bos_token_id", "forced_bos_token_id", "pad_token_id")
ID_SETTINGS += ("decoder_start_token_id",)
GENERATION_SETTINGS = {*USED_SETTINGS, *HARMLESS_SETTINGS, *UNSUPPORTED_SETTINGS}
# Of compiled steps, of the server and of ONNX export: implementations that take a custom 4-D mask, and rotations that
# don't depend on the longest row of a batch.
SUPPORTED_ATTENTION = ("sdpa", "eager")
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
logger = logging.get_logger(__name__)
NEEDS_CACHE = "virtual tokens (PEFT's prompt tuning, p-tuning, prefix tuning) are stored in the cache"


@dataclass(frozen=True)
class GenerateCall:
    """Holds what upstream prepared for one call of `generate`, besides the settings and the inputs.

    Args:
        stopping_criteria: upstream's `StoppingCriteriaList`, evaluated for each token.
        should_continue: (whether this process has finished, device=) → whether another step must be taken: under FSDP
            and ZeRO all processes take the same number.
        processors: the number of a row and the length of its prompt → its logits processors; `None` without any.
        pad_token, bos_token (scalars), eos_tokens (`(E,)`): ids, or `None`.
        synced_gpus: whether other processes wait for this one's forward passes.
        compile_config: how steps are compiled; `None` runs them eagerly.
    """

    stopping_criteria: Any
    should_continue: Callable[..., bool]
    processors: Callable[[int, int], LogitsProcessorList] | None = None
    pad_token: Tensor | None = None
    bos_token: Tensor | None = None
    eos_tokens: Tensor | None = None
    streamer: BaseStreamer | None = None
    synced_gpus: bool = False
    compile_config: CompileConfig | None = None


class RowProcessors(LogitsProcessorList):
    """A batch's logits processors, with `of_row`: number and prompt length of a row → the processors it has alone."""

    of_row: Callable[[int, int], LogitsProcessorList]


class _TokenPositionsProxy:
    """A proxy of the model whose `max_position_embeddings` counts tokens; attributes that upstream sets stay on it.

    The model itself doesn't change, for other threads may be generating with it.
    """

    def __init__(self, model):
        self.model, self.config = model, copy.copy(model.config)
        vars(self.config)["max_position_embeddings"] *= model.config.patch_size  # nothing to validate

    def __getattr__(self, name):
        attribute = getattr(self.model, name)  # a method of the model gets the proxy as its `self`
        is_own_method = inspect.ismethod(attribute) and attribute.__self__ is self.model
        return types.MethodType(attribute.__func__, self) if is_own_method else attribute


def checked_ids(inputs: Tensor, mask: Tensor | None, vocab_size: int, method: str = "generate()") -> Tensor:
    """Returns the prompts' ids (B, L), int64; raises ValueError if an id or the mask's shape is invalid."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 2:
        what = f"a tensor of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"{method} got {what}: it takes ids as a tensor of shape (batch, length).")
    if inputs.shape[0] == 0:
        raise ValueError(f"{method} got an empty batch: pass at least one prompt.")
    is_integer = not inputs.dtype.is_floating_point and not inputs.dtype.is_complex and inputs.dtype != torch.bool
    if not is_integer and inputs.numel():  # a tokenizer makes an empty float tensor of empty texts
        raise ValueError(f"{method} got ids of type {inputs.dtype}: token ids are integers, as torch.long.")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"{method} got an attention_mask that is a {type(mask).__name__}: it takes a tensor.")
    if mask is not None and mask.shape != inputs.shape:
        shapes = f"shape {tuple(mask.shape)}, but ids of shape {tuple(inputs.shape)}"
        raise ValueError(f"{method} got an attention_mask of {shapes}: they must be equal.")
    inputs = inputs.long()
    ids = inputs if mask is None else inputs[mask.bool()]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        bad = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
        raise ValueError(f"{method} got token id {bad}, outside the vocabulary 0 … {vocab_size - 1}.")
    return inputs


@contextlib.contextmanager
def naming(config: Any, names: Iterable[str]):
    """Turns an error of upstream's, of any type, into a ValueError that names the settings that it may be about."""
    try:
        yield
    except Exception as error:
        given = {name: value for name in names if (value := getattr(config, name, None)) is not None}
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(" ".join(f"{shown}: {error}".split())) from error


def check_settings(settings: dict[str, Any], vocab_size: int, device: torch.device) -> None:
    """Raises ValueError that names the first setting of `generate` that CALM doesn't have, or of another type."""
    for name, (reason, *neutral_values) in UNSUPPORTED_SETTINGS.items():
        value = settings.get(name)
        if value is not None and value not in neutral_values:
            shown = f"={value}" if isinstance(value, bool | int | float | str | list | tuple | dict) else ""
            raise ValueError(f"{name}{shown}: {reason}")
    for name, kind in (("max_time", Real), *((name, Integral) for name in COUNT_SETTINGS)):
        if not isinstance(settings.get(name), kind | None) or type(settings.get(name)) is bool:
            raise ValueError(f"{name}={settings[name]!r}: must be {'a number' if kind is Real else 'an integer'}.")
    for name in ID_SETTINGS:
        value = settings.get(name)
        value = value.tolist() if isinstance(value, Tensor) else value
        ids: Any = value if isinstance(value, list | tuple) and "eos" in name else [] if value is None else [value]
        are_integers = all(isinstance(each, Integral) and type(each) is not bool for each in ids)
        is_eos = name == "eos_token_id"  # outside the vocabulary it never ends a text
        first, last = (-(2**63), 2**63 - 1) if is_eos else (0, vocab_size - 1)
        if not are_integers or not all(first <= each <= last for each in ids):
            kind = "an integer of 64 bits" if is_eos else "an id of the vocabulary"
            raise ValueError(f"{name}={value!r}: must be {kind}{', or a list of them' * ('eos' in name)}.")
    if str(settings.get("cache_implementation")).startswith("offloaded") and device.type == "cpu":
        raise ValueError("cache_implementation: an offloaded cache needs a model on an accelerator.")


def adapter_of(model) -> Any:
    """Returns PEFT's wrapper of the model if it has virtual tokens, else None.

    Raises ValueError if something else has replaced `prepare_inputs_for_generation`, for it would be ignored.
    """
    replacement = vars(model).get("prepare_inputs_for_generation")
    owner = getattr(replacement, "__self__", None)
    if replacement is None or owner is model:  # as PEFT restores it
        return None
    if not hasattr(owner, "get_prompt"):
        raise ValueError("prepare_inputs_for_generation was replaced: CALM packs patches itself and would ignore it.")
    return owner


def num_virtual_patches(model) -> int:
    """Returns the number of patches of virtual tokens; raises ValueError if they aren't whole patches."""
    adapter = adapter_of(model)
    if adapter is None:
        return 0
    config, patch_size = adapter.active_peft_config, model.config.patch_size
    if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        return config.num_virtual_tokens
    if config.num_virtual_tokens % patch_size:
        raise ValueError(
            f"num_virtual_tokens={config.num_virtual_tokens}: must be divisible by patch_size={patch_size}, for "
            "virtual tokens are packed into whole patches."
        )
    return config.num_virtual_tokens // patch_size


def prefill_virtual_tokens(
    model, inputs: dict[str, Any], cache: Cache | None, compiles: bool, task_ids: Tensor | None = None
) -> dict[str, Any]:
    """Runs the model on its virtual tokens, if it has any, to fill an empty cache.

    Takes `input_ids` (B, P·K), the `attention_mask` (B, P) by patch, or `None`, and `task_ids` (B,) for multitask
    prompt tuning; returns the inputs with a mask that counts the virtual patches. Raises ValueError without a cache,
    or if steps will be compiled.
    """
    num_patches = num_virtual_patches(model)
    if not num_patches:
        return inputs
    if cache is None:
        raise ValueError(f"use_cache=False: {NEEDS_CACHE}, so leave it on.")
    if compiles:
        raise ValueError(f"compile_config: {NEEDS_CACHE} before the padding, which compiled steps don't know.")
    prompt = adapter_of(model).get_prompt(batch_size=len(inputs["input_ids"]), task_ids=task_ids)
    if isinstance(prompt, Tensor):
        model(inputs_embeds=prompt.to(model.dtype), cache=cache, use_cache=True)
    else:
        positions = torch.arange(num_patches, device=inputs["input_ids"].device)
        for index, layer in enumerate(prompt.layers):
            keys, values = layer.keys.to(model.dtype), layer.values.to(model.dtype)
            cache.update(keys, values, index, {"cache_position": positions})
    mask = inputs["attention_mask"]
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(mask), num_patches), mask], dim=1)
    return {**inputs, "attention_mask": mask}


class PatchGenerationMixin(UPSTREAM):
    """`GenerationMixin` for a model that samples whole patches: the hooks, in the order of their calls."""

    config: CALMConfig
    generate_patches: Callable[..., Any]  # the loop over patches, in generation_calm.py
    check_weights: Callable[[], None]  # raises ValueError for unloaded or non-finite weights; of `OffloadableModel`

    def _prepare_generation_config(self, generation_config, *args, **kwargs):
        # None is unset, as it is in a GenerationConfig.
        kwargs = {k: v for k, v in kwargs.items() if v is not None or k not in ("num_beams", "num_return_sequences")}
        given = getattr(generation_config, "__dict__", {}).items()
        settings = {**vars(self.generation_config), **{name: v for name, v in given if v is not None}, **kwargs}
        check_settings(settings, self.config.vocab_size, self.device)
        with naming(types.SimpleNamespace(**settings), {*kwargs} & GENERATION_SETTINGS or GENERATION_SETTINGS):
            prepared, model_kwargs = UPSTREAM._prepare_generation_config(self, generation_config, *args, **kwargs)
        default_top_k = getattr(self.generation_config, "top_k", None)
        if default_top_k is None and getattr(generation_config, "top_k", None) is None:
            prepared.top_k = kwargs.get("top_k")  # None by default, where upstream fills in 50
        if "cache" in model_kwargs:  # before 5.24, upstream would make another
            model_kwargs[CACHE_ARGUMENT] = model_kwargs.pop("cache")
        return prepared, model_kwargs

    def _get_deprecated_gen_repo(self, generation_mode: GenerationMode, *args, **kwargs) -> None:
        """Raises ValueError for beam search and the like: this is the first hook that gets the generation mode.

        Returns None, so that upstream loads no code from elsewhere.
        """
        if generation_mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
            mode = generation_mode.value.replace("_", " ")
            raise ValueError(f"CALM has no {mode}: use do_sample=True with a temperature, or do_sample=False.")

    def _validate_model_kwargs(self, model_kwargs):
        generator = model_kwargs.get("generator")
        generators = generator if isinstance(generator, list | tuple) else [] if generator is None else [generator]
        if set(map(type, generators)) - {torch.Generator}:
            raise ValueError(
                f"generator={generator!r}: must be a torch.Generator on the model's device, as "
                "torch.Generator(device).manual_seed(0), or a list of them, one per row."
            )
        if num_virtual_patches(self):  # then upstream would look for our own arguments in PEFT's method
            known = inspect.signature(getattr(type(self), "prepare_inputs_for_generation")).parameters  # noqa: B009
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in known}
        UPSTREAM._validate_model_kwargs(self, model_kwargs)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        chunk = generation_config.prefill_chunk_size
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or not 0 < chunk < 2**63):
            raise ValueError(f"prefill_chunk_size={chunk!r}: must be a positive integer, in tokens, or None.")
        sampling = PatchSampling.from_generation_config(generation_config)  # raises ValueError for invalid options
        sampling.check_num_rows(generation_config.num_return_sequences or 1)  # before upstream copies the prompt
        known = {*GENERATION_SETTINGS, *PatchSampling.option_names()}
        given = [name for name, value in vars(generation_config).items() if value is not None]
        if unread := ", ".join(name for name in given if name not in known and not name.startswith("_")):
            logger.warning_once(f"The generation configuration has {unread}, which CALM doesn't read.")
        self.check_weights()

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
        inputs, name, model_kwargs = UPSTREAM._prepare_model_inputs(self, inputs, bos_token_id, model_kwargs)
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
        expand_size *= num_empty_prompts
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        with naming(generation_config, LENGTH_SETTINGS):
            return UPSTREAM._prepare_generated_length(_TokenPositionsProxy(self), generation_config, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        # Beside the prompt and the new tokens: virtual tokens, and the patch that fills up the prompt.
        others, patch_size = num_virtual_patches(self) + 1, self.config.patch_size
        patches = -(-max_cache_length // patch_size) + others
        if getattr(generation_config, "max_cache_len", None) is not None:  # tokens, too
            generation_config = copy.copy(generation_config)
            generation_config.max_cache_len = -(-generation_config.max_cache_len // patch_size) + others
            patches = max(patches, generation_config.max_cache_len)
        limit = self.config.max_position_embeddings
        if generation_config.cache_implementation == "static" and patches - others > limit:
            raise ValueError(f"max_new_tokens, max_cache_len: {patches} patches exceed the static cache's {limit}.")
        # The proxy keeps what upstream sets on a model; lengths count patches already.
        return UPSTREAM._prepare_cache_for_generation(
            _TokenPositionsProxy(self), generation_config, model_kwargs, generation_mode, batch_size, patches
        )

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        logits_processor: Sequence | None = None,
        device: torch.device | None = None,
        **kwargs,
    ) -> "RowProcessors":
        """Returns the batch's processors and each row's; sampling settings and lengths act on candidates instead."""
        settings = copy.copy(generation_config)
        settings.do_sample, settings.min_length, settings.min_new_tokens, settings.renormalize_logits = (False,) * 4
        given, allows = logits_processor if logits_processor is not None else [], prefix_allowed_tokens_fn
        for each in given if isinstance(given, list | tuple) else [None]:
            if not callable(each) and not hasattr(each, "after_prompt"):
                raise ValueError(f"logits_processor={given!r}: must be a list of processors, as [processor].")

        def of_length(length: int, allowed: Callable | None) -> LogitsProcessorList:
            row_settings = copy.copy(settings)
            row_settings.max_length += length - input_ids_seq_length
            custom = LogitsProcessorList()
            for each in given:  # `after_prompt`, where a processor has it, returns the one for prompts of this length
                custom.append(each.after_prompt(length) if hasattr(each, "after_prompt") else each)
            with naming(settings, PROCESSOR_SETTINGS):
                return UPSTREAM._get_logits_processor(self, row_settings, length, None, allowed, custom, device)

        def of_row(row: int, length: int) -> LogitsProcessorList:
            # The function gets the row's number, where upstream would pass a candidate's.
            return of_length(length, None if allows is None else lambda _, ids: allows(row, ids))  # pyright: ignore

        processors = RowProcessors(of_length(max(input_ids_seq_length, 1), allows))  # an empty prompt gets a BOS
        processors.of_row = of_row
        return processors

    def _get_stopping_criteria(self, generation_config, *args, **kwargs):
        with naming(generation_config, LENGTH_SETTINGS):
            return UPSTREAM._get_stopping_criteria(_TokenPositionsProxy(self), generation_config, *args, **kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs,
    ) -> Any:
        config, processors = generation_config, None
        if logits_processor:  # a list that is not from our hook applies to every row
            processors = getattr(logits_processor, "of_row", lambda row, length: logits_processor)
        continues = partial(self._has_unfinished_sequences, synced_gpus=synced_gpus)
        tokens = config._pad_token_tensor, config._bos_token_tensor, config._eos_token_tensor
        compile_config = None if config.disable_compile else config.compile_config
        call = GenerateCall(stopping_criteria, continues, processors, *tokens, streamer, synced_gpus, compile_config)
        return self.generate_patches(input_ids, config, call, model_kwargs)

    def compute_transition_scores(self, *args, **kwargs):
        """Raises ValueError: there are no token scores."""
        raise ValueError(
            "compute_transition_scores: CALM has no token probabilities; model.compute_patch_scores(outputs.scores) "
            "gives the logarithm of each chosen patch's weight among its step's candidates."
        )

    def generate_batch(self, *args, **kwargs):
        raise NotImplementedError("CALM has no continuous batching: use generate() with a left-padded batch.")

    @property
    def init_continuous_batching(self):
        """Raises AttributeError, so that servers which look for it with `hasattr` use `generate`."""
        raise AttributeError("CALM has no continuous batching: use generate() with a left-padded batch.")

    continuous_batching_context_manager = init_continuous_batching
