"""A step of `generate` as one graph: backbone, head, decoding and the choice of a patch, compiled together.

`generate(..., cache_implementation="static", compile_config=CompileConfig(...))` uses it. The graph has fixed shapes:
all rows are sampled in every step, finished ones too, and each row draws in one block all samples that the method may
need. So it is compiled once for a batch size, a cache length and sampling options, and nothing in it waits for the
device. Its random numbers are drawn before it, in the order in which the eager step draws them.

Axes: B batch, P patches that the cache has room for, K tokens per patch, D hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import CompileConfig

from .generation_calm_algorithms import inverse_temperature
from .generation_calm_samplers import PatchSampling, PredrawnRandomness, Randomness
from .generation_calm_upstream import SUPPORTED_ATTENTION, SUPPORTED_ROPE_TYPES
from .kernels_calm import arange

if TYPE_CHECKING:
    from .generation_calm_candidates import PatchSample
    from .generation_calm_sequences import GenerationState

# Compiled steps by model, sampling options and configuration. Not kept in the model, which is pickled and copied.
COMPILED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
MAX_COMPILED_STEPS = 64  # of a model


class CompiledStep:
    """Takes the steps of one call of `generate`: the first, which reads the prompt, eagerly, the others as a graph.

    `first_step` is an `EagerStep` whose inputs are the whole prompt. With `forbids` the graph always takes a mask of
    forbidden tokens. Raises ValueError for a model or a cache that can't be compiled.
    """

    def __init__(self, first_step: Any, config: CompileConfig, forbids: bool):
        model = first_step.model
        cache, prompt = first_step.cache, first_step.inputs
        if cache is None or not getattr(cache, "is_compileable", False):
            raise ValueError(
                'compile_config: steps are compiled with a cache of fixed size; add cache_implementation="static".'
            )
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ValueError("compile_config: a model that is offloaded or on several devices can't be compiled.")
        attention, rotation = model.config._attn_implementation, model.model.rotary_emb.rope_type
        if attention not in SUPPORTED_ATTENTION or rotation not in SUPPORTED_ROPE_TYPES:
            raise ValueError(
                f"compile_config: attn_implementation={attention!r} with rope_type={rotation!r} can't be compiled; it "
                f"takes one of {SUPPORTED_ATTENTION} with one of {SUPPORTED_ROPE_TYPES}."
            )
        self.first_step, self.model, self.cache = first_step, model, cache
        self.sampling, self.generator = first_step.sampling, first_step.generator
        self.step = _compiled(model, config, self.sampling)
        (num_rows, num_tokens), device = prompt["input_ids"].shape, prompt["input_ids"].device
        num_patches, mask_BP = num_tokens // model.config.patch_size, prompt["attention_mask"]
        no_padding_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.padding_B = no_padding_B if mask_BP is None else num_patches - mask_BP.sum(-1)
        self.position_1 = torch.full((1,), num_patches, device=device)
        self.positions_P = arange(getattr(cache.layers[0], "max_cache_len"), device)  # noqa: B009 (of static layers)
        shape = model.config.patch_size, model.config.vocab_size
        self.nothing_forbidden_KV = torch.zeros(shape, dtype=torch.bool, device=device) if forbids else None
        self.unread_BK: Tensor | None = None  # each row's last patch; None before the first step

    def set_next_inputs(self, patches_BK: Tensor) -> None:
        """Sets what the next step reads: each row's new patch."""
        self.unread_BK = patches_BK

    def __call__(self, state: GenerationState, forbidden_KV: Tensor | None) -> PatchSample:
        """Samples the next patch of each row, finished ones too."""
        if self.unread_BK is None:
            return self.first_step(state, forbidden_KV)
        noise = draw_step_noise(self.model, self.sampling, len(self.unread_BK), self.generator)
        forbidden_KV = self.nothing_forbidden_KV if forbidden_KV is None else forbidden_KV
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(specialize_float=True):  # the options are the graph's own, T and all
            arguments = self.unread_BK, self.position_1, self.positions_P, self.padding_B, self.cache
            sample: PatchSample = self.step(*arguments, self.sampling, forbidden_KV, noise)
        self.position_1 = self.position_1 + 1
        # A graph's outputs are overwritten by its next run; `is_exact` is for scores, which it doesn't give.
        return sample._replace(patches=sample.patches.clone())


def _compiled(model: Any, config: CompileConfig, sampling: PatchSampling) -> Callable[..., Any]:
    settings: dict[str, Any] = config.to_dict() | {"fullgraph": True}
    steps = COMPILED.setdefault(model, {})
    key = sampling, repr(sorted(settings.items()))
    if key not in steps:
        if len(steps) >= MAX_COMPILED_STEPS:
            steps.clear()
        step = _step_of(model)
        # PyTorch counts what it compiles by code object, and raises at the ninth: each key has its own.
        code = step.__code__.replace(co_name=f"step_{len(steps)}")
        steps[key] = torch.compile(FunctionType(code, step.__globals__, closure=step.__closure__), **settings)
    return steps[key]


def draw_step_noise(model: Any, sampling: PatchSampling, num_rows: int, generator: Randomness) -> dict[str, Tensor]:
    """Draws the random numbers of one step of `num_rows` rows, as `PredrawnRandomness` takes them."""
    context_BD = torch.empty(num_rows, model.config.hidden_size, dtype=model.dtype, device=model.device)
    num_samples, rows_B = sampling.samples_in_one_block, arange(num_rows, context_BD.device)
    randomness = model.step_randomness(sampling, generator, context_BD)
    noise = randomness.noise_arguments(model.head, context_BD, rows_B, num_samples)
    if "generator" in noise:  # one for all rows, which gives no tensors yet
        noise = model.head.predrawn_noise(num_samples, num_rows, context_BD, noise["generator"])
    if sampling.do_sample and not sampling.takes_single_sample:
        is_whole = inverse_temperature(sampling.temperature).is_integer() and not sampling.proposes
        if not sampling.uses_batch_rule and not is_whole:
            noise["uniform"] = randomness.numbers("uniform", rows_B, num_samples)
        noise["exponential"] = randomness.numbers("exponential", rows_B, num_samples)
    return noise


def _step_of(model: Any):
    """Returns the function that is compiled: it reads a patch of each row and samples the next.

    The patch's position in the cache is a tensor. The function holds the model weakly, as `COMPILED` does.
    """
    reference = weakref.ref(model)

    def step(
        patches_BK: Tensor,
        position_1: Tensor,
        positions_P: Tensor,
        padding_B: Tensor,
        cache: Cache,
        sampling: PatchSampling,
        forbidden_KV: Tensor | None,
        noise: dict[str, Tensor],
    ) -> PatchSample:
        calm: Any = reference()
        is_seen_BP = (positions_P <= position_1) & (positions_P >= padding_B[:, None])
        hidden = torch.finfo(calm.dtype).min
        mask_B11P = torch.zeros_like(is_seen_BP, dtype=calm.dtype).masked_fill(~is_seen_BP, hidden)[:, None, None]
        position_B1 = (position_1 - padding_B)[:, None]
        hidden_BD = calm(patches_BK, mask_B11P, position_B1, cache=cache, use_cache=True).last_hidden_state[:, -1]
        sample = calm.sample_patches(hidden_BD, sampling, PredrawnRandomness(noise), forbidden_KV, one_block=True)
        return sample._replace(candidates=None, index=None)

    return step
