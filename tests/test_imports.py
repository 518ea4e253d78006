"""Importing the package: every module, in a fresh process, asks nothing of a GPU; it registers the Auto classes."""

import ast
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


NOT_NEEDED = [  # for speed, or for a sentence
    ("torch.utils._python_dispatch", "_get_current_dispatch_mode"),
    ("torch._guards", "detect_fake_mode"),
]


def text_without(names):
    """In a fresh process: a tiny model's text where these names can't be imported by the package."""
    import builtins

    import_module = builtins.__import__

    def without(name, globals=None, locals=None, fromlist=(), level=0):
        importer = (globals or {}).get("__name__", "")
        if importer.startswith("calm_transformers.") and any([name, each] in names for each in fromlist or ()):
            raise ImportError(f"no {name}.{fromlist}")
        return import_module(name, globals, locals, fromlist, level)

    builtins.__import__ = without
    import torch
    from tiny import BOS, tiny_model

    prompt = torch.tensor([[BOS, 5, 6, 7]])
    settings = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 8, "eos_token_id": None}
    return tiny_model().generate(prompt, generator=torch.Generator().manual_seed(0), **settings).tolist()


def test_every_private_name_is_in_the_list():
    found = {
        (node.module, name.name)
        for path in ROOT.glob("*_calm*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for name in node.names
        if "._" in f".{node.module}.{name.name}" and not node.module.startswith("__")
    }
    assert found == {each for each in NOT_NEEDED if "._" in ".".join(each)}


@pytest.mark.slow
def test_private_names_that_are_gone_cost_speed_alone(tmp_path):
    text = fresh_process.call(text_without, tmp_path / "without", names=NOT_NEEDED).result
    assert text == fresh_process.call(text_without, tmp_path / "with", names=[]).result
