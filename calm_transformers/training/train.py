"""Trains a tokenizer, the autoencoder, a CALM or, for comparison, an ordinary Llama, by a recipe.

    calm train calm --recipe demo

Here a recipe, with the tokenizer and the models that it names, becomes a configuration and a model; `trainer.fit`
trains it. Every field of the recipe can be given as --field value.
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
from calm_transformers.documents import documents
from calm_transformers.loading import generation_defaults, is_missing_folder, load_checked, load_tokenizer
from calm_transformers.model.configuration_calm import HEADS, CALMAutoencoderConfig, CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder
from calm_transformers.training.auxiliary import AUXILIARY_FILE, MultiTokenLoss, WithAuxiliary
from calm_transformers.training.backbone import begin_chain, begin_with_llama, load_llama
from calm_transformers.training.cost import print_cost
from calm_transformers.training.distil import Teacher
from calm_transformers.training.recipe import (
    BACKBONE_FIELDS,
    CONFIGS,
    KINDS,
    PATCH_EMBEDDINGS,
    Recipe,
    load_recipe,
    parse_command_line,
    recipe_names,
)
from calm_transformers.training.tokenizer import filler_token_id, first_difference, save_tokenizer, train_bpe
from calm_transformers.training.trainer import begin, fit, last_checkpoint, say

# Field of a recipe that names a folder or Hub id → the command that makes one.
MAKERS = {
    **{"tokenizer": "train tokenizer", "autoencoder": "train autoencoder", "init_from": "train"},
    **{"init_backbone": "train ar", "distil": "train ar"},
}
MODELS = {"autoencoder": CALMAutoencoder, "ar": LlamaForCausalLM}
VOCAB_SIZE = 4096  # of a tokenizer whose recipe states none


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm train", __doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", help=", ".join(KINDS))
    for kind in KINDS:
        epilog = f"Every field of the recipe can be given as --field value. Recipes: {', '.join(recipe_names())}."
        of_kind = kinds.add_parser(kind, prog=f"{parser.prog} {kind}", description=None, epilog=epilog)
        of_kind.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
        of_kind.add_argument("--dry_run", action="store_true", help="print sizes, FLOPs and memory, and exit")
        resume = "auto: go on where output_dir's checkpoints end"
        of_kind.add_argument("--resume", default="auto", choices=["auto", "never"], help=resume)
    options, fields = parser.parse_known_args(argv)
    with known_errors():  # until the training itself begins, every error is one of recipe, files or environment
        recipe = load_recipe(options.recipe, parse_command_line(fields))
        if recipe.kind != options.kind:
            raise InputError(f"the recipe {options.recipe!r} is for train {recipe.kind}.")
        training = dry_run(recipe) if options.dry_run else prepare(recipe, options.resume)
    if training is not None:
        with known_errors(InputError, OSError):
            training()


def prepare(recipe: Recipe, resume: str = "auto") -> Callable[[], None] | None:
    """Trains a tokenizer, from the start whatever `resume` says; of any other training, what `fit` returns."""
    if recipe.kind == "tokenizer":
        return train_tokenizer(recipe)
    tokenizer = tokenizer_of(recipe)
    stated = begin(recipe)
    model = make_model(recipe, tokenizer)
    patch_size = getattr(model.config, "patch_size", 1)
    if recipe.kind == "calm":
        model = for_training(model, recipe, tokenizer)
    return fit(recipe, stated, model, tokenizer, patch_size, resume)


def train_tokenizer(recipe: Recipe) -> None:
    texts, _ = documents(recipe.data, "train", "Counting words")
    tokenizer = train_bpe(texts, recipe.model.get("vocab_size", VOCAB_SIZE))
    save_tokenizer(tokenizer, recipe.output_dir)
    print(f"wrote {recipe.output_dir}, {len(tokenizer)} entries")


def dry_run(recipe: Recipe) -> None:
    """Prints the configuration that a run would train now, and what it costs."""
    if recipe.kind == "tokenizer":
        print(f"byte-level BPE, vocab_size {recipe.model.get('vocab_size', VOCAB_SIZE)}")
        return
    config, notes = config_and_notes(recipe)
    print_cost(recipe, config, notes, read_config("distil", recipe.distil, LlamaConfig) if recipe.distil else None)


# what a recipe names


class NotThere(InputError):
    """What a recipe needs is not named or, so far, not there; a dry run can do without. `why` is half a sentence."""

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why


def read(what: str, where: str | None, reader):
    """`reader(where)`, of the folder or Hub id that a recipe names in the field `what`, or `NotThere`."""
    if where is None:
        why = f"no {what} is named"
        raise NotThere(f"no {what}: give --{what} a folder or a Hub id ({MAKERS[what]} makes one).", why)
    is_there = Path(where).exists()
    if is_missing_folder(where) or (where.startswith("runs/") and not is_there):
        message = f"{what} {where}: no such folder ({MAKERS[what]} makes one)."
        raise NotThere(message, f"the {what} {where} is not there yet")
    try:
        return reader(where)
    except Exception as error:  # each library has its own
        reason = " ".join(str(error).partition("\n\n")[0].split())
        if is_there:
            raise InputError(f"{what} {where}: cannot be read: {reason}") from error
        message = f"{what} {where}: no such folder, nor to be had from the Hub: {reason}"
        raise NotThere(message, f"the {what} {where} cannot be had") from error


def read_whole(what: str, where: str | None, model_class, **settings):
    """The model that a recipe names, as `read`; each of its weights is there."""
    return read(what, where, partial(load_checked, model_class.from_pretrained, **settings))


def read_config(what: str, where: str | None, config_class) -> Any:
    """The configuration of the model that a recipe names, as `read`; one of another class is refused, too."""
    fields, _ = read(what, where, PretrainedConfig.get_config_dict)
    found = fields.get("model_type")
    if found != config_class.model_type:
        raise InputError(f"{what} {where}: is a model of type {found!r}, not {config_class.model_type!r}.")
    return config_class.from_dict(fields)


def tokenizer_of(recipe: Recipe):
    """The tokenizer that the recipe names, or the one beside the model that it goes on from."""
    return read("tokenizer", recipe.tokenizer or recipe.init_from or recipe.autoencoder, load_tokenizer)


def autoencoder_config_of(recipe: Recipe) -> CALMAutoencoderConfig:
    """The configuration of the trained autoencoder that the recipe names, or of the one in a CALM."""
    where = recipe.autoencoder
    fields, _ = read("autoencoder", where, PretrainedConfig.get_config_dict)
    found = fields.get("model_type")
    if found not in (CALMConfig.model_type, CALMAutoencoderConfig.model_type):
        raise InputError(f"autoencoder {where}: holds none, its config.json has model_type {found!r}.")
    return read("autoencoder", where, CALMAutoencoderConfig.from_pretrained)


def check_tokens(what: str, where: str, llama: LlamaConfig, tokenizer) -> None:
    """Compares the tokenizer beside a Llama with ours, which may have more special tokens at its end.

    Where there is none to be read, it says so and compares the numbers of tokens.
    """
    try:
        theirs = load_tokenizer(where)
    except (OSError, ValueError):
        known = f"{llama.vocab_size:,}", f"{len(tokenizer):,}"
        if llama.vocab_size > len(tokenizer):
            raise InputError(f"{what} {where}: knows {known[0]} tokens, the autoencoder {known[1]}.") from None
        say(
            f"{what} {where}: no tokenizer can be read there, so only the numbers of tokens were compared, "
            f"{known[0]} and the autoencoder's {known[1]}"
        )
        return
    difference = first_difference(theirs, tokenizer, llama.vocab_size)
    if difference:
        token_id, *tokens = difference
        their, our = ("none" if token is None else repr(token) for token in tokens)
        raise InputError(
            f"{what} {where}: token {token_id} is {their} in its tokenizer and {our} in the autoencoder's, "
            "so that the two read text differently."
        )


# the configuration


def config_of(recipe: Recipe, tokenizer=None, autoencoder: CALMAutoencoderConfig | None = None):
    """The configuration that the recipe states around the tokenizer and, of a CALM, the autoencoder, both `None` where
    a dry run has none; or, with `init_from`, that of the model before, which a CALM's recipe changes.
    """
    config_class = CONFIGS[recipe.kind]
    if recipe.init_from:
        before = read_config("init_from", recipe.init_from, config_class)
        return make_config(CALMConfig, before.to_dict() | recipe.model) if recipe.kind == "calm" else before
    if recipe.kind == "calm":
        return make_config(CALMConfig, _calm_values(recipe, tokenizer, autoencoder))
    stated = {"max_position_embeddings": recipe.data.block_size} if recipe.kind == "ar" else {}
    return make_config(config_class, {**stated, **recipe.model, **tokenizer_fields(tokenizer)})


def _calm_values(recipe: Recipe, tokenizer, autoencoder: CALMAutoencoderConfig | None) -> dict:
    if autoencoder and tokenizer and autoencoder.vocab_size != len(tokenizer):
        raise InputError(
            f"the autoencoder {recipe.autoencoder} knows {autoencoder.vocab_size} tokens, the tokenizer "
            f"{len(tokenizer)}: both must be the ones it was trained with."
        )
    values = dict(recipe.model)
    if recipe.init_backbone:
        values |= _backbone_values(recipe, tokenizer)
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


def _backbone_values(recipe: Recipe, tokenizer) -> dict:
    """What a CALM takes from the configuration of the Llama that it begins with."""
    llama = read_config("init_backbone", recipe.init_backbone, LlamaConfig)
    given = llama.to_dict()
    values = {name: given[name] for name in BACKBONE_FIELDS if name in given}
    whole = make_config(CALMConfig, values).to_dict()
    whole |= whole["rope_parameters"]
    for name in BACKBONE_FIELDS:
        if name in recipe.model and recipe.model[name] != whole.get(name):
            raise InputError(
                f"{name}={recipe.model[name]!r}: init_backbone {recipe.init_backbone} has {whole.get(name)!r}, which "
                "cannot be changed."
            )
    if tokenizer:
        check_tokens("init_backbone", str(recipe.init_backbone), llama, tokenizer)
    return values


def backbone_note(recipe: Recipe, config: CALMConfig) -> str:
    """The sizes that come from `init_backbone`, whatever the recipe's file states."""
    sizes = ", ".join(f"{name} {getattr(config, name):,}" for name in BACKBONE_FIELDS[:7])
    return f"{sizes}: of the Llama {recipe.init_backbone}"


