"""Trains a tokenizer, the autoencoder, a CALM or, for comparison, a standard Llama from a recipe.

    calm train calm --recipe calm-m --tokenizer DIR --autoencoder DIR --train_files TEXTS --validation_files TEXTS

This module builds the configuration and the model from the recipe and the tokenizer and models that it names;
trainer.py trains it. Every field of the recipe can be given as --field value.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers.activations import ACT2FN

from calm_transformers.command_line import InputError, Parser, command, known_errors, require_package
from calm_transformers.documents import load_documents
from calm_transformers.loading import generation_defaults, is_missing_folder, load_checked, load_tokenizer

# In a checkout these modules are at the repository's root (see calm_transformers/model/__init__.py).
from calm_transformers.model.configuration_calm import HEADS, CALMAutoencoderConfig, CALMConfig
from calm_transformers.model.heads_calm import GenerativeHead
from calm_transformers.model.heads_calm_token_chain import TokenChainHead
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder
from calm_transformers.training.auxiliary import AUXILIARY_FILE, MultiTokenLoss, WithAuxiliary
from calm_transformers.training.backbone import init_chain_from_llama, init_from_llama, load_llama
from calm_transformers.training.cost import print_cost, recipe_cost
from calm_transformers.training.distil_temperature import ChainTeacher, HeadTeacher, TemperatureDistillation
from calm_transformers.training.recipe import (
    BACKBONE_FIELDS,
    CONFIGS,
    KINDS,
    PATCH_EMBEDDING_DECAYS,
    Recipe,
    describe_fields,
    load_recipe,
    parse_command_line,
)
from calm_transformers.training.tokenizer import filler_token_id, first_difference, save_tokenizer, train_bpe
from calm_transformers.training.trainer import PreparedRun, last_checkpoint, log_rank0, prepare_run, set_up

# Recipe field that names a folder or Hub id → the command that makes it.
MAKE_COMMANDS = {
    **{"tokenizer": "train tokenizer", "autoencoder": "train autoencoder", "init_from": "train"},
    "init_backbone": "train ar",
}
MODELS = {"autoencoder": CALMAutoencoder, "ar": LlamaForCausalLM}
DEFAULT_VOCAB_SIZE = 4096  # of a new tokenizer


@command
def main(argv: list[str] | None = None) -> int | None:
    parser = Parser("calm train", __doc__)
    subparsers = parser.add_subparsers(dest="kind", required=True, metavar="KIND", help=", ".join(KINDS))
    for kind in KINDS:
        epilog = f"Every field of the recipe can be given as --field value.\n\n{describe_fields(kind)}"
        subparser = subparsers.add_parser(kind, prog=f"{parser.prog} {kind}", description=None, epilog=epilog)
        subparser.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
        subparser.add_argument("--dry_run", action="store_true", help="print sizes, FLOPs and memory, and exit")
        resume_help = "auto: resume from the last checkpoint in output_dir"
        subparser.add_argument("--resume", default="auto", choices=["auto", "never"], help=resume_help)
    options, fields = parser.parse_known_args(argv)
    with known_errors():  # before the training itself, every error comes from the recipe, files or environment
        recipe = load_recipe(options.recipe, parse_command_line(fields) | {"kind": options.kind})
        if options.dry_run:
            return dry_run(recipe)
        if recipe.kind == "tokenizer":
            return train_tokenizer(recipe)
        run = prepare_training(recipe, options.resume)
    with known_errors(InputError, OSError):
        return run.train_and_export()


def prepare_training(recipe: Recipe, resume: str = "auto") -> PreparedRun:
    """Builds the model and tokenises the data; `train_and_export` of the result starts the training."""
    tokenizer = load_recipe_tokenizer(recipe)
    args = set_up(recipe)
    model = build_model(recipe, tokenizer)
    patch_size = getattr(model.config, "patch_size", 1)
    if recipe.kind == "calm":
        model = wrap_for_training(model, recipe)
    cost = recipe_cost(recipe, model.config, temperature_teacher(recipe))
    return prepare_run(recipe, args, model, tokenizer, patch_size, resume, sum(cost.train_flops.values()))


def train_tokenizer(recipe: Recipe) -> None:
    """Trains and saves a BPE tokenizer, without checkpoints."""
    texts, _ = load_documents(recipe.data, "train", "Reading text for BPE")
    tokenizer = train_bpe(texts, recipe.model.get("vocab_size", DEFAULT_VOCAB_SIZE))
    save_tokenizer(tokenizer, recipe.output_dir)
    print(f"wrote {recipe.output_dir}, {len(tokenizer)} entries")


def dry_run(recipe: Recipe) -> None:
    """Prints the sizes and the cost of the model that a run would train now."""
    if recipe.kind == "tokenizer":
        print(f"byte-level BPE, vocab_size {recipe.model.get('vocab_size', DEFAULT_VOCAB_SIZE)}")
        return
    config, notes = config_with_notes(recipe)
    print_cost(recipe, config, notes, temperature_teacher(recipe))


def temperature_teacher(recipe: Recipe) -> CALMConfig | None:
    """Returns the configuration of the model whose head teaches temperature, or None without one."""
    if not recipe.distil_temperature or mtp_file(recipe):
        return None
    return read_config("init_from", recipe.init_from, CALMConfig)


# what a recipe refers to


class MissingInput(InputError):
    """A tokenizer or model is not named or doesn't exist yet; a dry run uses defaults and reports the `reason`."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def read_source(field: str, source: str | None, load: Callable[[str], Any]) -> Any:
    """Returns `load(source)` of the folder or Hub id in the recipe's `field`, or raises `MissingInput`."""
    if source is None:
        message = f"no {field}: give --{field} a folder or a Hub id ({MAKE_COMMANDS[field]} makes one)."
        raise MissingInput(message, f"no {field} is named")
    exists = Path(source).exists()
    if is_missing_folder(source) or (source.startswith("runs/") and not exists):
        message = f"{field} {source}: no such folder ({MAKE_COMMANDS[field]} makes one)."
        raise MissingInput(message, f"the {field} {source} does not exist yet")
    try:
        return load(source)
    except Exception as error:  # each library has its own
        reason = " ".join(str(error).partition("\n\n")[0].split())
        if exists:
            raise InputError(f"{field} {source}: cannot be read: {reason}") from error
        message = f"{field} {source}: no such folder, nor available from the Hub: {reason}"
        raise MissingInput(message, f"the {field} {source} is not available") from error


