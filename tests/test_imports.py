"""Importing the package: every module, in a fresh process, with nothing asked of a GPU."""

from pathlib import Path

import fresh_process
from model_copies import ROOT

PACKAGES = ("", "training", "evaluation", "benchmarks", "experiments")
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
