"""Text generation of CALM under Hugging Face's `generate`: one loop that draws a patch a step and emits K tokens.

What `generate` asks of a model, and what it is refused, is in generation_calm_upstream.py; the temperature samplers
are in generation_calm_samplers.py. Axes: B batch, R rows that draw, L tokens, P patches, K tokens per patch, D hidden,
N candidates, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    candidate_scores,
    compute_patch_scores,
)
from .generation_calm_compiled import CompiledSteps
from .generation_calm_randomness import PredrawnRandomness, Randomness, StepRandomness
from .generation_calm_rules import CandidateProcessors, SequenceProcessors
from .generation_calm_samplers import BlockSchedule, OneBlock, PatchSampling
from .generation_calm_sequences import GenerationState
from .generation_calm_upstream import CACHE_ARGUMENT, GENERATION_SETTINGS, GenerateCall, PatchGenerationMixin
from .generation_calm_virtual_tokens import read_virtual_tokens
from .heads_calm import GenerativeHead
from .kernels_calm import arange
from .modeling_calm_autoencoder import CALMAutoencoder

GREEDY_SEED = 0

logger = logging.get_logger(__name__)


def takes_sampling_options(method):
    """Adds the fields of `PatchSampling` to the parameters that a method is known to take (upstream asks for those of
    `prepare_inputs_for_generation`, to tell arguments of `generate` from misspelt ones)."""
    signature = inspect.signature(method)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in PatchSampling.option_names()
    ]
    *named, rest = signature.parameters.values()
    method.__signature__ = signature.replace(parameters=[*named, *options, rest])
    return method


def pack_prompts(input_ids: Tensor, attention_mask: Tensor, patch_size: int, filler: int) -> tuple[Tensor, Tensor]:
    """Re-packs prompts into patches, each row on its own: its padding is stripped and it ends with its last patch.

    Args:
        input_ids (`(B, L)`): prompts, padded anywhere.
        attention_mask (`(B, L)`): 1 where a token is the prompt's own.
        patch_size: K.
        filler: id of what fills the first patch of a row, and whole patches before it, on the left.

    Returns:
        ids `(B, P·K)` and the mask by patch `(B, P)`, 1 where the patch holds a token of the prompt. P is the largest
        row's ⌈length / K⌉, at least 1.
    """
    # A stable sort of the mask moves the padding to the left and keeps the order of the rest.
    is_own, order = attention_mask.bool().long().sort(dim=1, stable=True)
    patches_B1 = -(-is_own.sum(-1, keepdim=True) // patch_size)
    num_patches = max(1, int(patches_B1.max()))
    compact = input_ids.gather(1, order).masked_fill(is_own == 0, filler)
    packed = F.pad(compact, (num_patches * patch_size - input_ids.shape[1], 0), value=filler)
    patch_index = torch.arange(num_patches, device=input_ids.device)
    return packed, (patch_index >= num_patches - patches_B1).long()


class Returned:
    """What a call of `generate` returns beside ids, as far as its configuration asks for it."""

    def __init__(self, config: GenerationConfig):
        self.is_dict = bool(config.return_dict_in_generate)
        names = [n for n in ("hidden_states", "attentions") if self.is_dict and getattr(config, f"output_{n}")]
        self.states: dict[str, tuple] = {name: () for name in names}
        # A list, for upstream's pipeline would try to stack a tuple of them.
        self.scores: list[CandidateScores] | None = [] if self.is_dict and config.output_scores else None

    def check_compiled(self, call: GenerateCall) -> None:
        """Raises `ValueError` where it asks for what compiled steps don't return, or for logits processors."""
        unreturned = [*self.states, *([] if self.scores is None else ["scores"])]
        if unreturned:
            raise ValueError(f"compile_config: compiled steps return no {' and no '.join(unreturned)}; leave it out.")
        if call.processors is not None:
            raise ValueError("compile_config: compiled steps ask no logits processors; leave it out.")

    def take(self, outputs: Any) -> None:
        """Keeps what a forward pass returned."""
        self.states = {name: (*steps, getattr(outputs, name)) for name, steps in self.states.items()}

    def result(self, ids_BL: Tensor, cache: Cache | None) -> GenerateDecoderOnlyOutput | Tensor:
        if not self.is_dict:
            return ids_BL
        fields: dict[str, Any] = {"sequences": ids_BL, CACHE_ARGUMENT: cache, "scores": self.scores, **self.states}
        return GenerateDecoderOnlyOutput(**fields)


