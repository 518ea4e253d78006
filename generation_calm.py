"""Text generation of CALM under Hugging Face's `generate`: one loop that samples a patch of K tokens per step.

Read `generate_patches` first: it prepares a call, takes steps, and collects what is returned. The hooks of `generate`
and its unsupported settings are in generation_calm_upstream.py, the sampling methods in generation_calm_samplers.py.
Axes: B batch, R rows that are sampled (the B of candidates and sampling methods), L tokens, P patches, K tokens per
patch, D hidden, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .generation_calm_candidates import (
    CandidateBatch,
    CandidateScores,
    LazyCandidateBatch,
    PatchSample,
    candidate_scores,
    compute_patch_scores,
)
from .generation_calm_compiled import CompiledStep
from .generation_calm_samplers import PatchSampling, PredrawnRandomness, Randomness, StepRandomness
from .generation_calm_sequences import CandidateProcessors, GenerationState, SequenceProcessors
from .generation_calm_upstream import CACHE_ARGUMENT, GenerateCall, PatchGenerationMixin, prefill_virtual_tokens
from .heads_calm import GenerativeHead
from .kernels_calm import arange, cpu_kernels
from .modeling_calm_autoencoder import CALMAutoencoder

logger = logging.get_logger(__name__)


def takes_sampling_options(method):
    """Adds the fields of `PatchSampling` to the signature of `prepare_inputs_for_generation`, by which upstream tells
    arguments of `generate` from misspelt ones."""
    signature, kind = inspect.signature(method), inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(name, kind, default=None) for name in PatchSampling.option_names()]
    *named, rest = signature.parameters.values()
    method.__signature__ = signature.replace(parameters=[*named, *options, rest])
    return method


def pack_prompts(input_ids: Tensor, attention_mask: Tensor, patch_size: int, filler: int) -> tuple[Tensor, Tensor]:
    """Packs each prompt (B, L), without its padding, into patches that end with the prompt's last token.

    Returns ids (B, P·K) and the mask by patch (B, P), 1 where the patch holds a token of the prompt. P is ⌈length / K⌉
    of the longest row, at least 1. The id `filler` fills the first patch of a row, and whole patches before it, on the
    left.
    """
    # A stable sort of the mask moves the padding to the left and keeps the order of the rest.
    is_token, order = attention_mask.bool().long().sort(dim=1, stable=True)
    patches_B1 = -(-is_token.sum(-1, keepdim=True) // patch_size)
    num_patches = max(1, int(patches_B1.max()))
    compact = input_ids.gather(1, order).masked_fill(is_token == 0, filler)
    packed = F.pad(compact, (num_patches * patch_size - input_ids.shape[1], 0), value=filler)
    patch_index = torch.arange(num_patches, device=input_ids.device)
    return packed, (patch_index >= num_patches - patches_B1).long()


class GenerationOutputs:
    """Collects what a call of `generate` returns beside ids, as far as its configuration asks for it."""

    def __init__(self, config: GenerationConfig, sampling: PatchSampling, call: GenerateCall):
        self.sampling, self.has_processors = sampling, call.processors is not None
        self.is_dict = bool(config.return_dict_in_generate)
        self.states: dict[str, tuple] = {}
        self.requested: dict[str, bool] = {}  # arguments of `forward`
        for name in ("hidden_states", "attentions"):
            if self.is_dict and getattr(config, f"output_{name}"):
                self.states[name], self.requested[f"output_{name}"] = (), True
        # A list, for upstream's pipeline would try to stack a tuple of them.
        self.scores: list[CandidateScores] | None = [] if self.is_dict and config.output_scores else None
        self.put_scores = getattr(call.streamer, "put_scores", None)

    def check_can_be_compiled(self) -> None:
        """Raises ValueError where the call asks for what compiled steps can't return, or has logits processors."""
        if unsupported := [*self.states, *([] if self.scores is None else ["scores"])]:
            raise ValueError(f"compile_config: compiled steps return no {' and no '.join(unsupported)}; leave it out.")
        if self.has_processors:
            raise ValueError("compile_config: compiled steps call no logits processors; leave it out.")

    def add(self, sample: PatchSample, state: GenerationState) -> None:
        """Keeps those parts of a step's sample that the call returns."""
        for name in self.states:
            self.states[name] = (*self.states[name], getattr(sample.outputs, name))
        if self.scores is not None and sample.candidates is not None and sample.index is not None:
            scores = candidate_scores(sample.candidates, sample.index, self.sampling.weights, sample.is_exact)
            self.scores.append(scores.in_rows(state.active_rows, len(state.ids_BL)))
            if self.put_scores is not None:
                self.put_scores(self.scores[-1])

    def result(self, ids_BL: Tensor, cache: Cache | None) -> GenerateDecoderOnlyOutput | Tensor:
        if not self.is_dict:
            return ids_BL
        fields: dict[str, Any] = {"sequences": ids_BL, CACHE_ARGUMENT: cache, "scores": self.scores, **self.states}
        return GenerateDecoderOnlyOutput(**fields)


