"""Loading for commands: a model whose weights are all there, and a tokenizer that knows every id the model writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from calm_transformers.command_line import sentence
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
