"""The models and the patch distributions that the generation benchmark runs on.

- *worst case*: random weights. No candidate patch comes twice, so nothing can be saved by repetition.
- *real*: the patch distributions that a trained model meets while it writes. A trained model has its own. On a random
  model of a published shape those of the demo are imposed: it does all the work on its own candidates, and wherever a
  token becomes known, it is that of one that the demo drew. So which candidates are the same patch, and which tokens
  must be decoded to know it, is as it was there: real draws in the order they came.

Axes: B batch, L tokens, R rows that draw, K tokens per patch, N candidates, C recorded contexts, M recorded draws of a
row, D hidden size, Z latent size.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from calm_transformers.benchmarks.meters import wrapped
from calm_transformers.command_line import InputError, format_error, positive
from calm_transformers.loading import is_calm, load_causal_lm, load_config
from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.model.generation_calm_candidates import CandidateBatch, LazyCandidateBatch
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.training.recipe import load_recipe, recipe_names

DEMO_FOLDER = Path(__file__).parents[2]
RECORDED_ROWS, RECORDED_STEPS = 8, 32  # texts that the demo model writes, and patches of each
SHARE_CONTEXTS = 16  # whose candidates are compared
WORST_DISTINCT_SHARE = 0.99


# options


def add_device_options(parser: argparse.ArgumentParser, gpu: bool) -> None:
    """What is measured on, by default a GPU in bfloat16 or a CPU in float32, and how often."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if gpu else "float32")
    parser.add_argument("--repetitions", type=positive, default=3)


def check_device(name: str) -> None:
    """Raises InputError where there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here; use --device cpu.")


# models


def is_trained(name: str) -> bool:
    """Whether the name stands for a model with weights, rather than for the shape in a recipe."""
    return name == "demo" or name not in recipe_names()


def model_folder(name: str, demo: str | Path) -> str:
    """Where a trained model is; raises InputError when the demo is asked for and not there."""
    if name != "demo":
        return name
    if not (Path(demo) / "config.json").exists():
        raise InputError(f"{demo} holds no demo model (no config.json): train it, or name another with --demo.")
    return str(demo)


def shape_config(name: str, demo: str | Path = DEMO_FOLDER) -> CALMConfig | LlamaConfig:
    """The configuration of a recipe, of the demo, or of a model by its folder or Hub id.

    A recipe of an ordinary model that names no vocabulary has the demo's.
    """
    if is_trained(name):
        try:
            config = load_config(model_folder(name, demo))
        except ValueError as error:
            raise InputError(f"{name} is neither a recipe nor a model: {format_error(error)}") from error
        if not isinstance(config, CALMConfig | LlamaConfig):
            raise InputError(f"{name} is neither a CALM nor a Llama: its model_type is {config.model_type!r}.")
        return config
    recipe = load_recipe(name)
    if recipe.kind == "ar":
        fields: dict[str, Any] = {"vocab_size": shape_config("demo", demo).vocab_size} | recipe.model
        return LlamaConfig(**fields)
    if recipe.kind != "calm" or "vocab_size" not in recipe.model:
        raise InputError(f"the recipe {name} does not say the shape of a whole language model.")
    return CALMConfig(**recipe.model, autoencoder_config=load_recipe("autoencoder").model)


@torch.no_grad()
def random_model(config: CALMConfig | LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0):
    """A model whose every matrix is random, also those that start at zero for training.

    Matrices are normal with variance 1 / columns, norms 1, biases 0, so that activations keep their size. It is built
    without memory first: the usual initialisation would take minutes, and twice the memory for bfloat16.
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
    return _never_stopping(model.eval())


def trained_model(name: str, device: torch.device, dtype: torch.dtype, demo: str | Path = DEMO_FOLDER):
    return _never_stopping(load_causal_lm(model_folder(name, demo), dtype, device))


def _never_stopping(model):
    """Every text gets its full length: no EOS token, nor anything else, ends it."""
    bos = getattr(model.config, "bos_token_id", None)
    model.generation_config = GenerationConfig(bos_token_id=bos, pad_token_id=0, eos_token_id=None)
    return model


# prompts and candidates


