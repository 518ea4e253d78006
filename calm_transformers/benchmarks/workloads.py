"""Models, prompts and candidate distributions of the generation benchmark.

- *worst*: random weights. All candidate patches are distinct, unless the model is tiny (the column "distinct" tells),
  so nothing can be saved by duplicates.
- *real*: the patch distributions of a trained model while it generates. A trained model samples its own. A random
  model of a published shape replays recorded candidates: it does all the work on its own samples, but whenever a token
  is decoded, it returns that of a recorded candidate. So the duplicates among the candidates, and the tokens that must
  be decoded to find them, are those of a trained model.

The recording, candidates.npz, holds patches (C, M, K) of a small model of stories with K = 4, the demo at commit
4472fe8: M samples at T = 1 after each of C contexts that it generated at T = 0.5.

Axes: B batch, L tokens, P patches, R rows that sample, K tokens per patch, N candidates, C recorded contexts,
M recorded candidates per context, D hidden size, Z latent size.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from calm_transformers.command_line import InputError, format_error, positive
from calm_transformers.loading import load_causal_lm, load_config
from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.model.generation_calm_candidates import CandidateBatch, LazyCandidateBatch
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.training.recipe import load_recipe, recipe_names

DEMO_FOLDER = Path(__file__).parents[2]
RECORDING = Path(__file__).with_name("candidates.npz")
NUM_DISTINCT_CONTEXTS = 16  # contexts for `distinct_fraction`


def add_device_options(parser: argparse.ArgumentParser, gpu: bool) -> None:
    """Adds device, dtype and repetitions; the defaults are a GPU in bfloat16, or a CPU in float32."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if gpu else "float32")
    parser.add_argument("--repetitions", type=positive, default=3)


def check_device(name: str) -> None:
    """Raises InputError if a GPU is requested but missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU; use --device cpu.")


def is_trained(name: str) -> bool:
    """Returns whether a name refers to a model with weights, not to a recipe."""
    return name == "demo" or name not in recipe_names()


def model_folder(name: str) -> str:
    """Returns the folder or Hub id of a trained model; raises InputError if the demo is missing."""
    if name != "demo":
        return name
    if not (DEMO_FOLDER / "config.json").exists():
        raise InputError(f"{DEMO_FOLDER} holds no demo model (no config.json): run this in a copy of the repository.")
    return str(DEMO_FOLDER)


def model_config(name: str) -> CALMConfig | LlamaConfig:
    """Returns the configuration of a recipe, the demo, or a model by its folder or Hub id.

    An autoregressive recipe without a vocabulary size gets that of the demo.
    """
    if is_trained(name):
        try:
            config = load_config(model_folder(name))
        except ValueError as error:
            raise InputError(f"{name} is neither a recipe nor a model: {format_error(error)}") from error
        if not isinstance(config, CALMConfig | LlamaConfig):
            raise InputError(f"{name} is neither a CALM nor a Llama: its model_type is {config.model_type!r}.")
        return config
    recipe = load_recipe(name)
    if recipe.kind == "ar":
        fields: dict[str, Any] = {"vocab_size": model_config("demo").vocab_size} | recipe.model
        return LlamaConfig(**fields)
    if recipe.kind != "calm" or "vocab_size" not in recipe.model:
        raise InputError(f"the recipe {name} does not define a complete language model.")
    return CALMConfig.from_dict({**recipe.model, "autoencoder_config": load_recipe("autoencoder").model})


@torch.no_grad()
def random_model(config: CALMConfig | LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0):
    """Builds a model whose matrices are all random, including those that training initialises to zero.

    Matrices are normal with variance 1 / columns, norms 1 and biases 0, which preserves the scale of activations.
    The model is built on the meta device: the usual initialisation takes minutes, and twice the memory in bfloat16.
    """
    with torch.device("meta"):
        model = CALMForCausalLM(config) if isinstance(config, CALMConfig) else LlamaForCausalLM(config)
    model.to(dtype)  # pyright: ignore[reportArgumentType]  # upstream's wrapper of `to` loses `self`
    model.to_empty(device=device)
    model.tie_weights()
    model.base_model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its buffers are computed, not loaded
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return _disable_stopping(model.eval())


def word_tokenizer(vocab_size: int, **special_tokens: str) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one word per token: w0, w1, …"""
    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"unk_token": "w0", "model_max_length": 10**6, **special_tokens}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def trained_model(name: str, device: torch.device, dtype: torch.dtype):
    return _disable_stopping(load_causal_lm(model_folder(name), dtype, device))


