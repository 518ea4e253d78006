"""Wheel and sdist: their files are complete, and every command of the installed wheel starts.

`make test-newest` starts them in an empty environment, with what pip installs today.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
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
    run_module("pip", *arguments, "--no-deps", "--no-index", "-q")


def run_module(*words) -> None:
    words = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds wheel and sdist from a copy, so that no file of an earlier build gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCES)
    run_module("build", "--no-isolation", "--sdist", "--wheel", "--outdir", folder, folder / "source")
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
    data = {str(path.relative_to(ROOT)) for path in package.rglob("*.yaml")}
    assert data | {"calm_transformers/py.typed"} <= names


def test_the_sdist_contains_no_tests_and_builds_the_same_wheel(wheel):
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        entries = {name.split("/")[1] for name in file.getnames() if "/" in name}
    built = {"PKG-INFO", "calm_transformers", "calm_transformers.egg-info"}
    sources = {"setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    assert entries == built | sources | {path.name for path in ROOT.glob("*.py")}
    pip("wheel", sdist, "--no-build-isolation", "--wheel-dir", wheel.parent / "again")
    again = wheel.parent / "again" / wheel.name
    records = []  # the hashes of all files
    for path in (wheel, again):
        with zipfile.ZipFile(path) as file:
            (name,) = (name for name in file.namelist() if name.endswith("/RECORD"))
            records.append(sorted(file.read(name).splitlines()))
    assert records[0] == records[1]


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