def load_model(field: str, source: str | None, model_class, **settings):
    """Loads the model in the recipe's `field`; missing weights are an error."""
    return read_source(field, source, partial(load_checked, model_class.from_pretrained, **settings))


def read_config(field: str, source: str | None, config_class) -> Any:
    """Reads the configuration of the model in the recipe's `field`; another model type is an error."""
    values, _ = read_source(field, source, PretrainedConfig.get_config_dict)
    model_type = values.get("model_type")
    if model_type != config_class.model_type:
        raise InputError(f"{field} {source}: is a model of type {model_type!r}, not {config_class.model_type!r}.")
    return read_source(field, source, lambda _: config_class.from_dict(values))


def load_recipe_tokenizer(recipe: Recipe):
    """Loads the recipe's tokenizer, by default the one of `init_from` or the autoencoder."""
    return read_source("tokenizer", recipe.tokenizer or recipe.init_from or recipe.autoencoder, load_tokenizer)


def load_autoencoder_config(recipe: Recipe) -> CALMAutoencoderConfig:
    """Reads the configuration of the recipe's autoencoder, which may be part of a CALM."""
    source = recipe.autoencoder
    values, _ = read_source("autoencoder", source, PretrainedConfig.get_config_dict)
    model_type = values.get("model_type")
    if model_type not in (CALMConfig.model_type, CALMAutoencoderConfig.model_type):
        raise InputError(f"autoencoder {source}: has no autoencoder, its config.json has model_type {model_type!r}.")
    return read_source("autoencoder", source, CALMAutoencoderConfig.from_pretrained)


def check_vocabulary(field: str, source: str, llama: LlamaConfig, tokenizer) -> None:
    """Raises `InputError` if a Llama's tokenizer differs from ours, which may have more special tokens at its end.

    If the Llama has no tokenizer, only the vocabulary sizes are compared.
    """
    try:
        llama_tokenizer = load_tokenizer(source)
    except (OSError, ValueError):
        sizes = f"vocabulary of {llama.vocab_size:,} tokens, the autoencoder's has {len(tokenizer):,}"
        if llama.vocab_size > len(tokenizer):
            raise InputError(f"{field} {source}: has a {sizes}.") from None
        log_rank0(f"{field} {source}: no tokenizer found, only the sizes were compared: it has a {sizes}")
        return
    difference = first_difference(llama_tokenizer, tokenizer, llama.vocab_size)
    if difference:
        token_id, llama_token, our_token = (repr(part) if part is not None else "none" for part in difference)
        tokens = f"token {token_id} is {llama_token}, in the autoencoder's tokenizer {our_token}"
        raise InputError(f"{field} {source}: the tokenizers differ: {tokens}.")