class Fallbacks:
    """Counts the patches of one call that `sampling_method="exact"` left to the batch rule, to warn of them once."""

    def __init__(self, sampling: PatchSampling, has_rules: bool):
        self.sampling, self.has_rules = sampling, has_rules
        self.is_exact_asked_for = sampling.do_sample and sampling.sampling_method == "exact"
        self.is_exact: list[Tensor] = []  # of each step (R,), on the device until the end

    def warn(self) -> None:
        is_exact = torch.cat(self.is_exact).tolist() if self.is_exact else []
        if all(is_exact):
            return
        sampling = self.sampling
        why = f"as {sampling.max_samples} candidates held no accepted attempt; raise num_candidates or the temperature"
        if self.has_rules or sampling.uses_batch_rule:
            why = "which logits processors, top_k, top_p, min_p and a temperature above 1 ask for"
        logger.warning(
            f'sampling_method="exact": {is_exact.count(False)} of {len(is_exact)} patches were chosen by the batch '
            f"rule, {why}. `is_exact` in the scores (output_scores=True) tells which."
        )


class CALMGenerationMixin(PatchGenerationMixin):
    """`generate` for CALM: generation_calm_upstream.py receives its calls, here is what they come to."""

    head: GenerativeHead
    autoencoder: CALMAutoencoder

    @takes_sampling_options
    def prepare_inputs_for_generation(self, input_ids, generator=None, **kwargs):
        """Names the arguments that `generate` accepts beside its own; `write_patches` builds its inputs itself.

        Args:
            input_ids: the prompts.
            generator: a `torch.Generator` on the model's device in place of the global one; or a list of them, on any
                device, one a row of the result: each row is then written as it would be alone.
            kwargs: inputs, and the options of `PatchSampling`.
        """
        inputs = {name: value for name, value in kwargs.items() if name not in PatchSampling.option_names()}
        return {"input_ids": input_ids, **inputs}

    def patch_sampling(self, **options) -> PatchSampling:
        """How patches are chosen with these options; those not given are the generation configuration's."""
        assert self.generation_config is not None, "a model that generates has one"
        return PatchSampling.from_generation_config(self.generation_config, **options)

    compute_patch_scores = staticmethod(compute_patch_scores)

    def check_settings(self, generation_config: GenerationConfig) -> None:
        PatchSampling.from_generation_config(generation_config)
        known = {*GENERATION_SETTINGS, *PatchSampling.option_names()}
        unknown = [
            name
            for name, value in vars(generation_config).items()
            if name not in known and not name.startswith("_") and value is not None
        ]
        if unknown:
            logger.warning_once(f"The generation configuration has {', '.join(unknown)}, which CALM doesn't read.")

    def write_patches(
        self, input_ids: Tensor, generation_config: GenerationConfig, call: GenerateCall, model_kwargs: dict
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Generates patch by patch; every stopping rule sees each token (see generation_calm_sequences.py).

        Returns the prompts as they came, padding included, followed by the new tokens; a row that has stopped gets
        padding, also after an EOS within a patch. Where scores are returned, a streamer that has a method
        `put_scores` is handed each step's `CandidateScores` before its tokens.
        """
        sampling = PatchSampling.from_generation_config(generation_config, **model_kwargs)
        sampling.check_draws(len(input_ids))
        generator = model_kwargs.get("generator")
        if isinstance(generator, Sequence) and len(generator) != len(input_ids):
            raise ValueError(
                f"generator is a list of {len(generator)}, but {len(input_ids)} rows are generated: pass one "
                "generator a row (num_return_sequences counts), or a single one for all."
            )
        prompt_length = input_ids.shape[1]
        min_length = max(generation_config.min_length or 0, prompt_length + (generation_config.min_new_tokens or 0))
        inputs: dict[str, Any] = self.pack_for_generation(
            input_ids, model_kwargs.get("attention_mask"), call.pad_token, call.bos_token
        )
        inputs = {name: x.to(self.device) for name, x in inputs.items()}  # an offloaded model returns what it is given
        if bool(inputs["attention_mask"].all()):
            inputs["attention_mask"] = None  # a mask that hides nothing takes operations in every step
        cache = model_kwargs.get(CACHE_ARGUMENT) if model_kwargs.get("use_cache", True) else None
        returned = Returned(generation_config)
        if returned.scores is not None:
            sampling = replace(sampling, lazy_decoding=False)  # every candidate is returned
        put_scores = getattr(call.streamer, "put_scores", None)
        rules = None
        if call.processors is not None:
            mask = model_kwargs.get("attention_mask")
            rules = SequenceProcessors(call.processors, input_ids, mask, call.bos_token, call.eos_tokens)
        inputs = read_virtual_tokens(
            self, inputs, cache, call.compile_config is not None, model_kwargs.get("task_ids")
        )
        steps = None
        if call.compile_config is not None:
            returned.check_compiled(call)
            steps = CompiledSteps(self, cache, sampling, call.compile_config, inputs, min_length > prompt_length)
        chunk_size = generation_config.prefill_chunk_size
        if chunk_size is not None and cache is not None and not returned.states and not call.synced_gpus:
            inputs = self._read_all_but_last_chunk(inputs, cache, chunk_size)
        texts = GenerationState(input_ids, call)
        # Processes that share shards must call each module equally often: a number of blocks would be each one's own.
        plan = OneBlock() if steps is not None or call.synced_gpus else BlockSchedule()
        fallbacks = Fallbacks(sampling, rules is not None)
        while call.goes_on(texts.is_finished, input_ids.device):
            forbidden_KV = self.forbidden_tokens(min_length - texts.length, call.eos_tokens, input_ids.device)
            if steps is not None and steps.has_begun:
                patches_BK = steps.sample_patches(generator, forbidden_KV, plan)
                if fallbacks.is_exact_asked_for:
                    fallbacks.is_exact.append(texts.rows(sampling.is_exact(plan, len(patches_BK), has_rules=False)))
                steps.read(texts.append(patches_BK))
                continue
            asked = {f"output_{name}": True for name in returned.states}
            outputs = self(**inputs, cache=cache, use_cache=cache is not None, **asked)
            returned.take(outputs)
            hidden_RD = texts.rows(outputs.last_hidden_state[:, -1])
            if not sampling.do_sample and not isinstance(generator, StepRandomness):
                generator = self.greedy_randomness(sampling, hidden_RD)
            generators = [generator[row] for row in texts.drawing] if isinstance(generator, Sequence) else generator
            token_rules = None
            if rules is not None and not texts.is_finished:  # if it is, this process only keeps up with others
                num_left = max(generation_config.max_length - texts.length, 1)
                token_rules = rules.of_rows(texts.drawing, texts.ids_BL, num_left)
            arguments = hidden_RD, sampling, generators, forbidden_KV, plan, token_rules
            if returned.scores is None:
                patches_RK = self.sample_patches(*arguments)
            else:
                pool, index_R = self.choose_patches(*arguments)
                patches_RK = pool.tokens(pool.rows_B, index_R)
                is_exact_R = sampling.is_exact(plan, len(index_R), token_rules is not None)
                scores = candidate_scores(pool, index_R, sampling.weigh, is_exact_R)
                returned.scores.append(scores.in_rows(texts.drawing, len(input_ids)))
                if put_scores is not None:
                    put_scores(returned.scores[-1])
            if fallbacks.is_exact_asked_for and not texts.is_finished:
                fallbacks.is_exact.append(sampling.is_exact(plan, len(patches_RK), token_rules is not None))
            patches_BK = texts.append(patches_RK)
            inputs = self._extend_inputs(inputs, patches_BK, keep_past=cache is None)
            if steps is not None:
                steps.read(patches_BK)

        fallbacks.warn()
        if call.streamer is not None:
            call.streamer.end()
        return returned.result(texts.ids_BL, cache)

    def sample_patches(self, hidden_RD: Tensor, sampling: PatchSampling, *options, **named_options) -> Tensor:
        """Chooses the next patch of each row given its last hidden state: token ids (R, K). See `choose_patches`."""
        pool, index_R = self.choose_patches(hidden_RD, sampling, *options, **named_options)
        return pool.tokens(pool.rows_B, index_R)

    def choose_patches(
        self,
        hidden_RD: Tensor,
        sampling: PatchSampling,
        generator: Randomness = None,
        forbidden_KV: Tensor | None = None,
        plan: BlockSchedule | OneBlock | None = None,
        rules: CandidateProcessors | None = None,
    ) -> tuple[CandidateBatch, Tensor]:
        """Draws candidates for the next patch of each row given its last hidden state, and chooses one.

        Args:
            hidden_RD (`(R, D)`): hidden states.
            sampling: the law.
            generator: randomness, or a generator a row; not used when `sampling.do_sample` is False.
            forbidden_KV (`(K, V)` bool, *optional*): tokens that may not stand at a position.
            plan: of the sizes of blocks, handed from step to step, or a `OneBlock`.
            rules: of these rows' tokens.

        Returns:
            The candidates, and the index of the one chosen (R,).
        """
        if not sampling.do_sample and not isinstance(generator, StepRandomness):
            generator = self.greedy_randomness(sampling, hidden_RD)
        randomness = StepRandomness.of(generator)

        def draw(rows: Tensor, num_draws: int) -> Tensor:
            noise = randomness.head_noise(self.head, hidden_RD, rows, num_draws)
            context = hidden_RD if rows is rows_R else hidden_RD[rows]
            return self.head.sample(context, num_samples=num_draws, **noise)

        rows_R = arange(len(hidden_RD), hidden_RD.device)
        pool = self.new_candidates(draw, rows_R, sampling, forbidden_KV, rules)
        return pool, sampling.choose(pool, randomness, plan)

    def greedy_randomness(self, sampling: PatchSampling, like: Tensor) -> PredrawnRandomness:
        """The draws that are the same in every step and row when `do_sample` is False."""
        fixed = torch.Generator(like.device).manual_seed(GREEDY_SEED)
        return PredrawnRandomness(self.head.predrawn_noise(sampling.num_candidates, 1, like, fixed))

    def new_candidates(
        self,
        draw: Callable[[Tensor, int], Tensor],
        rows_R: Tensor,
        sampling: PatchSampling,
        forbidden_KV: Tensor | None = None,
        rules: CandidateProcessors | None = None,
    ) -> CandidateBatch:
        """The candidates of one step, none drawn yet; for `draw` see `CandidateBatch`."""
        # How much is left to decode depends on the draws, which a graph's steps don't; and shards, as of FSDP2, are
        # gathered by a module's forward alone.
        is_whole = not torch.compiler.is_compiling() and not hasattr(
            self.autoencoder.decoder.lm_head.weight, "full_tensor"
        )
        lazy = sampling.lazy_decoding
        if is_whole and rules is None and (self.autoencoder.device.type == "cpu" if lazy is None else lazy):
            return LazyCandidateBatch(draw, rows_R, self.autoencoder, forbidden_KV)
        return CandidateBatch(draw, rows_R, self.autoencoder, forbidden_KV, rules)

    def pack_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pad_token: Tensor | int | None = None,
        bos_token: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Prompts as the first forward pass takes them.

        Args:
            input_ids (`(B, L)`): prompts, padded anywhere.
            attention_mask (`(B, L)`, *optional*): 1 where a token is the prompt's own.
            pad_token: the id to fill patches with where the configuration has none.
            bos_token: the id that starts empty prompts.

        Returns:
            `input_ids` (B, P·K) and, by patch, `attention_mask` (B, P).

        Raises:
            ValueError: an empty prompt without a `bos_token`.
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
        fillers = self.config.prompt_filler_token_id, self.config.pad_token_id, pad_token, 0
        filler = int(next(token for token in fillers if token is not None))
        packed, patch_mask = pack_prompts(input_ids, mask, self.config.patch_size, filler)
        return {"input_ids": packed, "attention_mask": patch_mask}

    def _read_all_but_last_chunk(self, inputs: dict, cache: Cache, chunk_size: int) -> dict:
        """Reads a packed prompt into the cache, `chunk_size` tokens (whole patches, at least one) at a time, but for
        the last chunk; returns the inputs of that one."""
        patches = max(1, chunk_size // self.config.patch_size)
        past = int(cache.get_seq_length())  # a static cache's is a tensor, which changes
        *chunks, last = inputs["input_ids"].split(patches * self.config.patch_size, dim=1)
        for i, chunk in enumerate(chunks, start=1):
            mask = None if inputs["attention_mask"] is None else inputs["attention_mask"][:, : past + i * patches]
            self(input_ids=chunk, attention_mask=mask, cache=cache, use_cache=True)
        return {**inputs, "input_ids": last}

    def forbidden_tokens(self, num_left: int, eos_tokens: Tensor | None, device) -> Tensor | None:
        """(K, V) mask that keeps EOS out of the next `num_left` tokens; None when it would be empty."""
        if num_left <= 0 or eos_tokens is None:
            return None
        forbidden_KV = torch.zeros(self.config.patch_size, self.config.vocab_size, dtype=torch.bool, device=device)
        eos_tokens = eos_tokens.to(device)
        forbidden_KV[:num_left, eos_tokens[eos_tokens < self.config.vocab_size]] = True
        return forbidden_KV

    @staticmethod
    def _extend_inputs(inputs: dict, patches_BK: Tensor, keep_past: bool) -> dict:
        ids, mask = patches_BK.to(inputs["input_ids"].device), inputs["attention_mask"]
        return {
            "input_ids": torch.cat([inputs["input_ids"], ids], dim=1) if keep_past else ids,
            "attention_mask": None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
        }
