"""Trains a tokenizer, the autoencoder, a CALM or, for comparison, an ordinary Llama, by a recipe.

    python -m calm.training.train calm --recipe demo

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

from calm.bundle_files import generation_defaults
from calm.command_line import InputError, Parser, command, known_errors, need
from calm.configuration_calm import HEADS, CALMAutoencoderConfig, CALMConfig
from calm.loading import load_whole
from calm.modeling_calm import CALMForCausalLM
from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.training.auxiliary import AUXILIARY_FILE, MultiTokenLoss, WithAuxiliary
from calm.training.backbone import begin_chain, begin_with_llama, load_llama
from calm.training.cost import print_cost
from calm.training.distil import Teacher
from calm.training.documents import documents
from calm.training.recipe import (
    BACKBONE_FIELDS,
    CONFIGS,
    KINDS,
    PATCH_EMBEDDINGS,
    Recipe,
    load_recipe,
    parse_command_line,
    recipe_names,
)
from calm.training.tokenizer import filler_token_id, first_difference, load_tokenizer, save_tokenizer, train_bpe
from calm.training.trainer import begin, fit, last_checkpoint, say

MODELS = {"autoencoder": CALMAutoencoder, "calm": CALMForCausalLM, "ar": LlamaForCausalLM}
VOCAB_SIZE = 4096  # of a tokenizer whose recipe states none


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm.training.train", __doc__)
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
    """Trains a tokenizer, from the start whatever `resume` says; prepares any other training.

    Returns:
        the training, as `fit`.

    Raises:
        InputError: as `tokenizer_of`, `begin`, `make_model`, `for_training` and `fit`.
    """
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
    print_cost(recipe, config, notes, llama_config_of("distil", recipe.distil) if recipe.distil else None)


class NotThere(InputError):
    """What a recipe needs is not named or, so far, not there; a dry run can do without.

    Args:
        why: half a sentence.
    """

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why


# what a recipe names


def tokenizer_of(recipe: Recipe):
    """The tokenizer that the recipe names, or the one beside the model that it goes on from.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    where = recipe.tokenizer or recipe.init_from or recipe.autoencoder
    return read("tokenizer", where, "train tokenizer", load_tokenizer)