# the configuration


def build_config(recipe: Recipe, tokenizer=None, autoencoder: CALMAutoencoderConfig | None = None):
    """Builds the model's configuration from the recipe, the tokenizer and, for a CALM, the autoencoder.

    In a dry run either may be `None`: its fields then have defaults. With `init_from` the result is that model's
    configuration, overridden by a CALM's model section.
    """
    config_class = CONFIGS[recipe.kind]
    if recipe.init_from:
        config = read_config("init_from", recipe.init_from, config_class)
        if recipe.kind != "calm":
            return config
        distilled = {"distilled_temperature": recipe.distil_temperature} if recipe.distil_temperature else {}
        return make_config(CALMConfig, config.to_dict() | recipe.model | distilled)
    if recipe.kind == "calm":
        return make_config(CALMConfig, _calm_fields(recipe, tokenizer, autoencoder))
    defaults = {"max_position_embeddings": recipe.data.block_size} if recipe.kind == "ar" else {}
    return make_config(config_class, {**defaults, **recipe.model, **tokenizer_fields(tokenizer)})


def _calm_fields(recipe: Recipe, tokenizer, autoencoder: CALMAutoencoderConfig | None) -> dict:
    """Returns the fields of a new CALM's configuration."""
    if autoencoder and tokenizer and autoencoder.vocab_size != len(tokenizer):
        raise InputError(
            f"the autoencoder {recipe.autoencoder} has a vocabulary of {autoencoder.vocab_size} tokens, the tokenizer "
            f"one of {len(tokenizer)}: use the tokenizer that the autoencoder was trained with."
        )
    values = dict(recipe.model)
    if recipe.init_backbone:
        values |= _backbone_fields(recipe, tokenizer)
    if autoencoder:
        values = {
            "max_position_embeddings": recipe.data.block_size // autoencoder.patch_size,
            "patch_size": autoencoder.patch_size,
            "latent_size": autoencoder.latent_size,
            **values,
            "vocab_size": autoencoder.vocab_size,
            "autoencoder_config": autoencoder.to_dict(),
        }
    if tokenizer:
        values |= {**tokenizer_fields(tokenizer), "prompt_filler_token_id": filler_token_id(tokenizer)}
    return values


def _backbone_fields(recipe: Recipe, tokenizer) -> dict:
    """Returns the fields that a CALM takes from the configuration of its `init_backbone`."""
    llama = read_config("init_backbone", recipe.init_backbone, LlamaConfig)
    values = {name: value for name, value in llama.to_dict().items() if name in BACKBONE_FIELDS}
    resolved = make_config(CALMConfig, values).to_dict()
    resolved |= resolved["rope_parameters"]
    for name in BACKBONE_FIELDS:
        if name in recipe.model and recipe.model[name] != resolved.get(name):
            raise InputError(
                f"{name}={recipe.model[name]!r}: init_backbone {recipe.init_backbone} has {resolved.get(name)!r}, "
                "which cannot be changed."
            )
    if tokenizer:
        check_vocabulary("init_backbone", str(recipe.init_backbone), llama, tokenizer)
    return values


def describe_backbone(recipe: Recipe, config: CALMConfig) -> str:
    sizes = ", ".join(f"{name} {getattr(config, name):,}" for name in BACKBONE_FIELDS[:7])
    return f"{sizes}: from the Llama {recipe.init_backbone}"


def tokenizer_fields(tokenizer) -> dict:
    """Returns the configuration fields that the tokenizer sets."""
    if tokenizer is None:  # in a dry run
        return {}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**special, "vocab_size": len(tokenizer)}


def make_config(config_class, values: dict):
    try:
        config = config_class(**values)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    if config.hidden_act not in ACT2FN:
        raise InputError(f"hidden_act={config.hidden_act!r}: must be one of {', '.join(sorted(ACT2FN))}.")
    return config


