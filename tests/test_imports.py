"""Importing the package: every module, in a fresh process, asks nothing of a GPU; it registers the Auto classes."""

from pathlib import Path

import fresh_process
import pytest
from commands import MODULES, ROOT


def after_importing(modules):
    """In a fresh process: the files that asked for a GPU, transformers' own among them, and what is registered."""
    import importlib
    import sys

    import torch

    asked = set()

    def noting(ask):
        def call(*args, **kwargs):
            asked.add(sys._getframe(1).f_code.co_filename)
            return ask(*args, **kwargs)

        return call

    for where in (torch.cuda, torch.accelerator):
        for name in ("is_available", "device_count"):
            setattr(where, name, noting(getattr(where, name)))
    for module in modules:
        importlib.import_module(module)
    return sorted(asked)


def test_no_import_asks_for_a_gpu(tmp_path):
    asked = fresh_process.call(after_importing, tmp_path, modules=MODULES).result
    assert [file for file in asked if Path(file).is_relative_to(ROOT) and "site-packages" not in file] == []


def loaded_with_the_package(calm, ar):
    """In a fresh process: the classes that Auto classes make of folders without trust_remote_code, and no question."""
    import calm_transformers  # noqa: F401  isort: skip
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    made = [AutoConfig, AutoModel, AutoModelForCausalLM]
    models = [*(auto.from_pretrained(calm) for auto in made), AutoModelForCausalLM.from_pretrained(ar)]
    AutoTokenizer.from_pretrained(calm)
    return [[type(model).__module__, type(model).__name__] for model in models]


@pytest.mark.transformers
def test_with_the_package_imported_auto_classes_need_no_remote_code(tmp_path):
    from evaluation_folder import tiny_llama
    from tiny import tiny_model, tiny_tokenizer

    model = tiny_model(patch_size=2)
    model.save_pretrained(tmp_path / "calm")
    tiny_tokenizer().save_pretrained(tmp_path / "calm")
    tiny_llama().save_pretrained(tmp_path / "ar")
    folders = {"calm": str(tmp_path / "calm"), "ar": str(tmp_path / "ar")}
    classes = fresh_process.call(loaded_with_the_package, tmp_path / "home", **folders).result
    assert classes == [
        ["calm_transformers.model.configuration_calm", "CALMConfig"],
        ["calm_transformers.model.modeling_calm", "CALMModel"],
        ["calm_transformers.model.modeling_calm", "CALMForCausalLM"],
        ["transformers.models.llama.modeling_llama", "LlamaForCausalLM"],
    ]
