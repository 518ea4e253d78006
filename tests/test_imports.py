"""Importing the package: every module, in a fresh process, with nothing asked of a GPU and nothing registered."""

from pathlib import Path

import fresh_process
from model_copies import ROOT

PACKAGES = ("", "training", "evaluation", "benchmarks", "experiments", "serving")
MODULES = [
    ".".join(filter(None, ("calm", package, path.stem)))
    for package in PACKAGES
    for path in sorted((ROOT / package).glob("*.py"))
    if path.stem not in ("__init__", "__main__")
]


def callers_of_gpu_queries(modules):
    """In a fresh process: imports them, and names the files that asked; transformers' own are among them."""
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
    asked = fresh_process.call(callers_of_gpu_queries, tmp_path, modules=MODULES).result
    ours = {str(ROOT / package) for package in PACKAGES}
    assert [file for file in asked if str(Path(file).parent) in ours] == []


def known_after_importing(modules):
    """In a fresh process: which of our model types transformers' Auto classes know, and what was put into it."""
    import importlib

    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for module in modules:
        importlib.import_module(module)
    known = [name for name in ("calm", "calm_autoencoder") if name in CONFIG_MAPPING]
    extra = [len(mapping._extra_content) for mapping in (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)]
    return {"known": known, "extra": extra, "attribute": hasattr(transformers, "CALMForCausalLM")}


def test_no_import_registers_our_classes(tmp_path):
    result = fresh_process.call(known_after_importing, tmp_path, modules=MODULES).result
    assert result == {"known": [], "extra": [0, 0, 0], "attribute": False}


def loaded_without_registration(calm, ar):
    """In a fresh process: the classes that load_causal_lm makes of two folders, and no question asked."""
    from calm.evaluation.autoencoder_report import load_autoencoder
    from calm.evaluation.models import load_causal_lm

    models = [load_causal_lm(calm), load_causal_lm(ar), load_autoencoder(calm)]
    return [[type(model).__module__, type(model).__name__] for model in models]


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
