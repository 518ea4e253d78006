"""The package's modules import only what lies below them, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from commands import ROOT

PACKAGE = "calm_transformers"
LAYERS = [  # each may import what stands before it, and within its own subpackage
    {"model"},
    {"command_line", "progress"},
    {"files", "loading", "documents", "grammars"},
    {"training", "evaluation", "serving", "pages", "conversion", "onnx_export"},
    {"benchmarks", "experiments", "generate"},
    {"cli"},
]


def modules() -> dict[str, Path]:
    """Full name → file, of every module of the package and of the model."""
    found = {f"{PACKAGE}.model.{path.stem}": path for path in ROOT.glob("*_calm*.py")}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """Our modules that a module imports, anywhere in it, also under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"{name.rpartition('.')[0]}." if node.level else ""
            found |= {base + (node.module or "")} | {f"{base}{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def layer_of(name: str) -> int:
    part = name.split(".")[1]
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


PARTS = sorted(name for name in MODULES if name != PACKAGE)


@pytest.mark.parametrize("name", PARTS)
def test_imports_go_downwards(name):
    own = name.split(".")[1]
    others = {each for each in imported(name) if each != PACKAGE and each.split(".")[1] != own}
    assert {each for each in others if layer_of(each) >= layer_of(name)} == set()


def test_no_circle():
    TopologicalSorter({name: imported(name) - {name} for name in PARTS}).prepare()
