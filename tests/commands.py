"""All commands, and a check of their error messages: code 2 and one line "error: …" on stderr."""

import ast
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRESS = re.compile(r"it/s\]")  # upstream's bars while a model loads
RUNS = '\nif __name__ == "__main__":'
PACKAGE = ROOT / "calm_transformers"
# Parsed from cli.py without importing it, for tests in fresh processes.
CLI = ast.literal_eval(
    next(node.value for node in ast.parse((PACKAGE / "cli.py").read_text()).body if isinstance(node, ast.Assign))
)


def module_name(path: Path) -> str:
    """Returns a file's module name; for a script in docs/, which is not installed, its path with dots."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def commands() -> dict[str, str]:
    """Returns the command line of every runnable module, by module name."""
    typed = {f"calm_transformers.{module}": f"calm {name}" for name, (module, _) in CLI.items()}
    found = {}
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "docs").glob("*.py")]):
        if RUNS in path.read_text(encoding="utf-8") and path.stem != "cli":
            name = module_name(path)
            script = path.relative_to(ROOT) if path.parent.name == "docs" else path.name
            is_script = path.parent.name == "docs" or path.stem == "generate_onnx"  # it is copied to exported folders
            found[name] = f"python {script}" if is_script else typed.get(name, f"python -m {name}")
    return found


COMMANDS = commands()
NOT_IMPORTED = ("__init__", "__main__", "ray_app")  # the last needs Ray
MODULES = [
    *(f"calm_transformers.model.{path.stem}" for path in sorted(ROOT.glob("*_calm*.py"))),
    *(module_name(path) for path in sorted(PACKAGE.rglob("*.py")) if path.stem not in NOT_IMPORTED),
]


def main_of(module: str) -> Callable[[list[str]], int]:
    if module.startswith("docs."):
        spec = importlib.util.spec_from_file_location(module, ROOT / f"{module.replace('.', '/')}.py")
        script = importlib.util.module_from_spec(spec)
        sys.modules[module] = script  # dataclasses look it up
        spec.loader.exec_module(script)
        return script.main
    return importlib.import_module(module).main


def refusal(capsys, main: Callable, *argv) -> str:
    """Runs a command that must fail and returns its error line without "error: "; ignores upstream's progress bars."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    printed = capsys.readouterr().err
    assert code == 2
    lines = [line for line in re.split(r"[\r\n]+", printed) if line and not PROGRESS.search(line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), printed
    return lines[0].removeprefix("error: ")