# the dry run


def config_with_notes(recipe: Recipe) -> tuple[PretrainedConfig, list[str]]:
    """Returns the configuration that a run would train now, and notes on what was assumed."""
    if recipe.init_from:
        return build_config(recipe), []
    notes, tokenizer_notes, autoencoder = list[str](), list[str](), None
    if recipe.kind == "calm":
        sizes = ["patch_size", "latent_size"]
        autoencoder = _load_or_note(load_autoencoder_config, recipe, recipe.autoencoder, sizes, notes)
    tokenizer = _load_or_note(load_recipe_tokenizer, recipe, recipe.tokenizer, ["vocab_size"], tokenizer_notes)
    config = build_config(recipe, tokenizer, autoencoder)
    if recipe.init_backbone:
        notes.append(describe_backbone(recipe, config))
    # With an autoencoder vocab_size is known without the tokenizer.
    return config, notes + ([] if autoencoder else tokenizer_notes)


def _load_or_note(load: Callable, recipe: Recipe, source: str | None, fields: list[str], notes: list[str]):
    """Returns `load(recipe)`; if the `source` is missing, `None`, and adds a note on the defaults of the `fields`.

    A recipe without a source that sets the fields itself, as the published ones do, gets no note.
    """
    try:
        return load(recipe)
    except MissingInput as error:
        config_class = CONFIGS[recipe.kind]
        missing = [field for field in fields if field not in recipe.model]
        values = {**config_class().to_dict(), **recipe.model}
        origin = f"{config_class.__name__}'s default" if missing else "the recipe's"
        if source or missing:
            assumed = ", ".join(f"{field} {values[field]:,}" for field in missing or fields)
            notes.append(f"{assumed}: {origin}, as {error.reason}")
        return None


# the model


def build_model(recipe: Recipe, tokenizer):
    """Builds a new model around the trained autoencoder, or loads `init_from`."""
    if recipe.kind == "calm":
        if recipe.distil_temperature:
            return load_model("init_from", recipe.init_from, CALMForCausalLM)  # the teacher
        return load_initial_calm(recipe) if recipe.init_from else build_calm(recipe, tokenizer)
    config, model_class = build_config(recipe, tokenizer), MODELS[recipe.kind]  # checks init_from
    return load_model("init_from", recipe.init_from, model_class) if recipe.init_from else model_class(config)


def build_calm(recipe: Recipe, tokenizer) -> CALMForCausalLM:
    model = CALMForCausalLM(build_config(recipe, tokenizer, load_autoencoder_config(recipe)))
    autoencoder = load_model("autoencoder", recipe.autoencoder, CALMAutoencoder)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    if starts_from_llama(recipe):
        num_new = init_from_llama(model, load_backbone(recipe), PATCH_EMBEDDING_DECAYS[recipe.patch_embedding_init])
        note = f"; {num_new} new tokens get the mean embedding" if num_new else ""
        log_rank0(describe_backbone(recipe, model.config) + note)
    model.generation_config = GenerationConfig(**generation_defaults(model.config))
    init_chain(model, recipe)
    return model


def load_initial_calm(recipe: Recipe) -> CALMForCausalLM:
    """Loads `init_from`, with a new head if the recipe has another head_type.

    Heads of different types share layer names, so the whole head is replaced. It is built outside `from_pretrained`,
    which would overwrite the values that its constructor sets.
    """
    config = build_config(recipe)
    if config.head_type == read_config("init_from", recipe.init_from, CALMConfig).head_type:
        return load_model("init_from", recipe.init_from, CALMForCausalLM, config=config)
    load = partial(CALMForCausalLM.from_pretrained, config=config, ignore_mismatched_sizes=True)
    model: Any = read_source("init_from", recipe.init_from, load)
    model.head = new_head(model, config)
    init_chain(model, recipe)
    return model


def init_chain(model: CALMForCausalLM, recipe: Recipe) -> None:
    """Initialises a new token-chain head with the MTP loss's weights, where the recipe's start has them."""
    if isinstance(model.head, TokenChainHead) and (mtp_state := initial_mtp_state(recipe, model.config)):
        model.head.chain.load_state_dict(mtp_state)