def tokenizer_fields(tokenizer) -> dict:
    """What a configuration takes from the tokenizer; nothing where a dry run has none."""
    if tokenizer is None:
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


def config_and_notes(recipe: Recipe) -> tuple[PretrainedConfig, list[str]]:
    """The configuration that a run would make of what is there already, and lines on what isn't."""
    if recipe.init_from:
        return config_of(recipe), []
    notes: list[str] = []
    vocabulary: list[str] = []
    autoencoder = None
    if recipe.kind == "calm":
        sizes = ["patch_size", "latent_size"]
        autoencoder = _if_there(autoencoder_config_of, recipe, recipe.autoencoder, sizes, notes)
    tokenizer = _if_there(tokenizer_of, recipe, recipe.tokenizer, ["vocab_size"], vocabulary)
    config = config_of(recipe, tokenizer, autoencoder)
    if recipe.init_backbone:
        notes.append(backbone_note(recipe, config))
    return config, notes + ([] if autoencoder else vocabulary)  # the autoencoder's vocabulary is the tokenizer's


def _if_there(load, recipe: Recipe, named: str | None, fields: list[str], notes: list[str]):
    """`load(recipe)`, or `None` and a note on the `fields` that come from somewhere else then.

    A recipe that names nothing and states the fields, as the published ones do, gets no note.
    """
    try:
        return load(recipe)
    except NotThere as error:
        config_class = CONFIGS[recipe.kind]
        missing = [field for field in fields if field not in recipe.model]
        values = {**config_class().to_dict(), **recipe.model}
        source = f"{config_class.__name__}'s default" if missing else "the recipe's"
        if named or missing:
            stated = ", ".join(f"{field} {values[field]:,}" for field in missing or fields)
            notes.append(f"{stated}: {source}, for {error.why}")
        return None


