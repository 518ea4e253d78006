"""Loading for commands: a model whose weights are all there, and a tokenizer that knows every id the model writes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from calm_transformers.command_line import known_errors, need, sentence
from calm_transformers.model.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm_transformers.model.generation_calm_samplers import PatchSampling
from calm_transformers.model.generation_calm_upstream import non_finite_weight
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.progress import hide_upstream_bars

NAMED = 3  # tensors or ids that a sentence names
PADDED_SHARE = 1 / 20  # of a vocabulary may be ids without a token: sizes are rounded up for GPUs

logger = logging.get_logger(__name__)


def is_missing_folder(name: str | Path) -> bool:
    """Whether this is no folder, and no Hub id, which begins with no dot or slash and has one slash at most."""
    text = str(name)
    return (text.startswith((".", "~", "/")) or text.count("/") > 1) and not Path(name).exists()


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Turns whatever is raised while a model's files are read into one sentence that names the model.

    Args:
        name: folder or Hub id.

    Raises:
        ValueError: in place of each error.
    """
    path, text = Path(name), str(name)
    if is_missing_folder(name):
        raise ValueError(f"{name}: no such folder.")
    hide_upstream_bars()
    try:
        yield
    except Exception as error:  # json, safetensors, torch and the Hub's client have classes of their own
        if path.is_dir() and not any((path / f).is_file() for f in ("config.json", "adapter_config.json")):
            raise ValueError(f"{name}: the folder holds no config.json, so no model.") from error
        said = sentence(error)
        raise ValueError(said if text in said else f"{name}: {said}") from error


def device_of(name: str | None) -> torch.device:
    """The device of this name, by default a GPU where there is one.

    Raises:
        ValueError: it isn't there.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # AssertionError of a build without CUDA, RuntimeError, NotImplementedError
        raise ValueError(f"--device {name}: {sentence(error)}") from error
    return device


def load_whole(load, name: str | Path, **settings) -> Any:
    """`load(name, **settings)`, a `from_pretrained`, of a model whose files hold each of its weights.

    Raises:
        ValueError: there is none, or a weight is missing, has another shape or holds NaN or infinity, or a CALM's
            files hold more; the sentence names it.
    """
    with reading(name):
        model, info = load(name, output_loading_info=True, **settings)
    unexpected = info["unexpected_keys"] if isinstance(model, CALMForCausalLM) else ()  # it holds an autoencoder, too
    lacking = {
        "lack": info["missing_keys"],
        "have another shape for": [key for key, *_ in info["mismatched_keys"]],
        "hold what the model has no place for:": unexpected,
    }
    for verb, keys in lacking.items():
        if keys:
            raise ValueError(f"{name}: its weights {verb} {_some(sorted(keys))}. They are not this configuration's.")
    if (weight := non_finite_weight(model)) is not None:
        raise ValueError(f"{name}: its weight {weight} holds NaN or infinity.")
    return model


def check_tokenizer(model, tokenizer, name: str | Path = "The tokenizer") -> None:
    """Makes sure that what a model writes can be read.

    A few ids without a token at the end are a vocabulary that was rounded up. A trained model hardly writes them, but
    nothing says that it can't, so that they are warned of.

    Raises:
        ValueError: the tokenizer lacks ids among the others, or many: it is another model's.
    """
    vocab_size = model.config.get_text_config().vocab_size
    known = set(tokenizer.get_vocab().values())
    missing = [token for token in range(vocab_size) if token not in known]
    if not missing:
        return
    is_padding = missing[0] == vocab_size - len(missing) and len(missing) <= PADDED_SHARE * vocab_size
    sentence = f"{name}: has no token for {len(missing)} of the {vocab_size} ids of the model, as {_some(missing)}"
    if not is_padding:
        raise ValueError(f"{sentence}. It is another model's tokenizer.")
    logger.warning(f"{sentence}: if the model writes one, nothing is read; suppress_tokens keeps them out.")


def _some(names) -> str:
    rest = len(names) - NAMED
    return ", ".join(map(str, names[:NAMED])) + (f" and {rest} more" if rest > 0 else "")


def is_calm(model) -> TypeGuard[CALMForCausalLM]:
    return model.config.model_type == CALMConfig.model_type


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a folder or Hub id, of one of our models or another; of an adapter, its base's.

    Raises:
        ValueError: there is none, or it is an adapter and PEFT is not installed or no base named, or a configuration
            without model_type.
    """
    with reading(name):
        return _read_config(name)


