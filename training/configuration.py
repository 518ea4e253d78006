"""A recipe with the tokenizer and the autoencoder that it names → the configuration of the model, run or dry run."""

import os
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig
from transformers.activations import ACT2FN

from calm.command_line import InputError
from calm.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm.training.recipe import BACKBONE_FIELDS, CONFIGS, PATCH_EMBEDDINGS, Recipe
from calm.training.tokenizer import filler_token_id, first_difference, load_tokenizer


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
    return read("tokenizer", where, "train_tokenizer", load_tokenizer)


def autoencoder_config_of(recipe: Recipe) -> CALMAutoencoderConfig:
    """The configuration of the trained autoencoder that the recipe names.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    where = recipe.autoencoder
    fields, _ = read("autoencoder", where, "train_autoencoder", PretrainedConfig.get_config_dict)
    if fields.get("model_type") not in (CALMConfig.model_type, CALMAutoencoderConfig.model_type):
        raise InputError(
            f"autoencoder {where}: holds none, its config.json has model_type {fields.get('model_type')!r}."
        )
    return read("autoencoder", where, "train_autoencoder", CALMAutoencoderConfig.from_pretrained)


def config_before(recipe: Recipe):
    """The configuration of the model that the recipe goes on from.

    Raises:
        InputError: there is none, it cannot be read, or it is of another kind than the recipe.
    """
    config_class = CONFIGS[recipe.kind]
    return config_class.from_dict(_fields("init_from", recipe.init_from, f"train_{recipe.kind}", config_class))


def llama_config_of(what: str, where: str | None) -> LlamaConfig:
    """The configuration of a Llama that the recipe names.

    Args:
        what: the recipe's field.
        where: folder or Hub id.

    Raises:
        InputError: there is none, it cannot be read, or it is of another family.
    """
    fields = _fields(what, where, "train_ar", LlamaConfig)
    # transformers 5 writes only rope_parameters, which 4.57 doesn't read: it would fall back to the defaults.
    rope = fields.get("rope_parameters") or {}
    if "rope_theta" in rope:
        fields.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        fields.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    return LlamaConfig.from_dict(fields)


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


def say(line: str) -> None:
    """Prints it once, however many processes train."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


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
    # A repetition radius is measured on the weights, which change now.
    return make_config(CALMConfig, before.to_dict() | {"repetition_radius": None} | recipe.model)


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