def random_prompts(model, batch_size: int, length: int, seed: int = 0) -> Tensor:
    """Uniformly random token ids (B, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch_size, length), generator=generator).to(model.device)


def own_prompts(model, batch_size: int, length: int, temperature: float, num_candidates: int) -> Tensor:
    """Beginnings of texts (B, length) that a trained CALM writes itself, from BOS on."""
    torch.manual_seed(0)
    start = torch.full((batch_size, 1), model.config.bos_token_id, device=model.device)
    if length == 1:
        return start
    return write(model, start, length - 1, temperature=temperature, num_candidates=num_candidates)


def write(model, prompts_BL: Tensor, length: int, **settings) -> Tensor:
    """Prompts and so many sampled tokens (B, L + length); InputError if fewer came."""
    text = model.generate(
        prompts_BL, attention_mask=torch.ones_like(prompts_BL), do_sample=True, max_new_tokens=length, **settings
    )
    if text.shape[1] != prompts_BL.shape[1] + length:
        raise InputError(f"{text.shape[1] - prompts_BL.shape[1]} tokens were generated instead of {length}.")
    return text


@torch.no_grad()
def draw_candidates(model, prompts_BL: Tensor, num_candidates: int) -> Tensor:
    """Candidates (C, N, K) of the patch after each of the first patches of the prompts, `SHARE_CONTEXTS` a prompt."""
    whole = prompts_BL.shape[1] // model.config.patch_size * model.config.patch_size
    hidden_CD = model.model(input_ids=prompts_BL[:, :whole]).last_hidden_state[:, :SHARE_CONTEXTS].flatten(0, 1)
    torch.manual_seed(0)
    latents_NCZ = model.head.sample(hidden_CD, num_samples=num_candidates)
    return model.autoencoder.decode_tokens(latents_NCZ).transpose(0, 1)


def distinct_share(patches_CNK: Tensor) -> float:
    """Different patches among the N candidates of a context, ÷ N; the mean over contexts."""
    counts = [len(patches_NK.unique(dim=0)) for patches_NK in patches_CNK]
    return sum(counts) / patches_CNK[..., 0].numel()


def check_worst_case(share: float) -> None:
    """Raises InputError when candidates of the random model repeat."""
    if share < WORST_DISTINCT_SHARE:
        raise InputError(
            f"only {share:.1%} of the random model's candidates are distinct: this is not the worst case; its "
            f"vocabulary or its latents are too small, so leave out --workload worst."
        )


def record(model, temperature: float, num_draws: int) -> Tensor:
    """The candidates (C, N, K) of each step that a trained CALM draws while it writes, from BOS on."""
    if model.config.bos_token_id is None:
        raise InputError("the model's config.json has no bos_token_id, with which its texts would begin.")
    patches = []

    def keep(_, __, latents_NBZ: Tensor) -> None:
        patches.append(model.autoencoder.decode_tokens(latents_NBZ.transpose(0, 1)))

    hook = model.head.register_forward_hook(keep)
    start = torch.full((RECORDED_ROWS, 1), model.config.bos_token_id, device=model.device)
    seeded = torch.Generator(model.device).manual_seed(0)
    settings = {"temperature": temperature, "num_candidates": num_draws, "sampling_method": "batch"}
    try:
        write(model, start, RECORDED_STEPS * model.config.patch_size, generator=seeded, **settings)
    finally:
        hook.remove()
    return torch.cat(patches)


class Replay:
    """Imposes recorded candidates on another model while `on` is active.

    At each step each row is given a recorded context; each token of its j-th draw of the step then comes out as that
    of the j-th recorded draw. The head and the decoder do all the work of their own draws first.

    Args:
        patches_CMK: from `record`.
        seed: chooses the contexts.
    """

    def __init__(self, patches_CMK: Tensor, seed: int = 0):
        self.patches_CMK = patches_CMK
        self.generator = torch.Generator(patches_CMK.device).manual_seed(seed)

    @contextmanager
    def on(self, model: PreTrainedModel):
        patch_size = self.patches_CMK.shape[-1]
        if not is_calm(model) or model.config.patch_size != patch_size:
            raise InputError(
                f"the recorded patches have {patch_size} tokens, the model's "
                f"{getattr(model.config, 'patch_size', 1)}: record a model of the same patch size (--demo)."
            )
        with wrapped(model, "new_candidates", self._impose):
            yield

    def _impose(self, new_candidates):
        def call(draw, rows_B, *args):
            num_contexts, device = len(self.patches_CMK), self.patches_CMK.device
            contexts_B = torch.randint(num_contexts, (len(rows_B),), generator=self.generator, device=device)
            pool = new_candidates(draw, rows_B, *args)
            kind = LazyReplay if isinstance(pool, LazyCandidateBatch) else PlainReplay
            return kind(pool, self.patches_CMK[contexts_B])

        return call


class PlainReplay(CandidateBatch):
    """A pool that draws and decodes like another, and then takes a recording's candidates for its own.

    Args:
        pool: the other, still empty.
        patches_BMK: the recorded candidates of each row.
    """

    def __init__(self, pool: CandidateBatch, patches_BMK: Tensor):
        super().__init__(pool.draw, pool.rows_B, pool.autoencoder, pool.forbidden_KV, pool.rules)
        self.patches_BMK = patches_BMK

    def extend(self, rows_R: Tensor, num_draws: int) -> None:
        check_recorded(self.num_drawn + num_draws, self.patches_BMK)
        super().extend(rows_R, num_draws)
        self.tokens_BNK = self.patches_BMK[:, : self.num_drawn]


class LazyReplay(LazyCandidateBatch):
    """The same for lazy decoding: each token that is read is that of the recording."""

    def __init__(self, pool: LazyCandidateBatch, patches_BMK: Tensor):
        super().__init__(pool.draw, pool.rows_B, pool.autoencoder, pool.forbidden_KV)
        self.patches_BMK = patches_BMK

    def extend(self, rows_R: Tensor, num_draws: int) -> None:
        check_recorded(self.num_drawn + num_draws, self.patches_BMK)
        super().extend(rows_R, num_draws)

    def read(self, *index: Tensor) -> Tensor:
        super().read(*index)
        return self.patches_BMK[index]


def check_recorded(num_draws: int, patches_BMK: Tensor) -> None:
    if num_draws > patches_BMK.shape[1]:
        raise InputError(f"{num_draws} draws of a row, of {patches_BMK.shape[1]} recorded.")
