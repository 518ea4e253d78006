"""Loads models and tokenizers for commands, and checks that weights are complete and the tokenizer is the model's."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, logging
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from calm_transformers.command_line import format_error, known_errors, require_package
from calm_transformers.model.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm_transformers.model.generation_calm_samplers import PatchSampling
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import non_finite_weight
from calm_transformers.progress import hide_upstream_bars

MAX_NAMES_SHOWN = 3  # tensors or ids in a message
MAX_PADDING_FRACTION = 1 / 20  # of the vocabulary: its size may be rounded up for GPUs

logger = logging.get_logger(__name__)


def is_missing_folder(name: str | Path) -> bool:
    """Whether `name` is neither a folder nor a possible Hub id (at most one slash, no dot or slash at the start)."""
    text = str(name)
    return (text.startswith((".", "~", "/")) or text.count("/") > 1) and not Path(name).exists()


@contextmanager
def format_load_errors(name: str | Path) -> Iterator[None]:
    """Converts any error raised while a model's files are read to a one-line ValueError that names the model.

    Args:
        name: folder or Hub id.
    """
    path, text = Path(name), str(name)
    if is_missing_folder(name):
        raise ValueError(f"{name}: no such folder.")
    hide_upstream_bars()
    try:
        yield
    except Exception as error:  # json, safetensors, torch and the Hub's client each have their own classes
        if path.is_dir() and not any((path / f).is_file() for f in ("config.json", "adapter_config.json")):
            raise ValueError(f"{name}: the folder holds no config.json, so no model.") from error
        message = format_error(error)
        message = message if text in message else f"{name}: {message}"
        if not path.exists() and type(error).__module__.startswith("safetensors"):  # of a downloaded file
            message += f" (`hf cache rm model/{name}`, and it is downloaded again)"
        raise ValueError(message) from error


def resolve_device(name: str | None) -> torch.device:
    """Returns the named device, by default a GPU or else the CPU; raises ValueError if it is not available."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # AssertionError of a build without CUDA, RuntimeError, NotImplementedError
        raise ValueError(f"device {name}: {format_error(error)}") from error
    return device


def load_checked(load: Callable[..., Any], name: str | Path, **settings) -> Any:
    """Loads a model with `load`, a `from_pretrained` method, and checks that its files hold exactly its weights.

    Raises:
        ValueError: no model can be loaded; a weight is missing, has another shape or holds NaN or infinity; or the
            files of a CALM hold unexpected weights. The message names them.
    """
    with format_load_errors(name), without_reports():
        check_shards(Path(name))
        model, info = load(name, output_loading_info=True, ignore_mismatched_sizes=True, **settings)
        check_generation_config(name)
    # An autoencoder may be loaded from a CALM, whose other weights are then unexpected.
    unexpected = info["unexpected_keys"] if isinstance(model, CALMForCausalLM) else ()
    mismatches = {
        "lack": info["missing_keys"],
        "have another shape for": [key for key, *_ in info["mismatched_keys"]],
        "include unexpected": unexpected,
    }
    for verb, keys in mismatches.items():
        if keys:
            raise ValueError(
                f"{name}: its weights {verb} {_first_few(sorted(keys))}. They are not this configuration's."
            )
    if (weight := non_finite_weight(model)) is not None:
        raise ValueError(f"{name}: its weight {weight} holds NaN or infinity.")
    return model


@contextmanager
def without_reports() -> Iterator[None]:
    """Hides upstream's reports of wrong weights, of many lines: `load_checked` raises an error of one."""
    logger = logging.get_logger(PreTrainedModel.__module__)
    logger.disabled = True  # by a higher level upstream would report more
    try:
        yield
    finally:
        logger.disabled = False


def check_shards(folder: Path) -> None:
    """Raises ValueError if an index of weights names what isn't in its folder: upstream would open any path."""
    for index in folder.glob("*.index.json"):
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
        if outside := [shard for shard in shards if not isinstance(shard, str) or shard != Path(shard).name]:
            raise ValueError(f"{index.name} names {outside[0]!r}, which is not in the same folder.")


def check_generation_config(name: str | Path) -> None:
    """Raises ValueError if generation_config.json is damaged, where upstream would take other settings silently."""
    path = Path(name, GENERATION_CONFIG_NAME)
    if not os.path.lexists(path):
        path = cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    try:
        fields = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{GENERATION_CONFIG_NAME}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{GENERATION_CONFIG_NAME} holds no JSON object.")


def check_tokenizer(model, tokenizer, name: str | Path = "The tokenizer") -> None:
    """Checks that the tokenizer has a token for every id that the model can generate.

    A few missing ids at the end are taken for padding of the vocabulary, which a trained model rarely generates: they
    are only warned of.

    Raises:
        ValueError: the tokenizer lacks other ids, or too many.
    """
    vocab_size = model.config.get_text_config().vocab_size
    known_ids = set(tokenizer.get_vocab().values())
    missing = [token for token in range(vocab_size) if token not in known_ids]
    if not missing:
        return
    is_padding = missing[0] == vocab_size - len(missing) and len(missing) <= MAX_PADDING_FRACTION * vocab_size
    message = f"{name}: has no token for {len(missing)} of the {vocab_size} ids of the model, as {_first_few(missing)}"
    if not is_padding:
        raise ValueError(f"{message}. It is another model's tokenizer.")
    logger.warning(f"{message}: if the model generates one, it decodes to nothing; suppress_tokens prevents that.")


