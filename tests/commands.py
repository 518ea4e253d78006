"""Every command, and how it refuses: code 2, nothing but one line "error: …" on stderr."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRESS = re.compile(r"it/s\]")  # upstream's bars while a model loads
TYPED_AS_MODULES = ("calm.app", "calm.export_onnx", "calm.inspect_text", "calm.serve")
STARTS = '\nif __name__ == "__main__":'


def commands() -> dict[str, str]:
    """Module → how one types it, of every module that runs, those of docs/ too, which are not installed."""
    files = [*ROOT.glob("*.py"), *(path for part in [*_packages(), "docs"] for path in (ROOT / part).glob("*.py"))]
    found = {}
    for path in sorted(files):
        if STARTS in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(["calm", *(part for part in parts if part != "__main__")])
            is_script = parts[0] == "docs" or len(parts) == 1 and module not in TYPED_AS_MODULES
            found[module] = f"python {path.relative_to(ROOT)}" if is_script else f"python -m {module}"
    return found


def _packages() -> list[str]:
    return [path.parent.name for path in ROOT.glob("*/__init__.py")]


COMMANDS = commands()
PACKAGES = ("", *sorted(_packages()))  # "" is the root's
MODULES = [
    ".".join(filter(None, ("calm", package, path.stem)))
    for package in PACKAGES
    for path in sorted((ROOT / package).glob("*.py"))
    if path.stem not in ("__init__", "__main__")
]


def main_of(module: str) -> Callable[[list[str]], int]:
    try:
        return importlib.import_module(f"{module}.__main__").main
    except ModuleNotFoundError:
        return importlib.import_module(module).main


def refusal(capsys, main: Callable, *argv) -> str:
    """The line without "error: ". Whatever was printed before counts for nothing, and so do upstream's bars."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    printed = capsys.readouterr().err
    assert code == 2
    lines = [line for line in re.split(r"[\r\n]+", printed) if line and not PROGRESS.search(line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), printed
    return lines[0].removeprefix("error: ")