@dataclass
class EagerStep:
    """Takes the steps of one call of `generate`: runs the model on patches that are not cached, samples the next.

    Args:
        inputs: packed prompts, `input_ids` (B, P·K) and the `attention_mask` (B, P) by patch, or `None`.
        cache: None recomputes the whole sequence in each step.
        one_block: whether each step draws all candidates at once.
        requested: arguments of `forward` that request hidden states or attentions.
    """

    model: "CALMGenerationMixin"
    inputs: dict[str, Any]
    cache: Cache | None
    sampling: PatchSampling
    generator: Randomness
    one_block: bool
    processors: SequenceProcessors | None
    max_length: int
    requested: dict[str, bool]

    def __call__(self, state: GenerationState, forbidden_KV: Tensor | None) -> PatchSample:
        """Samples the next patch of each active row."""
        outputs = self.model.forward_patches(self.inputs, self.cache, **self.requested)
        hidden_RD = state.select(outputs.last_hidden_state[:, -1])
        generator, processors = self.generator, None
        if isinstance(generator, Sequence):
            generator = [generator[row] for row in state.active_rows]
        if self.processors is not None and not state.is_finished:  # else a dummy step, see `synced_gpus`
            num_left = max(self.max_length - state.ids_BL.shape[1], 1)
            processors = self.processors.for_rows(state.active_rows, state.ids_BL, num_left)
        options = self.sampling, generator, forbidden_KV, self.one_block, processors
        sample = self.model.sample_patches(hidden_RD, *options)
        return sample._replace(outputs=outputs)

    def set_next_inputs(self, patches_BK: Tensor) -> None:
        """Sets what the next step reads: each row's new patch."""
        ids, mask = patches_BK.to(self.inputs["input_ids"].device), self.inputs["attention_mask"]
        if self.cache is None:
            ids = torch.cat([self.inputs["input_ids"], ids], dim=1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        self.inputs = {"input_ids": ids, "attention_mask": mask}


class CALMGenerationMixin(PatchGenerationMixin):
    """`generate` for CALM: generation_calm_upstream.py receives its calls, here they are carried out."""

    head: GenerativeHead
    autoencoder: CALMAutoencoder

    @takes_sampling_options
    def prepare_inputs_for_generation(self, input_ids, generator=None, **kwargs):
        """Names the arguments that `generate` accepts beside its own; `generate_patches` builds its inputs itself.

        `generator` is a `torch.Generator` on the model's device in place of the global one; or a list of them, on any
        device, one per row of the result: each row is then generated as it would be alone.
        """
        options = PatchSampling.option_names()
        return {"input_ids": input_ids, **{name: kwargs[name] for name in kwargs if name not in options}}

    def patch_sampling(self, **options) -> PatchSampling:
        """Returns how patches are chosen with these options; the others are the generation configuration's."""
        return PatchSampling.from_generation_config(self.generation_config, **options).for_head(self.head)

    compute_patch_scores = staticmethod(compute_patch_scores)

    def generate_patches(
        self, input_ids: Tensor, generation_config: GenerationConfig, call: GenerateCall, model_kwargs: dict
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Generates patch by patch; every stopping criterion sees each token (see generation_calm_sequences.py).

        Returns the prompts as they came, padding included, followed by the new tokens; a row that has stopped gets
        padding, also after an EOS within a patch. Where scores are returned, a streamer that has a method
        `put_scores` gets each step's `CandidateScores` before its tokens.
        """
        cache = model_kwargs.get(CACHE_ARGUMENT) if model_kwargs.get("use_cache", True) else None
        step, outputs = self.prepare_steps(input_ids, generation_config, call, cache, model_kwargs)
        # Upstream has added the prompt and min_new_tokens up.
        state, min_length = GenerationState(input_ids, call), generation_config.min_length or 0
        while call.should_continue(state.is_finished, device=input_ids.device):
            num_left = min_length - state.ids_BL.shape[1]
            sample = step(state, self.forbidden_tokens(num_left, call.eos_tokens, input_ids.device))
            outputs.add(sample, state)
            step.set_next_inputs(state.append(sample.patches))
        if call.streamer is not None:
            call.streamer.end()
        return outputs.result(state.ids_BL, cache)

    def prepare_steps(
        self, input_ids: Tensor, config: GenerationConfig, call: GenerateCall, cache: Cache | None, model_kwargs: dict
    ) -> tuple[EagerStep | CompiledStep, GenerationOutputs]:
        """Checks and prepares one call: packs prompts, and fills the cache with virtual tokens and early chunks."""
        # Options may be fields of the configuration or arguments of the call, which arrive in `model_kwargs`.
        sampling = PatchSampling.from_generation_config(config, **model_kwargs).for_head(self.head)
        sampling.check_num_rows(len(input_ids))
        generator, mask = model_kwargs.get("generator"), model_kwargs.get("attention_mask")
        if isinstance(generator, Sequence) and len(generator) != len(input_ids):
            raise ValueError(
                f"generator is a list of {len(generator)}, but {len(input_ids)} rows are generated: pass one "
                "generator per row (num_return_sequences counts), or a single one for all."
            )
        outputs = GenerationOutputs(config, sampling, call)
        if outputs.scores is not None:
            sampling = replace(sampling, lazy_decoding=False)  # every candidate is returned
        packed = self.pack_for_generation(input_ids, mask, call.pad_token, call.bos_token)
        # An offloaded model returns ids on the caller's device.
        inputs: dict[str, Any] = {name: tensor.to(self.device) for name, tensor in packed.items()}
        if bool(inputs["attention_mask"].all()):
            inputs["attention_mask"] = None  # a mask that hides nothing costs operations in every step
        processors = None if call.processors is None else SequenceProcessors(call, input_ids, mask)
        compiles = call.compile_config is not None
        inputs = prefill_virtual_tokens(self, inputs, cache, compiles, model_kwargs.get("task_ids"))
        # Processes that share shards must call each module equally often, but would need different numbers of blocks.
        one_block = bool(compiles or call.synced_gpus)
        settings = sampling, generator, one_block, processors, config.max_length, outputs.requested
        step = eager = EagerStep(self, inputs, cache, *settings)
        if call.compile_config is not None:
            outputs.check_can_be_compiled()
            step = CompiledStep(eager, call.compile_config, forbids=(config.min_length or 0) > input_ids.shape[1])
        chunk_size = config.prefill_chunk_size
        if chunk_size is not None and cache is not None and not outputs.states and not call.synced_gpus:
            eager.inputs = self._prefill_all_but_last_chunk(inputs, cache, chunk_size)
        return step, outputs

    def forward_patches(self, inputs: dict[str, Any], cache: Cache | None, **requested: bool) -> Any:
        """Runs the backbone on `inputs`, whole patches, which `cache` then holds."""
        with cpu_kernels(inputs["input_ids"].numel() // self.config.patch_size, self.config.hidden_size):
            return self(**inputs, cache=cache, use_cache=cache is not None, **requested)

    def sample_patches(
        self,
        hidden_RD: Tensor,
        sampling: PatchSampling,
        generator: Randomness = None,
        forbidden_KV: Tensor | None = None,
        one_block: bool = False,
        processors: CandidateProcessors | None = None,
    ) -> PatchSample:
        """Samples candidates for the next patch of each row given its last hidden state, and chooses one.

        Args:
            hidden_RD (`(R, D)`): hidden states.
            sampling: how patches are chosen.
            generator: randomness, or a generator per row; not used when `sampling.do_sample` is False.
            forbidden_KV (`(K, V)` bool, *optional*): tokens that may not stand at a position.
            one_block: draws all candidates at once; by default in growing blocks, until the method has what it needs.
            processors: logits processors of these rows.
        """
        sampling = sampling.for_head(self.head)
        randomness = self.step_randomness(sampling, generator, hidden_RD)
        candidates = self.new_candidates(hidden_RD, randomness, sampling, forbidden_KV, processors)
        index_R, is_exact = sampling.choose(candidates, randomness, one_block)  # samples from the head as it needs
        patches_RK = candidates.decode_chosen(candidates.rows_B, index_R)
        return PatchSample(patches_RK, is_exact, candidates, index_R)

    def step_randomness(self, sampling: PatchSampling, generator: Randomness, like: Tensor) -> StepRandomness:
        """Returns one step's random numbers, without `do_sample` the same in every step and row."""
        if sampling.do_sample or isinstance(generator, StepRandomness):
            return StepRandomness.of(generator)
        fixed = torch.Generator(like.device).manual_seed(0)
        return PredrawnRandomness(self.head.predrawn_noise(sampling.num_candidates, 1, like, fixed))

    def new_candidates(
        self,
        hidden_RD: Tensor,
        randomness: StepRandomness,
        sampling: PatchSampling,
        forbidden_KV: Tensor | None = None,
        processors: CandidateProcessors | None = None,
    ) -> CandidateBatch:
        """Returns the candidates of one step, none drawn yet, of the kind that the step allows."""
        # Lazy decoding has data-dependent shapes, which no compiled graph has, and uses the output matrix itself,
        # whose shards (FSDP2) are gathered in a module's forward only.
        is_sharded = hasattr(self.autoencoder.decoder.lm_head.weight, "full_tensor")
        is_lazy = processors is None and not self.head.samples_tokens
        is_lazy = is_lazy and not torch.compiler.is_compiling() and not is_sharded
        if is_lazy:
            wanted = sampling.lazy_decoding
            is_lazy = self.autoencoder.device.type == "cpu" if wanted is None else wanted
        kind = LazyCandidateBatch if is_lazy else CandidateBatch
        temperature, proposal = sampling.head_temperature, None
        if sampling.proposes:
            is_mode = not sampling.do_sample and processors is None
            temperature, proposal = 0.0 if is_mode else sampling.temperature, sampling.truncation
        arguments = self.head, hidden_RD, randomness, self.autoencoder, forbidden_KV, processors
        return kind(*arguments, temperature, proposal)

    def pack_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pad_token: Tensor | int | None = None,
        bos_token: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Packs prompts (B, L), padded anywhere, for the first forward pass.

        Returns `input_ids` (B, P·K) and, by patch, `attention_mask` (B, P). `pad_token` fills patches if the
        configuration has no id for that; `bos_token` starts empty prompts, which raise ValueError without it.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        is_empty_B1 = ~mask.any(-1, keepdim=True)
        if bool(is_empty_B1.any()):
            if bos_token is None:
                raise ValueError("generate() got an empty prompt, and bos_token_id, which would start it, is not set.")
            input_ids = F.pad(input_ids, (0, 1), value=int(bos_token))
            mask = torch.cat([mask, is_empty_B1.to(mask)], dim=1)
        if bos_token is not None and input_ids.shape[1] > 1:
            begin_B2 = mask.argmax(-1, keepdim=True).clamp(max=mask.shape[1] - 2) + arange(2, mask.device)
            is_bos_B2 = (input_ids == bos_token).gather(1, begin_B2) & mask.gather(1, begin_B2).bool()
            if bool(is_bos_B2.all(-1).any()):
                logger.warning_once(
                    "A prompt begins with two BOS tokens, which no training text does: a tokenizer puts one before a "
                    "text that has one, as of a chat template; tokenize that with add_special_tokens=False."
                )
        # The filler is the model's: a pad token given to this call only marks where rows have ended.
        filler = self.config.prompt_filler_token_id
        filler = self.config.pad_token_id if filler is None else filler
        filler = pad_token if filler is None else filler
        filler = 0 if filler is None else int(filler)
        packed, patch_mask = pack_prompts(input_ids, mask, self.config.patch_size, filler)
        return {"input_ids": packed, "attention_mask": patch_mask}

    def _prefill_all_but_last_chunk(self, inputs: dict, cache: Cache, chunk_size: int) -> dict:
        """Reads a packed prompt into the cache, `chunk_size` tokens (whole patches, at least one) at a time, but for
        the last chunk; returns the inputs of that one."""
        patches, mask_BP = max(1, chunk_size // self.config.patch_size), inputs["attention_mask"]
        past = int(cache.get_seq_length())  # a static cache's is a tensor, which changes
        *chunks, last = inputs["input_ids"].split(patches * self.config.patch_size, dim=1)
        for i, chunk in enumerate(chunks, start=1):
            mask = None if mask_BP is None else mask_BP[:, : past + i * patches]
            self.forward_patches({"input_ids": chunk, "attention_mask": mask}, cache)
        return {**inputs, "input_ids": last}

    def forbidden_tokens(self, num_left: int, eos_tokens: Tensor | None, device) -> Tensor | None:
        """Returns a mask (K, V) that forbids EOS in the next `num_left` tokens; None if it would be empty."""
        if num_left <= 0 or eos_tokens is None:
            return None
        is_eos_V = (arange(self.config.vocab_size, device) == eos_tokens.to(device)[:, None]).any(0)
        return (arange(self.config.patch_size, device) < min(num_left, self.config.patch_size))[:, None] & is_eos_V
