"""Importing the package: every module, in a fresh process, with nothing asked of a GPU and nothing registered."""

import ast
from pathlib import Path

import fresh_process
import pytest
from commands import MODULES, PACKAGES, ROOT


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

    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    known = [name for name in ("calm", "calm_autoencoder") if name in CONFIG_MAPPING]
    extra = [len(mapping._extra_content) for mapping in (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)]
    registered = {"known": known, "extra": extra, "attribute": hasattr(transformers, "CALMForCausalLM")}
    return sorted(asked), registered


def test_no_import_asks_for_a_gpu_or_registers_our_classes(tmp_path):
    asked, registered = fresh_process.call(after_importing, tmp_path, modules=MODULES).result
    ours = {str(ROOT / package) for package in PACKAGES}
    assert [file for file in asked if str(Path(file).parent) in ours] == []
    assert registered == {"known": [], "extra": [0, 0, 0], "attribute": False}


def loaded_without_registration(calm, ar):
    """In a fresh process: the classes that load_causal_lm makes of two folders, and no question asked."""
    from calm.evaluation.autoencoder_report import load_autoencoder
    from calm.evaluation.models import load_causal_lm

    models = [load_causal_lm(calm), load_causal_lm(ar), load_autoencoder(calm)]
    return [[type(model).__module__, type(model).__name__] for model in models]


@pytest.mark.transformers
def test_models_load_by_the_type_in_their_configuration(tmp_path):
    from evaluation_folder import tiny_llama
    from tiny import tiny_model

    tiny_model(patch_size=2).save_pretrained(tmp_path / "calm")
    tiny_llama().save_pretrained(tmp_path / "ar")
    folders = {"calm": str(tmp_path / "calm"), "ar": str(tmp_path / "ar")}
    classes = fresh_process.call(loaded_without_registration, tmp_path / "home", **folders).result
    assert classes == [
        ["calm.modeling_calm", "CALMForCausalLM"],
        ["transformers.models.llama.modeling_llama", "LlamaForCausalLM"],
        ["calm.modeling_calm_autoencoder", "CALMAutoencoder"],
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
        if importer.startswith("calm.") and any([name, each] in names for each in fromlist or ()):
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