def _disable_stopping(model):
    """Resets the generation config so that every sequence reaches its full length."""
    bos = getattr(model.config, "bos_token_id", None)
    model.generation_config = GenerationConfig(bos_token_id=bos, pad_token_id=0, eos_token_id=None)
    return model


def random_prompts(model, batch_size: int, length: int, seed: int = 0) -> Tensor:
    """Samples uniformly random token ids (B, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch_size, length), generator=generator).to(model.device)


def generate_prompts(model, batch_size: int, length: int, temperature: float, num_candidates: int) -> Tensor:
    """Generates prompts (B, length) with a trained CALM, starting from BOS."""
    torch.manual_seed(0)
    start = torch.full((batch_size, 1), model.config.bos_token_id, device=model.device)
    if length == 1:
        return start
    return generate_tokens(model, start, length - 1, temperature=temperature, num_candidates=num_candidates)


def generate_tokens(model, prompts_BL: Tensor, length: int, **settings) -> Tensor:
    """Samples `length` tokens per prompt and returns (B, L + length); raises InputError if generation ends early."""
    settings |= {"attention_mask": torch.ones_like(prompts_BL), "do_sample": True, "max_new_tokens": length}
    ids = model.generate(prompts_BL, **settings)
    if ids.shape[1] != prompts_BL.shape[1] + length:
        raise InputError(f"{ids.shape[1] - prompts_BL.shape[1]} tokens were generated instead of {length}.")
    return ids


@torch.no_grad()
def sample_candidates(model, prompts_BL: Tensor, num_candidates: int) -> Tensor:
    """Samples candidates (C, N, K) after each of the first `NUM_DISTINCT_CONTEXTS` patches of every prompt."""
    length = prompts_BL.shape[1] // model.config.patch_size * model.config.patch_size  # of the complete patches
    hidden_BPD = model.model(input_ids=prompts_BL[:, :length]).last_hidden_state
    hidden_CD = hidden_BPD[:, :NUM_DISTINCT_CONTEXTS].flatten(0, 1)
    torch.manual_seed(0)
    samples_NC = model.head.sample(hidden_CD, num_samples=num_candidates)
    return model.head.decode(samples_NC, model.autoencoder).transpose(0, 1)


def distinct_fraction(patches_CNK: Tensor) -> float:
    """Returns the number of distinct patches among N candidates, divided by N; the mean over contexts."""
    counts = [len(patches_NK.unique(dim=0)) for patches_NK in patches_CNK]
    return sum(counts) / patches_CNK[..., 0].numel()


def recorded_candidates(device: torch.device) -> Tensor:
    """Reads the recorded candidates (C, M, K)."""
    with np.load(RECORDING) as arrays:
        return torch.from_numpy(arrays["patches"].astype(np.int64)).to(device)


class Replay:
    """Replays recorded candidates on another model while `on` is active.

    Each row of a step is assigned a random recorded context; its j-th candidate then has the tokens of that context's
    j-th recorded one. Head and decoder still do all the work on the model's own samples.

    Args:
        patches_CMK: recorded candidates.
        seed: for the contexts.
    """

    def __init__(self, patches_CMK: Tensor, seed: int = 0):
        self.patches_CMK = patches_CMK
        self.generator = torch.Generator(patches_CMK.device).manual_seed(seed)

    @contextmanager
    def on(self, model: Any):
        new_candidates = model.new_candidates

        def new_replayed_candidates(hidden_RD, *args):
            num_contexts, device = len(self.patches_CMK), self.patches_CMK.device
            contexts_B = torch.randint(num_contexts, (len(hidden_RD),), generator=self.generator, device=device)
            candidates = new_candidates(hidden_RD, *args)
            is_lazy = isinstance(candidates, LazyCandidateBatch)
            candidates.__class__ = ReplayedLazyCandidates if is_lazy else ReplayedCandidates
            candidates.patches_BMK = self.patches_CMK[contexts_B]
            return candidates

        with mock.patch.object(model, "new_candidates", new_replayed_candidates):
            yield


class ReplayedCandidates(CandidateBatch):
    """Candidates that are sampled and decoded as usual, then replaced by recorded ones, `patches_BMK`."""

    patches_BMK: Tensor

    def extend(self, rows_R: Tensor, num_samples: int) -> None:
        super().extend(rows_R, num_samples)
        self.tokens_BNK = self.patches_BMK[:, : self.num_drawn]


class ReplayedLazyCandidates(LazyCandidateBatch):
    """Lazily decoded candidates: each token that is read comes from the recording."""

    patches_BMK: Tensor

    def decode_at(self, *index: Tensor) -> Tensor:
        super().decode_at(*index)
        return self.patches_BMK[index]
