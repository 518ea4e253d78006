"""Writes the files of a converted model repository other than the weights: config, code, tokenizer, model card."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from tokenizers import Tokenizer
from transformers.dynamic_module_utils import get_relative_import_files

from calm_transformers.command_line import InputError, first_line
from calm_transformers.conversion.checkpoint_files import Repository, read_json
from calm_transformers.loading import generation_defaults
from calm_transformers.model.configuration_calm import TRANSFORMERS, CALMConfig, code_version
from calm_transformers.model.modeling_calm import CALMForCausalLM

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE]
MODEL_CARD = """---
{{ card_data }}
---

# {{ name }}

A CALM, a continuous autoregressive language model ([arXiv 2510.27688](https://arxiv.org/abs/2510.27688)): instead of
one token it predicts one vector that represents a patch of {{ config.patch_size }} tokens, which an autoencoder
decodes.

```python
import torch
from transformers import pipeline

pipe = pipeline(
    "text-generation", model="{{ name }}", dtype=torch.bfloat16, device_map="auto", trust_remote_code=True
)
print(pipe("{{ prompt }}", max_new_tokens=20, do_sample=True)[0]["generated_text"])
```

Needs `pip install "{{ transformers }}" torch accelerate`. The code is CALM for Transformers {{ code_version }}.

{{ about }}

## What does not work

- vLLM, SGLang, TGI, and what reads GGUF (llama.cpp, Ollama and others), which "Use this model" may offer: they don't
  know this architecture. `calm serve`, of the package calm-transformers, serves it with OpenAI's API.
- Beam search, assisted decoding, and passing a cache from one `generate` call to the next.
- New tokens: the vocabulary is the autoencoder's.
"""
CONVERTED = """## Sources

CALM for Transformers combined the weights of two repositories in one {dtype} file: the language model
{links[0]}, with a head of type "{head_type}", and the autoencoder {links[1]}.

**Licence.** The weights, and the tokenizer, keep the licences of their source repositories. The code is under the
MIT licence."""


def tokenizer_files(folder: Path, config: CALMConfig) -> dict[str, str]:
    """Returns the tokenizer's files (name → content): tokenizer.json with the configuration's pad token,
    tokenizer_config.json, and the chat template if there is one.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist: name a repository that has one with --tokenizer.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} is not a tokenizer: {first_line(error)}") from None
    assert config.pad_token_id is not None, "a conversion requires one"
    if 0 <= config.pad_token_id < config.vocab_size and tokenizer.id_to_token(config.pad_token_id) is None:
        tokenizer.add_special_tokens(["[PAD]"])
    num_tokens = tokenizer.get_vocab_size()
    if num_tokens > config.vocab_size:
        raise InputError(f"{path} has {num_tokens} tokens, more than the model's vocab_size {config.vocab_size}.")
    special_tokens = {}
    for field in ("bos_token", "eos_token", "pad_token"):
        ids = getattr(config, f"{field}_id")
        token_id: Any = ids[0] if isinstance(ids, list) and ids else ids
        is_id = isinstance(token_id, int) and 0 <= token_id < config.vocab_size
        special_tokens[field] = tokenizer.id_to_token(token_id) if is_id else None
        if special_tokens[field] is None:
            raise InputError(f"{path} has no token for {field}_id {ids}.")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # supported by every version of transformers
        **special_tokens,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(tokenizer_config, indent=2)}
    template = read_chat_template(folder)
    return files if template is None else {**files, CHAT_TEMPLATE: template}


def read_chat_template(folder: Path) -> str | None:
    """Reads a tokenizer's chat template from its own file or, in older repositories, from tokenizer_config.json."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # named templates
        template = {each.get("name"): each.get("template") for each in template}.get("default")
    return template if isinstance(template, str) else None


def model_card(name: str, config: CALMConfig, prompt: str, about: str, **metadata) -> str:
    """Returns the README: the section `about` amid what is true of every CALM, under `metadata` of `ModelCardData`."""
    tags = ["calm", "continuous-autoregressive", "custom_code"]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **metadata)
    content = {"name": name, "config": config, "prompt": prompt, "about": about}
    content |= {"transformers": TRANSFORMERS, "code_version": code_version()}
    return str(ModelCard.from_template(data, template_str=MODEL_CARD, **content))


def converted_card(name: str, config: CALMConfig, language_model: Repository, autoencoder: Repository) -> str:
    """Returns the README of a converted repository, with links to those of its two sources that are on the Hub."""
    sources = [language_model, autoencoder]
    links = [f"[{s.name}](https://huggingface.co/{s.name})" if s.is_on_hub else f"`{s.name}`" for s in sources]
    dtype = str(config.dtype).removeprefix("torch.")
    about = CONVERTED.format(links=links, dtype=dtype, head_type=config.head_type)
    on_hub = [source.name for source in sources if source.is_on_hub]
    return model_card(name, config, "The key to life is", about, license="other", base_model=on_hub or None)


def write_supporting_files(folder: Path, config: CALMConfig, tokenizer_folder: Path, card: str) -> None:
    """Writes all files of a repository except the weights."""
    config.architectures, config.code_version = [CALMForCausalLM.__name__], code_version()
    files = {
        "config.json": config.to_json_string(),
        "generation_config.json": json.dumps(generation_defaults(config), indent=2),
        "README.md": card,
        **tokenizer_files(tokenizer_folder, config),
    }
    for file, content in files.items():
        (folder / file).write_text(content, encoding="utf-8")
    for file in code_files():
        shutil.copy(file, folder)


def code_files() -> list[str]:
    """Returns the paths of the modeling file and of every file that it imports."""
    modeling_file = inspect.getfile(CALMForCausalLM)
    return [modeling_file, *dict.fromkeys(get_relative_import_files(modeling_file))]
