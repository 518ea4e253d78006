"""Prints size metrics of the project and their limits: `python docs/weight.py`.

With `--check` the exit code is 1 if a metric exceeds its limit. Times are passed as options; as the same tests took
two to three times as long on some machines as on others, a time fails only at `TIME_MARGIN` times its limit.
"""

import ast
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from calm_transformers.command_line import Parser, command
from calm_transformers.conversion.bundle_files import code_files
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.training.train import main as train

ROOT = Path(__file__).parents[1]
MODEL_FILES = [Path(file) for file in code_files()]
TRAINER = "calm_transformers/training/trainer.py"
UNWANTED = ("subprocess", "pickle", "multiprocessing")
TIME_MARGIN = 2
Calls = dict[str, set[str]]  # file, relative to the root → its functions that ran


class Reached(BaseException):
    """Stops a traced call when it enters the function `until`."""


def trace(call, until: str | None = None) -> tuple[Calls, set[str]]:
    """Runs `call`; returns the project's functions that ran, and the files on the stack when `until` was entered."""
    ran: Calls = {}
    stack: set[str] = set()

    def file_of(frame) -> str | None:
        path = Path(frame.f_code.co_filename)
        is_ours = path.is_relative_to(ROOT) and not path.relative_to(ROOT).parts[0].startswith(("docs", ".venv"))
        return str(path.relative_to(ROOT)) if is_ours else None

    def note(frame, event, _):
        if event != "call" or (file := file_of(frame)) is None:
            return
        ran.setdefault(file, set()).add(frame.f_code.co_qualname)
        if frame.f_code.co_name == until:
            stack.clear()
            while frame is not None:
                stack.update(filter(None, [file_of(frame)]))
                frame = frame.f_back
            if TRAINER in stack:  # else the FLOPs are counted
                sys.setprofile(None)
                raise Reached

    sys.setprofile(note)
    try:
        call()
    except Reached:
        pass
    finally:
        sys.setprofile(None)
    return ran, stack


def patch_path() -> tuple[int, int]:
    """Counts the project's files and functions that run when the demo model generates one patch at T = 1."""
    model = CALMForCausalLM.from_pretrained(ROOT)
    prompt = torch.tensor([[1, 5, 6, 7]])
    settings = {"do_sample": True, "temperature": 1.0, "max_new_tokens": model.config.patch_size}
    ran, _ = trace(lambda: model.generate(prompt, **settings))
    return len(ran), sum(map(len, ran.values()))


def loss_path() -> list[str]:
    """Returns the files from `calm train calm` to the loss: the text and training code, and the model's call stack."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("Once upon a time there was a little girl.\n" * 400, encoding="utf-8")
        recipe = {"recipe": ROOT / "tests" / "fixtures" / "recipes" / "calm.yaml", "cache_dir": folder}
        files = {"tokenizer": ROOT, "autoencoder": ROOT, "train_files": text, "validation_files": text}
        options = {**recipe, **files, "output_dir": f"{folder}/run"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        ran, stack = trace(lambda: train(["calm", *words]), until="energy_score")
    assert stack, "the loss was not reached"
    text_and_training = {file for file in ran if "/training/" in file or file.endswith("/documents.py")}
    return sorted(text_and_training | {file for file in stack if "/" not in file})


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names}


def lines(paths) -> int:
    return sum(len(Path(path).read_text(encoding="utf-8").splitlines()) for path in paths)


def figures(test_minutes: float | None, ci_minutes: float | None) -> list[tuple[str, float, float | None]]:
    """Returns name, value and limit of each metric."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    code = [ROOT / name for name in tracked if name.endswith(".py") and (ROOT / name).is_file()]
    tests, examples = ([path for path in code if path.is_relative_to(ROOT / name)] for name in ("tests", "examples"))
    files, functions = patch_path()
    path = loss_path()
    print("From calm train to the loss: " + ", ".join(path) + "\n")
    rows: list[tuple[str, float, float | None]] = [
        ("Python files that travel with every model", len(MODEL_FILES), 15),
        ("their lines", lines(MODEL_FILES), 4500),
        ("of them that import " + ", ".join(UNWANTED), sum(bool(imports(f) & set(UNWANTED)) for f in MODEL_FILES), 0),
        ("modules at the root", len([path for path in code if path.parent == ROOT]), 24),
        ("entries at the root", len({name.partition("/")[0] for name in tracked}), 45),
        ("lines of the product", lines(set(code) - {*tests, *examples}), 19000),
        ("lines of the tests", lines(tests), 17000),
        ("files from calm train to the loss", len(path), 10),
        ("files that one generated patch runs through", files, 10),
        ("functions that one generated patch runs through", functions, 100),
        ("words of README", len((ROOT / "README.md").read_text(encoding="utf-8").split()), 1100),
    ]
    timed = [("minutes of make test", test_minutes, 6), ("minutes of all that CI runs", ci_minutes, 28)]
    return rows + [(name, minutes, limit) for name, minutes, limit in timed if minutes is not None]


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser("python docs/weight.py", __doc__)
    parser.add_argument("--check", action="store_true", help="exit with code 1 if a metric exceeds its limit")
    parser.add_argument("--test_minutes", type=float, help="duration of make test")
    parser.add_argument("--ci_minutes", type=float, help="duration of .ci/run")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    rows = figures(options.test_minutes, options.ci_minutes)
    print("| | now | at most |\n| --- | --- | --- |")
    for name, figure, limit in rows:
        print(f"| {name} | {figure:,g} | {'' if limit is None else f'{limit:,}'} |")
    margins = {name: TIME_MARGIN if name.startswith("minutes") else 1 for name, _, _ in rows}
    heavy = [name for name, figure, limit in rows if limit is not None and figure > limit * margins[name]]
    if heavy:
        print("too heavy: " + ", ".join(heavy))
    return int(options.check and bool(heavy))


if __name__ == "__main__":
    sys.exit(main())