def _read_config(name: str) -> PretrainedConfig:
    fields, _ = PretrainedConfig.get_config_dict(name)
    if not fields and (adapter := find_adapter_config_file(name)):
        name = _base_of(name, Path(adapter))
        fields, _ = PretrainedConfig.get_config_dict(name)
    try:
        return AutoConfig.from_pretrained(name)
    except ValueError as error:
        if "model_type" in fields or not str(error).startswith("Unrecognized model"):
            raise
        raise ValueError(f"{name}: its config.json names no model_type.") from error  # upstream names every one it has


def _base_of(name: str, adapter: Path) -> str:
    """The model that an adapter is of, as its adapter_config.json names it."""
    need("peft", "train", f"the adapter {name}")
    base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{name}: is an adapter whose adapter_config.json names no base_model_name_or_path.")
    return base


def load_causal_lm(name: str, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None):
    """The model of a folder or Hub id, CALM or not, in eval mode; of a PEFT adapter, its base with the adapter on it.

    Args:
        name: folder or Hub id.
        dtype: of the weights; "auto" is as they were saved.
        device: by default a GPU where there is one.

    Raises:
        ValueError: it is no language model, or as `device_of`, `load_config` and `load_whole`.
    """
    device = device_of(None if device is None else str(device))
    config = load_config(name)
    if isinstance(config, CALMAutoencoderConfig):
        raise ValueError(f"{name}: is an autoencoder, not a language model")
    model = load_whole(AutoModelForCausalLM.from_pretrained, name, dtype=dtype)
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]  # upstream's wrapper of `to` loses `self`


def load_with_tokenizer(name: str, tokenizer: str | None = None, dtype: torch.dtype | str = "auto", device=None):
    """The model as `load_causal_lm`, and its tokenizer or the one that is named.

    Raises:
        ValueError: as there, or the tokenizer is another model's.
    """
    model, found = load_causal_lm(name, dtype, device), load_tokenizer(tokenizer or name)
    check_tokenizer(model, found, tokenizer or name)
    return model, found


def load_calm(name: str, device: str | None, dtype: Any = "auto"):
    """A CALM and its tokenizer.

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


def load_tokenizer(where: str | Path):
    """The tokenizer of a folder or Hub id, a CALM's too, without running code that lies there and without a question.

    Raises:
        OSError: there is no tokenizer.
        ValueError: the tokenizer itself is code of the repository.
    """
    if is_missing_folder(where):
        raise OSError(f"{where}: no such folder.")
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # a file can be wrong in as many ways as there are classes of errors
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise
        files = [path for name in ("tokenizer.json", "tokenizer_config.json") if (path := Path(where, name)).is_file()]
        if not files:
            raise OSError(f"{where}: no tokenizer can be read there.") from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(f"{' or '.join(map(str, files))}: no tokenizer can be read there ({reason}).") from error


def check_length(model, num_prompt: int, max_new_tokens: int) -> None:
    """Raise ValueError where prompt and text are longer than the model's positions."""
    longest = model.config.max_position_embeddings * model.config.patch_size
    if num_prompt + max_new_tokens > longest:
        raise ValueError(
            f"the prompt has {num_prompt} tokens and {max_new_tokens} are to be written, but the model takes "
            f"{longest} together: shorten the prompt or lower max_new_tokens."
        )


def generation_defaults(config: CALMConfig) -> dict:
    """Contents of generation_config.json: sampled as published, at T = 0.5 over N = 200 candidates, but by the default
    method, which draws fewer where patches repeat."""
    names = ("do_sample", "temperature", "num_candidates", "sampling_method")
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        **{name: getattr(PatchSampling(temperature=0.5), name) for name in names},
    }