# the model


def make_model(recipe: Recipe, tokenizer):
    """A model to go on from, or a new one; a CALM around the trained autoencoder."""
    if recipe.kind == "calm":
        model = calm_to_go_on_from(recipe) if recipe.init_from else new_calm(recipe, tokenizer)
        if not model.head.is_fitted:  # to the autoencoder and to the multi-token loss, where there is one
            model.head.fit(model.autoencoder, multi_token_loss_before(recipe, model.config))
        return model
    config, model_class = config_of(recipe, tokenizer), MODELS[recipe.kind]
    return read_whole("init_from", recipe.init_from, model_class) if recipe.init_from else model_class(config)


def new_calm(recipe: Recipe, tokenizer) -> CALMForCausalLM:
    model = CALMForCausalLM(config_of(recipe, tokenizer, autoencoder_config_of(recipe)))
    autoencoder = read_whole("autoencoder", recipe.autoencoder, CALMAutoencoder)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    if begins_with_llama(recipe):
        new = begin_with_llama(model, backbone_of(recipe), PATCH_EMBEDDINGS[recipe.patch_embedding_init])
        more = f"; {new} more tokens begin with the mean embedding" if new else ""
        say(backbone_note(recipe, model.config) + more)
    model.generation_config = GenerationConfig(**generation_defaults(model.config))
    return model