def _first_few(names: Sequence) -> str:
    """Returns the first names and the number of the others, as in "a, b, c and 5 more"."""
    num_others = len(names) - MAX_NAMES_SHOWN
    return ", ".join(map(str, names[:MAX_NAMES_SHOWN])) + (f" and {num_others} more" if num_others > 0 else "")


def is_calm(model) -> TypeGuard[CALMForCausalLM]:
    return model.config.model_type == CALMConfig.model_type


def load_config(name: str) -> PretrainedConfig:
    """Loads the configuration of a folder or Hub id; for a PEFT adapter, that of its base model.

    Raises:
        ValueError: there is no configuration or it has no model_type, or an adapter names no base model.
    """
    with format_load_errors(name):
        fields, _ = PretrainedConfig.get_config_dict(name)
        if not fields and (adapter := find_adapter_config_file(name)):
            name = _base_model_name(name, Path(adapter))
            fields, _ = PretrainedConfig.get_config_dict(name)
        try:
            return AutoConfig.from_pretrained(name)
        except ValueError as error:
            if "model_type" in fields or not str(error).startswith("Unrecognized model"):
                raise
            raise ValueError(f"{name}: its config.json names no model_type.") from error  # upstream's lists all types


def _base_model_name(name: str, adapter_config: Path) -> str:
    """Returns the name of an adapter's base model; raises if it names none, or if PEFT, which loads it, is missing."""
    require_package("peft", "train", f"the adapter {name}")
    base = json.loads(adapter_config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{name}: is an adapter whose adapter_config.json names no base_model_name_or_path.")
    return base


def load_causal_lm(name: str, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None):
    """Loads any causal LM, or the base model of a PEFT adapter with the adapter, in eval mode.

    Args:
        name: folder or Hub id.
        dtype: of the weights; "auto" keeps the saved one.
        device: by default a GPU if available.

    Raises:
        ValueError: it is not a language model; also the errors of `resolve_device`, `load_config`, `load_checked`.
    """
    device = resolve_device(None if device is None else str(device))
    config = load_config(name)
    if isinstance(config, CALMAutoencoderConfig):
        raise ValueError(f"{name}: is an autoencoder, not a language model")
    model = load_checked(AutoModelForCausalLM.from_pretrained, name, dtype=dtype)
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]  # upstream's wrapper of `to` loses `self`


def load_with_tokenizer(name: str, tokenizer: str | None = None, dtype: torch.dtype | str = "auto", device=None):
    """Loads a model with `load_causal_lm`, and its tokenizer or the named one; returns (model, tokenizer).

    Raises:
        ValueError: an error of `load_causal_lm`, or the tokenizer is another model's.
    """
    model, loaded_tokenizer = load_causal_lm(name, dtype, device), load_tokenizer(tokenizer or name)
    check_tokenizer(model, loaded_tokenizer, tokenizer or name)
    return model, loaded_tokenizer


def load_calm(name: str, device: str | None, dtype: Any = "auto"):
    """Loads a CALM and its tokenizer, without upstream's bars and warnings; returns (model, tokenizer).

    Raises:
        InputError: there is no CALM, no tokenizer or no such device.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with known_errors():
        model, tokenizer = load_with_tokenizer(name, dtype=dtype, device=device)
        if not is_calm(model):
            raise ValueError(f"{name} is no CALM: its model_type is {model.config.model_type!r}.")
    return model, tokenizer


def load_tokenizer(name: str | Path):
    """Loads the tokenizer of a folder or Hub id, without running the repository's code or asking for permission.

    Raises:
        OSError: there is no tokenizer, or it can't be read.
        ValueError: the tokenizer needs the repository's code.
    """
    if is_missing_folder(name):
        raise OSError(f"{name}: no such folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("text")  # some damage shows only here
        return tokenizer
    except (OSError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a damaged file raises many types, and panics of the library are no Exceptions
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise
        paths = [Path(name, file) for file in ("tokenizer.json", "tokenizer_config.json")]
        files = [str(path) for path in paths if path.is_file()]
        if not files:
            raise OSError(f"{name}: no tokenizer can be read there.") from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(f"{' or '.join(files)}: no tokenizer can be read there ({reason}).") from error


def check_length(model, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises ValueError if prompt and continuation need more positions than the model has."""
    max_length = model.config.max_position_embeddings * model.config.patch_size
    if num_prompt_tokens + max_new_tokens > max_length:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens and {max_new_tokens} are to be written, but the model takes "
            f"{max_length} together: shorten the prompt or lower max_new_tokens."
        )


def generation_defaults(config: CALMConfig) -> dict:
    """Returns the contents of generation_config.json: the published T = 0.5 and N = 200, with the default method."""
    names = ("do_sample", "temperature", "num_candidates", "sampling_method")
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        **{name: getattr(PatchSampling(temperature=0.5), name) for name in names},
    }