def new_head(model: CALMForCausalLM, config: CALMConfig) -> GenerativeHead:
    """Returns an initialised head of the configuration, in the model's dtype."""
    head = HEADS[config.head_type](config)
    head.apply(model._init_weights)
    return head.to(model.dtype)


def distil_temperature(model: CALMForCausalLM, recipe: Recipe) -> TemperatureDistillation:
    """Gives the model a head that takes a temperature, and wraps it with its teacher.

    The teacher is the MTP loss of the model's last checkpoint, where there is one, or else the model's own head. The
    new head begins with the weights of that, if it is of the same type.
    """
    old_head, config = model.head, build_config(recipe)
    if HEADS[config.head_type].samples_tokens:
        raise InputError(f"head_type={config.head_type}: samples at every temperature without distillation.")
    mtp_state = initial_mtp_state(recipe, config)
    if mtp_state:
        chain = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
        chain.load_state_dict(mtp_state)
        teacher, name = ChainTeacher(chain), "the MTP loss"
    elif isinstance(old_head, TokenChainHead):
        teacher, name = ChainTeacher(old_head.chain), "its head"
    else:
        teacher, name = HeadTeacher(old_head, model.autoencoder), "its head"
    log_rank0(f"the teacher is {name}, of {recipe.init_from}")
    model.head, same_type = new_head(model, config), config.head_type == model.config.head_type
    if same_type:
        keys = model.head.load_state_dict(old_head.state_dict(), strict=False)
        others = [key for key in keys.missing_keys if not key.startswith("temperature_embedding.")]
        if others or keys.unexpected_keys:
            raise InputError(f"the head of {recipe.init_from} has other layers: keep them, or name another head_type.")
    model.config = model.model.config = config
    model._no_split_modules = [*(model._no_split_modules or []), type(model.head).__name__]
    return TemperatureDistillation(model, teacher, config.num_samples)


def load_backbone(recipe: Recipe) -> LlamaForCausalLM:
    source = str(recipe.init_backbone)
    return load_llama("init_backbone", source, read_config("init_backbone", source, LlamaConfig))


def starts_from_llama(recipe: Recipe) -> bool:
    """Whether the run initialises its backbone from a Llama, rather than resuming from a checkpoint."""
    return bool(recipe.init_backbone) and not last_checkpoint(Path(recipe.output_dir))


def add_lora(model: CALMForCausalLM, rank: int):
    """Adds a LoRA adapter to every linear layer of the backbone and the head, and freezes all other weights."""
    require_package("peft", "train", "lora_rank")
    from peft import LoraConfig, get_peft_model

    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in layers if not name.startswith("autoencoder.")]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", target_modules=targets)
    return get_peft_model(model, lora)


def wrap_for_training(model: CALMForCausalLM, recipe: Recipe):
    """Freezes, adapts or wraps a CALM for Trainer as the recipe says."""
    if recipe.distil_temperature:
        return distil_temperature(model, recipe)
    if recipe.lora_rank:
        return add_lora(model, recipe.lora_rank)
    if recipe.freeze_backbone:
        model.model.requires_grad_(False)
    if recipe.auxiliary_weight:
        wrapped = WithAuxiliary(model, recipe.auxiliary_weight, recipe.head_weight, recipe.auxiliary_targets)
        if state := initial_mtp_state(recipe, model.config):
            wrapped.auxiliary.load_state_dict(state)
        return wrapped
    return model


def initial_mtp_state(recipe: Recipe, config: CALMConfig) -> dict[str, Tensor] | None:
    """Returns the initial state dict of the MTP loss, `None` if it is trained from scratch.

    It comes from `init_backbone`'s output matrix and embeddings, or from `init_from`: a checkpoint, or the last one of
    that run's folder.
    """
    if starts_from_llama(recipe):
        mtp_loss = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
        init_chain_from_llama(mtp_loss, load_backbone(recipe))
        return mtp_loss.state_dict()
    path = mtp_file(recipe)
    if path is None:
        return None
    return {name.removeprefix("auxiliary."): value for name, value in safetensors.torch.load_file(path).items()}


def mtp_file(recipe: Recipe) -> Path | None:
    """Returns the file of the MTP loss that was trained beside the model `init_from`, if there is one."""
    if not recipe.init_from:
        return None
    folder = Path(recipe.init_from)
    path = (last_checkpoint(folder) or folder) / AUXILIARY_FILE
    return path if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