def calm_to_go_on_from(recipe: Recipe) -> CALMForCausalLM:
    """The model of `init_from`, with a new head of another type where the recipe names one.

    Heads of two types have layers of one name, so nothing of the head before may stay. What a head's constructor fills
    is kept only where it is called outside `from_pretrained`.
    """
    config = config_of(recipe)
    if config.head_type == read_config("init_from", recipe.init_from, CALMConfig).head_type:
        return read_whole("init_from", recipe.init_from, CALMForCausalLM, config=config)
    load = partial(CALMForCausalLM.from_pretrained, config=config, ignore_mismatched_sizes=True)
    model: Any = read("init_from", recipe.init_from, load)
    model.head = HEADS[config.head_type](config)
    model.head.apply(model._init_weights)
    model.head.to(model.dtype)
    return model


def backbone_of(recipe: Recipe) -> LlamaForCausalLM:
    where = str(recipe.init_backbone)
    return load_llama("init_backbone", where, read_config("init_backbone", where, LlamaConfig))


def teacher_of(recipe: Recipe, tokenizer, config: CALMConfig) -> Teacher:
    where = str(recipe.distil)
    theirs = read_config("distil", where, LlamaConfig)
    if theirs.max_position_embeddings < recipe.data.block_size:
        raise InputError(
            f"distil {where}: reads {theirs.max_position_embeddings:,} tokens, block_size is "
            f"{recipe.data.block_size:,}."
        )
    check_tokens("distil", where, theirs, tokenizer)
    llama = load_llama("distil", where, theirs)
    return Teacher(llama, config.vocab_size, config.patch_size, recipe.distil_weight)


def begins_with_llama(recipe: Recipe) -> bool:
    """Unless the run goes on from a checkpoint of its own, which holds all weights."""
    return bool(recipe.init_backbone) and not last_checkpoint(Path(recipe.output_dir))


def with_lora(model: CALMForCausalLM, rank: int):
    """The model with a LoRA adapter on every linear layer of the backbone and the head; all else is frozen."""
    require_package("peft", "train", "lora_rank")
    from peft import LoraConfig, get_peft_model

    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in layers if not name.startswith("autoencoder.")]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", target_modules=targets)
    return get_peft_model(model, lora)


def for_training(model: CALMForCausalLM, recipe: Recipe, tokenizer):
    """What Trainer gets: the model, parts of it frozen or wrapped as the recipe says."""
    if recipe.auxiliary_targets and model.autoencoder.config.encoder_context:
        raise InputError(
            f"auxiliary_targets={recipe.auxiliary_targets}: the autoencoder's encoder sees the patches before "
            "(encoder_context), and drawn ones have none."
        )
    if recipe.lora_rank:
        return with_lora(model, recipe.lora_rank)
    if recipe.freeze_backbone:
        model.model.requires_grad_(False)
    if recipe.auxiliary_weight:
        teacher = teacher_of(recipe, tokenizer, model.config) if recipe.distil else None
        more = {"decay": recipe.auxiliary_decay, "num_targets": recipe.auxiliary_targets, "teacher": teacher}
        with_loss = WithAuxiliary(model, recipe.auxiliary_weight, recipe.head_weight, **more)
        if state := multi_token_loss_before(recipe, model.config):
            with_loss.auxiliary.load_state_dict(state)
        return with_loss
    return model


def multi_token_loss_before(recipe: Recipe, config: CALMConfig) -> dict[str, Tensor] | None:
    """Weights that the multi-token loss begins with: those of `init_from`, a checkpoint or the run that it is the last
    one of, or `init_backbone`'s output matrix and embeddings.
    """
    if begins_with_llama(recipe):
        loss = MultiTokenLoss(config.hidden_size, config.vocab_size, config.patch_size)
        begin_chain(loss, backbone_of(recipe))
        return loss.state_dict()
    if not recipe.init_from:
        return None
    before = Path(recipe.init_from)
    path = (last_checkpoint(before) or before) / AUXILIARY_FILE
    if not path.is_file():
        return None
    return {name.removeprefix("auxiliary."): value for name, value in safetensors.torch.load_file(path).items()}


if __name__ == "__main__":
    sys.exit(main())