def autoencoder_config_of(recipe: Recipe) -> CALMAutoencoderConfig:
    """The configuration of the trained autoencoder that the recipe names.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    where = recipe.autoencoder
    fields, _ = read("autoencoder", where, "train autoencoder", PretrainedConfig.get_config_dict)
    if fields.get("model_type") not in (CALMConfig.model_type, CALMAutoencoderConfig.model_type):
        raise InputError(
            f"autoencoder {where}: holds none, its config.json has model_type {fields.get('model_type')!r}."
        )
    return read("autoencoder", where, "train autoencoder", CALMAutoencoderConfig.from_pretrained)


def config_before(recipe: Recipe):
    """The configuration of the model that the recipe goes on from.

    Raises:
        InputError: there is none, it cannot be read, or it is of another kind than the recipe.
    """
    config_class = CONFIGS[recipe.kind]
    return config_class.from_dict(_fields("init_from", recipe.init_from, f"train {recipe.kind}", config_class))


def llama_config_of(what: str, where: str | None) -> LlamaConfig:
    """The configuration of a Llama that the recipe names.

    Args:
        what: the recipe's field.
        where: folder or Hub id.

    Raises:
        InputError: there is none, it cannot be read, or it is of another family.
    """
    return LlamaConfig.from_dict(_fields(what, where, "train ar", LlamaConfig))


def _fields(what: str, where: str | None, maker: str, config_class) -> dict:
    fields, _ = read(what, where, maker, PretrainedConfig.get_config_dict)
    if fields.get("model_type") != config_class.model_type:
        found = fields.get("model_type")
        raise InputError(f"{what} {where}: is a model of type {found!r}, not {config_class.model_type!r}.")
    return fields


def check_tokens(what: str, where: str, llama: LlamaConfig, tokenizer) -> None:
    """Compares the tokenizer beside a Llama with ours, which may have more special tokens at its end.

    Where there is none to be read, it says so and compares the numbers of tokens.

    Args:
        what: the recipe's field that names the Llama.
        where: folder or Hub id.
        llama: its configuration.
        tokenizer: the autoencoder's.

    Raises:
        InputError: a token differs, or the Llama has more of them.
    """
    try:
        theirs = load_tokenizer(where)
    except (OSError, ValueError):
        if llama.vocab_size > len(tokenizer):
            raise InputError(
                f"{what} {where}: knows {llama.vocab_size:,} tokens, the autoencoder {len(tokenizer):,}."
            ) from None
        say(
            f"{what} {where}: no tokenizer can be read there, so only the numbers of tokens were compared, "
            f"{llama.vocab_size:,} and the autoencoder's {len(tokenizer):,}"
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


def read(what: str, where: str | None, maker: str, reader):
    """`reader(where)`: a tokenizer or a configuration.

    Raises:
        NotThere: it is not named, no such folder, or not to be had from the Hub.
        InputError: the folder is there, and is none.
    """
    where = folder_or_hub_id(what, where, maker)
    try:
        return reader(where)
    except Exception as error:  # each library has its own
        reason = " ".join(str(error).partition("\n\n")[0].split())
        if Path(where).exists():
            raise InputError(f"{what} {where}: cannot be read: {reason}") from error
        message = f"{what} {where}: no such folder, nor to be had from the Hub: {reason}"
        raise NotThere(message, f"the {what} {where} cannot be had") from error


def folder_or_hub_id(what: str, where: str | None, maker: str) -> str:
    """`where`, unless it is missing or clearly a folder that isn't there.

    Raises:
        NotThere: that is so.
    """
    if where is None:
        message = f"no {what}: give --{what} a folder or a Hub id ({maker} makes one)."
        raise NotThere(message, f"no {what} is named")
    if not Path(where).exists() and (where.startswith(("runs/", ".", "/")) or where.count("/") > 1):
        message = f"{what} {where}: no such folder ({maker} makes one)."
        raise NotThere(message, f"the {what} {where} is not there yet")
    return where


# the configuration


def config_of(recipe: Recipe, tokenizer=None, autoencoder: CALMAutoencoderConfig | None = None):
    """The configuration that the recipe states around the tokenizer and, of a CALM, the autoencoder; or, with
    `init_from`, that of the model before, which a CALM's recipe changes.

    Args:
        recipe: states the rest.
        tokenizer: `None` only in a dry run, where it is not there yet, and with `init_from`, which has one.
        autoencoder: its configuration; `None` as for the tokenizer, and for what is no CALM.

    Raises:
        InputError: no model to go on from or to take the backbone of, an autoencoder with another vocabulary than the
            tokenizer, or a value that makes no sense.
    """
    config_class = CONFIGS[recipe.kind]
    if recipe.init_from:
        before = config_before(recipe)
        return changed_config(recipe, before) if recipe.kind == "calm" else before
    if recipe.kind == "calm":
        return make_config(CALMConfig, _calm_values(recipe, tokenizer, autoencoder))
    stated = {"max_position_embeddings": recipe.data.block_size} if recipe.kind == "ar" else {}
    return make_config(config_class, {**stated, **recipe.model, **tokenizer_fields(tokenizer)})


def changed_config(recipe: Recipe, before: CALMConfig) -> CALMConfig:
    """The configuration of the CALM before, as the recipe changes it.

    Raises:
        InputError: a value that makes no sense.
    """
    return make_config(CALMConfig, before.to_dict() | recipe.model)


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
    llama = llama_config_of("init_backbone", recipe.init_backbone)
    given = llama.to_dict()
    values = {name: given[name] for name in BACKBONE_FIELDS if name in given}
    whole = make_config(CALMConfig, values).to_dict()
    for name in BACKBONE_FIELDS:
        if name in recipe.model and recipe.model[name] != whole.get(name):
            raise InputError(
                f"{name}={recipe.model[name]!r}: init_backbone {recipe.init_backbone} has {whole.get(name)!r}, which "
                "cannot be changed."
            )
    if recipe.patch_embedding_init not in PATCH_EMBEDDINGS:
        allowed = ", ".join(PATCH_EMBEDDINGS)
        raise InputError(f"patch_embedding_init={recipe.patch_embedding_init!r}: must be one of {allowed}.")
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
    """The configuration.

    Raises:
        InputError: a value that it, or the model made of it, would refuse.
    """
    try:
        config = config_class(**values)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    if config.hidden_act not in ACT2FN:
        raise InputError(f"hidden_act={config.hidden_act!r}: must be one of {', '.join(sorted(ACT2FN))}.")
    return config


# the dry run


def config_and_notes(recipe: Recipe) -> tuple[PretrainedConfig, list[str]]:
    """The configuration that a run would make of what is there already, and lines on what isn't.

    Raises:
        InputError: as `config_of`, and for what is there and cannot be read.
    """
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
    """A model to go on from, or a new one.

    Raises:
        InputError: as `config_of` and `build`, or no model to go on from.
    """
    if recipe.kind == "calm":
        return build(recipe, tokenizer)
    config, model_class = config_of(recipe, tokenizer), MODELS[recipe.kind]
    if recipe.init_from:
        load = partial(load_whole, model_class.from_pretrained)
        return read("init_from", recipe.init_from, f"train {recipe.kind}", load)
    return model_class(config)


def build(recipe: Recipe, tokenizer) -> CALMForCausalLM:
    """A model to go on from, or a new one around the trained autoencoder, with the backbone of a Llama or without.

    Raises:
        InputError: as `config_of` and `load_llama`, or no autoencoder.
    """
    if recipe.init_from:
        before = config_before(recipe)
        config = changed_config(recipe, before)
        same_head = partial(load_whole, CALMForCausalLM.from_pretrained, config=config)
        new_head = partial(with_new_head, config=config)
        load = same_head if config.head_type == before.head_type else new_head
        model = read("init_from", recipe.init_from, "train calm", load)
        fit_head(model, recipe)
        return model
    model = CALMForCausalLM(config_of(recipe, tokenizer, autoencoder_config_of(recipe)))
    load = partial(load_whole, CALMAutoencoder.from_pretrained)
    model.autoencoder.load_state_dict(read("autoencoder", recipe.autoencoder, "train autoencoder", load).state_dict())
    if begins_with_llama(recipe):
        new = begin_with_llama(model, backbone_of(recipe), PATCH_EMBEDDINGS[recipe.patch_embedding_init])
        more = f"; {new} more tokens begin with the mean embedding" if new else ""
        say(backbone_note(recipe, model.config) + more)
    model.generation_config = GenerationConfig(**generation_defaults(model.config))
    fit_head(model, recipe)
    return model


def backbone_of(recipe: Recipe) -> LlamaForCausalLM:
    where = str(recipe.init_backbone)
    return load_llama("init_backbone", where, llama_config_of("init_backbone", where))


def teacher_of(recipe: Recipe, tokenizer, config: CALMConfig) -> Teacher:
    """The teacher that the recipe names.

    Raises:
        InputError: it is no Llama, cannot be read, has other tokens, or reads no blocks of the recipe's size.
    """
    where = str(recipe.distil)
    theirs = llama_config_of("distil", where)
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


def with_new_head(name: str, config: CALMConfig) -> CALMForCausalLM:
    """The model of a folder or Hub id with a new head of another type in place of its own.

    Heads of two types have layers of one name, so nothing of the head before may stay. What a head's constructor fills
    is kept only where it is called outside `from_pretrained`.
    """
    model: Any = CALMForCausalLM.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
    model.head = HEADS[config.head_type](config)
    model.head.apply(model._init_weights)
    model.head.to(model.dtype)
    return model


def fit_head(model: CALMForCausalLM, recipe: Recipe) -> None:
    """Fits a head that needs it: to the autoencoder and to the multi-token loss, where there is one."""
    if not model.head.is_fitted:
        model.head.fit(model.autoencoder, multi_token_loss_before(recipe, model.config))


def with_lora(model: CALMForCausalLM, rank: int):
    """The model with a LoRA adapter on every linear layer of the backbone and the head; all else is frozen."""
    need("peft", "train", "lora_rank")
    from peft import LoraConfig, get_peft_model

    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in layers if not name.startswith("autoencoder.")]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", target_modules=targets)
    return get_peft_model(model, lora)


def for_training(model: CALMForCausalLM, recipe: Recipe, tokenizer):
    """What Trainer gets: the model, parts of it frozen or wrapped as the recipe says.

    Raises:
        InputError: drawn targets that the autoencoder has no use for, or as `teacher_of`.
    """
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
        with_loss = WithAuxiliary(
            model,
            recipe.auxiliary_weight,
            recipe.head_weight,
            decay=recipe.auxiliary_decay,
            num_targets=recipe.auxiliary_targets,
            teacher=teacher,
        )
        if state := multi_token_loss_before(recipe, model.config):
            with_loss.auxiliary.load_state_dict(state)
        return with_loss
    return model


def multi_token_loss_before(recipe: Recipe, config: CALMConfig) -> dict[str, Tensor] | None:
    """Weights that the multi-token loss begins with: those of `init_from`, a checkpoint or the run that it is the last
    one of, or `init_backbone`'s output matrix and embeddings.

    Raises:
        InputError: as `load_llama`.
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
