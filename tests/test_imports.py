"""Importing the package, in a fresh process: no I/O, no module queries a GPU; the Auto classes are registered."""

import ast
import sys
from pathlib import Path

import fresh_process
import pytest
from commands import MODULES, ROOT

QUIET = {"import", "compile", "exec", "object.__setattr__", "object.__getattr__", "builtins.id", "sys._getframe"}


def actions_at_import(root):
    """In a fresh process: imports the model; returns its audit events, and the environment variables that it read."""
    import importlib
    import os
    import sys

    import torch  # noqa: F401
    import transformers  # noqa: F401

    actions, environ = [], type(os.environ)
    read = environ.__getitem__

    def is_ours(frame):
        while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
            if os.path.dirname(frame.f_code.co_filename) == root:
                return True
            frame = frame.f_back
        return False

    def note(event, arguments):
        path = str(arguments[0]) if arguments else ""
        is_package_list = path.endswith("METADATA") or path in (".", *sys.path)  # of importlib.metadata
        if event not in QUIET and not is_package_list and is_ours(sys._getframe(1)):
            actions.append([event, path])

    def note_variable(self, name):
        note("environ", [name])
        return read(self, name)

    environ.__getitem__ = note_variable
    sys.addaudithook(note)
    importlib.import_module("calm_transformers")
    return actions


def test_importing_the_model_reads_nothing_but_the_list_of_installed_packages(tmp_path):
    assert fresh_process.call(actions_at_import, tmp_path, root=str(ROOT)).result == []


def test_the_model_s_files_import_torch_and_transformers_alone():
    from calm_transformers.conversion.bundle_files import code_files

    for file in code_files():
        nodes = list(ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert {name.partition(".")[0] for name in names} <= {"torch", "transformers", *sys.stdlib_module_names}, file


@pytest.mark.transformers
def test_a_model_whose_code_differs_from_that_it_was_saved_with_says_so(tmp_path, monkeypatch):
    from tiny import tiny_model
    from transformers.utils import logging

    from calm_transformers import CALMForCausalLM, __version__

    heard, logger = [], logging.get_logger("calm_transformers.model.modeling_calm")
    monkeypatch.setattr(logger, "warning_once", heard.append)
    tiny_model().save_pretrained(tmp_path)
    own = CALMForCausalLM.from_pretrained(tmp_path).config.code_version
    assert not heard and own.startswith(f"{__version__}, ")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace(own, "0.0.9, 0123456789ab"))
    CALMForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert heard == [f"Saved with CALM's code 0.0.9, 0123456789ab; {own} runs."]
    assert own in path.read_text()


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
