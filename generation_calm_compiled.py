"""A step of `generate` as one graph: backbone, head, decoding and the choice of a patch, compiled together.

`generate(..., cache_implementation="static", compile_config=CompileConfig(...))` asks for it. The graph has fixed
shapes: all rows draw in every step, finished ones too, and each row draws at once what the method draws at most. So it
is compiled once for a batch size, a cache length and a law, and holds nothing that waits for the device. Its random
numbers are drawn before it, in the order in which the uncompiled step draws them.

Axes: B batch, P patches that the cache has room for, K tokens per patch, D hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import CompileConfig

from .generation_calm_randomness import PredrawnRandomness, Randomness, StepRandomness
from .generation_calm_samplers import BlockSchedule, OneBlock, PatchSampling
from .generation_calm_upstream import FIXED_ROTATIONS, MASKED_ATTENTION
from .generation_calm_weights import inverse_temperature
from .kernels_calm import arange

# Of each model its compiled steps, by law and configuration. Not kept in the model, which is pickled and copied.
COMPILED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
MAX_COMPILED_STEPS = 64


class CompiledSteps:
    """The steps of one call after its first, which reads the prompt.

    Args:
        model: that writes.
        cache: a static one.
        sampling: how patches are chosen.
        config: of `torch.compile`.
        prompt: what the first step reads, `input_ids` and the `attention_mask` by patch or `None`.
        forbids: whether tokens may be forbidden in any step: the graph then always asks which.

    Raises:
        ValueError: a model or a cache that can't be compiled.
    """

    def __init__(
        self,
        model: Any,
        cache: Cache | None,
        sampling: PatchSampling,
        config: CompileConfig,
        prompt: dict[str, Any],
        forbids: bool = False,
    ):
        if cache is None or not getattr(cache, "is_compileable", False):
            raise ValueError(
                'compile_config: steps are compiled with a cache of fixed size; add cache_implementation="static".'
            )
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ValueError("compile_config: a model that is offloaded or on several devices can't be compiled.")
        attention, rotation = model.config._attn_implementation, model.model.rotary_emb.rope_type
        if attention not in MASKED_ATTENTION or rotation not in FIXED_ROTATIONS:
            raise ValueError(
                f"compile_config: attn_implementation={attention!r} with rope_type={rotation!r} can't be compiled; it "
                f"takes one of {MASKED_ATTENTION} with one of {FIXED_ROTATIONS}."
            )
        self.model, self.cache, self.sampling = model, cache, sampling
        self.step = _compiled(model, config, sampling)
        (num_rows, num_tokens), device = prompt["input_ids"].shape, prompt["input_ids"].device
        num_patches, mask_BP = num_tokens // model.config.patch_size, prompt["attention_mask"]
        no_padding_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.padding_B = no_padding_B if mask_BP is None else num_patches - mask_BP.sum(-1)
        self.place_1 = torch.full((1,), num_patches, device=device)
        self.places_P = arange(getattr(cache.layers[0], "max_cache_len"), device)  # noqa: B009 (of static layers)
        shape = model.config.patch_size, model.config.vocab_size
        self.nothing_forbidden_KV = torch.zeros(shape, dtype=torch.bool, device=device) if forbids else None
        self.unread_BK: Tensor | None = None

    @property
    def has_begun(self) -> bool:
        return self.unread_BK is not None

    def read(self, patches_BK: Tensor) -> None:
        """Gives the next step what it is to read, each row's last patch."""
        self.unread_BK = patches_BK

    def sample_patches(
        self, generator: Randomness, forbidden_KV: Tensor | None, plan: BlockSchedule | OneBlock
    ) -> Tensor:
        """Reads each row's last patch, and chooses its next, (B, K); tells the plan where it is exact."""
        assert self.unread_BK is not None
        draws = predraw_noise(self.model, self.sampling, len(self.unread_BK), generator)
        forbidden_KV = self.nothing_forbidden_KV if forbidden_KV is None else forbidden_KV
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(specialize_float=True):  # the law is the graph's own, T and all
            patches_BK, is_exact_B = self.step(
                self.unread_BK,
                self.place_1,
                self.places_P,
                self.padding_B,
                self.cache,
                self.sampling,
                forbidden_KV,
                draws,
            )
        self.place_1 = self.place_1 + 1
        plan.is_exact_B = None if is_exact_B is None else is_exact_B.clone()
        return patches_BK.clone()  # a graph's outputs are overwritten by its next run


def _compiled(model: Any, config: CompileConfig, sampling: PatchSampling) -> Callable[..., Any]:
    settings: dict[str, Any] = config.to_dict() | {"fullgraph": True}
    steps = COMPILED.setdefault(model, {})
    key = sampling, repr(sorted(settings.items()))
    if key not in steps:
        if len(steps) >= MAX_COMPILED_STEPS:
            steps.clear()
        step = _step_of(model)
        # PyTorch counts what it compiles by code object, and refuses a ninth: each law has its own.
        code = step.__code__.replace(co_name=f"step_{len(steps)}")
        steps[key] = torch.compile(FunctionType(code, step.__globals__, closure=step.__closure__), **settings)
    return steps[key]


def predraw_noise(model: Any, sampling: PatchSampling, num_rows: int, generator: Randomness) -> dict[str, Tensor]:
    """The random numbers of one step, for so many rows, as tensors that `PredrawnRandomness` takes."""
    context_BD = torch.empty(num_rows, model.config.hidden_size, dtype=model.dtype, device=model.device)
    randomness, num_draws = StepRandomness.of(generator), sampling.samples_in_one_block
    rows_B = arange(num_rows, context_BD.device)
    draws = dict(randomness.predrawn_head_noise(model.head, context_BD, rows_B, num_draws))
    if sampling.do_sample and not sampling.takes_single_sample:
        if not sampling.uses_batch_rule and not inverse_temperature(sampling.temperature).is_integer():
            draws["uniform"] = randomness.uniform(rows_B, num_draws)
        draws["exponential"] = randomness.exponential(rows_B, num_draws)
    return draws


def _step_of(model: Any):
    """The function that is compiled: reads a patch of each row, to a place in the cache that is a tensor, and chooses
    the next. It holds the model weakly, as `COMPILED` does."""
    reference = weakref.ref(model)

    def step(
        patches_BK: Tensor,
        place_1: Tensor,
        places_P: Tensor,
        padding_B: Tensor,
        cache: Cache,
        sampling: PatchSampling,
        forbidden_KV: Tensor | None,
        draws: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        calm = reference()
        assert calm is not None
        is_seen_BP = (places_P <= place_1) & (places_P >= padding_B[:, None])
        hidden = torch.finfo(calm.dtype).min
        mask_B11P = torch.zeros_like(is_seen_BP, dtype=calm.dtype).masked_fill(~is_seen_BP, hidden)[:, None, None]
        outputs = calm(
            input_ids=patches_BK,
            attention_mask=mask_B11P,
            position_ids=(place_1 - padding_B)[:, None],
            cache=cache,
            use_cache=True,
        )
        hidden_BD = outputs.last_hidden_state[:, -1]
        plan = OneBlock()
        patches_BK = calm.sample_patches(hidden_BD, sampling, PredrawnRandomness(draws), forbidden_KV, plan)
        return patches_BK, plan.is_exact_B if sampling.sampling_method == "exact" else None

    return step
