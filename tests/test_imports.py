"""Importing the package, in a fresh process: no module queries a GPU; the Auto classes are registered."""

from pathlib import Path

import fresh_process
import pytest
from commands import MODULES, ROOT


def files_querying_gpus(modules):
    """In a fresh process: imports the modules and returns the files that queried a GPU, including upstream's."""
    import importlib
    import sys

    import torch

    files = set()

    def record_caller(query):
        def call(*args, **kwargs):
            files.add(sys._getframe(1).f_code.co_filename)
            return query(*args, **kwargs)

        return call

    for module in (torch.cuda, torch.accelerator):
        for name in ("is_available", "device_count"):
            setattr(module, name, record_caller(getattr(module, name)))
    for module in modules:
        importlib.import_module(module)
    return sorted(files)


def test_no_import_queries_a_gpu(tmp_path):
    files = fresh_process.call(files_querying_gpus, tmp_path, modules=MODULES).result
    assert [file for file in files if Path(file).is_relative_to(ROOT) and "site-packages" not in file] == []


def classes_loaded_with_the_package(calm, ar):
    """In a fresh process: loads folders with the Auto classes without trust_remote_code; returns the classes."""
    import calm_transformers  # noqa: F401  isort: skip
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    auto_classes = [AutoConfig, AutoModel, AutoModelForCausalLM]
    models = [*(auto.from_pretrained(calm) for auto in auto_classes), AutoModelForCausalLM.from_pretrained(ar)]
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
    classes = fresh_process.call(classes_loaded_with_the_package, tmp_path / "home", **folders).result
    assert classes == [
        ["calm_transformers.model.configuration_calm", "CALMConfig"],
        ["calm_transformers.model.modeling_calm", "CALMModel"],
        ["calm_transformers.model.modeling_calm", "CALMForCausalLM"],
        ["transformers.models.llama.modeling_llama", "LlamaForCausalLM"],
    ]
