"""A recipe with the tokenizer and the autoencoder that it names → the configuration of the model, run or dry run."""

from pathlib import Path

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from calm.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm.training.recipe import CONFIGS, Recipe, RecipeError
from calm.training.tokenizer import filler_token_id, load_tokenizer


class NotThere(RecipeError):
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
        RecipeError: there is none, or it cannot be read.
    """
    where = recipe.tokenizer or recipe.init_from or recipe.autoencoder
    return read("tokenizer", where, "train_tokenizer", load_tokenizer)


def autoencoder_config_of(recipe: Recipe) -> CALMAutoencoderConfig:
    """The configuration of the trained autoencoder that the recipe names.

    Raises:
        RecipeError: there is none, or it cannot be read.
    """
    return read("autoencoder", recipe.autoencoder, "train_autoencoder", CALMAutoencoderConfig.from_pretrained)


def config_before(recipe: Recipe):
    """The configuration of the model that the recipe goes on from.

    Raises:
        RecipeError: there is none, it cannot be read, or it is of another kind than the recipe.
    """
    config_class = CONFIGS[recipe.kind]
    where, maker = recipe.init_from, f"train_{recipe.kind}"
    fields, _ = read("init_from", where, maker, PretrainedConfig.get_config_dict)
    if fields.get("model_type") != config_class.model_type:
        found = fields.get("model_type")
        raise RecipeError(f"init_from {where}: is a model of type {found!r}, not {config_class.model_type!r}.")
    return config_class.from_dict(fields)


def read(what: str, where: str | None, maker: str, reader):
    """`reader(where)`: a tokenizer or a configuration.

    Raises:
        NotThere: it is not named, no such folder, or not to be had from the Hub.
        RecipeError: the folder is there, and is none.
    """
    where = folder_or_hub_id(what, where, maker)
    try:
        return reader(where)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).partition("\n\n")[0].split())
        if Path(where).exists():
            raise RecipeError(f"{what} {where}: cannot be read: {reason}") from error
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
        RecipeError: no model to go on from, an autoencoder with another vocabulary than the tokenizer, or a value that
            makes no sense.
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
        RecipeError: a value that makes no sense.
    """
    # A repetition radius is measured on the weights, which change now.
    return make_config(CALMConfig, before.to_dict() | {"repetition_radius": None} | recipe.model)


def _calm_values(recipe: Recipe, tokenizer, autoencoder: CALMAutoencoderConfig | None) -> dict:
    if autoencoder and tokenizer and autoencoder.vocab_size != len(tokenizer):
        raise RecipeError(
            f"the autoencoder {recipe.autoencoder} knows {autoencoder.vocab_size} tokens, the tokenizer "
            f"{len(tokenizer)}: both must be the ones it was trained with."
        )
    values = dict(recipe.model)
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


def tokenizer_fields(tokenizer) -> dict:
    """What a configuration takes from the tokenizer; nothing where a dry run has none."""
    if tokenizer is None:
        return {}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**special, "vocab_size": len(tokenizer)}


def make_config(config_class, values: dict):
    """The configuration.

    Raises:
        RecipeError: a value that it, or the model made of it, would refuse.
    """
    try:
        config = config_class(**values)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    if config.hidden_act not in ACT2FN:
        raise RecipeError(f"hidden_act={config.hidden_act!r}: must be one of {', '.join(sorted(ACT2FN))}.")
    return config


# the dry run


def config_and_notes(recipe: Recipe) -> tuple[PretrainedConfig, list[str]]:
    """The configuration that a run would make of what is there already, and lines on what isn't.

    Raises:
        RecipeError: as `config_of`, and for what is there and cannot be read.
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
    # The autoencoder's vocabulary is the tokenizer's.
    return config_of(recipe, tokenizer, autoencoder), notes + ([] if autoencoder else vocabulary)


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
