"""The wheel, built and installed in another folder: its files are complete, and every command starts."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import COMMANDS, ROOT

from calm_transformers.conversion.bundle_files import code_files

pytestmark = pytest.mark.slow

INSTALLED = [name for name in COMMANDS if not name.startswith("docs.")]
NOT_SOURCES = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__", "*.safetensors")
# Packages of the extras and their dependencies, except those that transformers and torch install anyway.
HIDDEN = "datasets zstandard tensorboard peft matplotlib pandas pyarrow scipy sklearn fastapi openai uvicorn".split()
HIDDEN += ["starlette"]


def pip(*arguments) -> None:
    words = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "-q"]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy, so that no file of an earlier build gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCES)
    pip("wheel", folder / "source", "--no-build-isolation", "--wheel-dir", folder)
    (file,) = folder.glob("*.whl")
    return file


# Commands that require a package of an extra, and the extra.
DATA, PLOT = ["--data", "text", "--block_size", "8"], ["--plot", "x.png"]
TOKENIZER = ["calm_transformers.training.train", "tokenizer", "--recipe", "demo-tokenizer"]
MISSING_PACKAGES = [
    ([*TOKENIZER, "--train_files", "text.jsonl.zst"], "train"),
    ([*TOKENIZER, "--train_files", "text.parquet"], "train"),
    ([*TOKENIZER, "--train_files=[]", "--dataset", "some/texts"], "train"),
    (["calm_transformers.evaluation.brier_lm", "--model", ".", *DATA, *PLOT], "eval"),
    (["calm_transformers.benchmarks.generation", "--shape", "calm-m", *PLOT], "eval"),
]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs the installed commands outside the checkout, without the packages of the extras; returns their results."""
    site, folder = wheel.parent / "site", tmp_path_factory.mktemp("elsewhere")
    pip("install", wheel, "--target", site)
    (folder / "run").mkdir()
    for name in ("text.jsonl.zst", "text.parquet", "run/trainer_state.json"):
        (folder / name).write_text('{"log_history": [{"step": 1, "eval_loss": 1.0}]}')
    script = shutil.copy(ROOT / "tests" / "wheel_commands.py", folder)  # or the tests' folder would be in sys.path
    words = [[name, "--help"] for name in INSTALLED] + [words for words, _ in MISSING_PACKAGES]
    done = subprocess.run(
        [sys.executable, script, folder / "result.json", json.dumps(HIDDEN), json.dumps(words)],
        env={**os.environ, "PYTHONPATH": str(site), "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads((folder / "result.json").read_text())
    assert Path(outcome["package"]).is_relative_to(site)  # not the checkout's
    return outcome, folder


def test_the_wheel_contains_the_packages_with_data_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    python = {name for name in names if name.endswith(".py")}
    package = ROOT / "calm_transformers"
    expected = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    assert python == expected | {f"calm_transformers/model/{path.name}" for path in ROOT.glob("*.py")}
    assert {str(path.relative_to(ROOT)) for path in package.rglob("*.yaml")} <= names


def test_every_command_starts_without_the_extras(installed):
    outcome, _ = installed
    failed = {name: outcome[f"{name} --help"]["printed"] for name in INSTALLED if outcome[f"{name} --help"]["code"]}
    assert not failed, "\n".join(failed.values())
    assert all("usage: " in outcome[f"{name} --help"]["printed"] for name in INSTALLED)


def test_a_missing_package_is_named_in_one_line(installed):
    outcome, _ = installed
    for words, extra in MISSING_PACKAGES:
        done = outcome[" ".join(words)]
        last = done["printed"].strip().splitlines()[-1]
        assert done["code"] == 2 and "Traceback" not in done["printed"], done["printed"]
        assert " needs " in last and last.endswith(f'pip install "calm-transformers[{extra}]".'), (words, last)


def test_a_model_is_saved_with_its_code(installed):
    outcome, folder = installed
    assert set(outcome["saved"]) == {Path(path).name for path in code_files()}
    for name in outcome["saved"]:
        assert (folder / "saved" / name).read_bytes() == (ROOT / name).read_bytes()
