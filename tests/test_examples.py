"""The scripts of examples/, each in a process and folder of its own; `pytest --nbmake examples` runs the notebooks."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGES = EXAMPLES.parent / "docs"
HERE = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONUTF8": "1"}
HERE["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of the command `calm`


def example(command: str, printed: str, files: str = "*", package: str = "calm_transformers", marks=()):
    """Returns a case: an example with its arguments, a pattern of what it prints, files it writes, what it needs."""
    missing = pytest.mark.skipif(not find_spec(package), reason=f"{package} is not installed")
    return pytest.param(command, printed, files, marks=[missing, *marks], id=command.split()[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, printed, files",
    [
        example(
            "first_text.py --max_new_tokens 20",
            r"Pipeline: (Once upon a time).{20}.*\nT = 1.0: \1.{20}.*\nT = 0.5: \1.{20}.*\nStreamed: \1.{20}",
        ),
        example(
            "inspect_patches.py --max_new_tokens 8 --html page.html",
            r"Patch 4, of 200 samples:\n(  .*\n)*> ' .*' +sampled +\d+ times, weight 0\.[1-9].*\nMean weight",
            "page.html",
        ),
        example(
            "finetune_lora.py", r"Before: [^!]*\nLoss.*: 2\.\d+ → 0\.[0-3]\d*\nAfter: .*Beep!", "lora/*.json", "peft"
        ),
        example("train_own_text.sh text.txt --max_steps 2", "Once upon a time.{20}", "runs/small/model.safetensors"),
        example("distil_temperature.py text.txt --max_steps 2", r"\n1 sample\(s\) a step: Once.*\n200 sample"),
        example(
            "compare_texts.py",
            r"0\.0: '(Once upon a time), .*Lily\.'\n.*0\.5: '\1.*\n  ' little girl' +1\.00 +0\.[5-9].*: ' little",
        ),
        example("measure_brier_lm.py held-out.txt", r"CALM: .*BrierLM [1-9]\d\..*\n.*Llama: .*BrierLM 0\."),
        example("serve_client.py", r"Completion: '(.{30}).*Streamed:\1.*JSON: {'name': .* 'pet': '(cat|dog)'}"),
        example("ray_batch.py --max_new_tokens 10", "are in texts", "texts/*", "ray", [pytest.mark.transformers]),
    ],
)
def test_an_example_runs(command, printed, files, tmp_path):
    pages = [page.read_text(encoding="utf-8") for page in sorted(PAGES.rglob("*.md"))]
    (tmp_path / "text.txt").write_text("\n".join(pages), encoding="utf-8")  # enough for a tokenizer of 1,024 entries
    stories = re.findall(r"^> (.*\n)", (PAGES / "results" / "samples.md").read_text(encoding="utf-8"), re.MULTILINE)
    (tmp_path / "held-out.txt").write_text("".join(stories), encoding="utf-8")
    name, *arguments = command.split()
    words = ["sh" if name.endswith(".sh") else sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(words, cwd=tmp_path, env={**os.environ, **HERE}, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert re.search(printed, result.stdout, re.DOTALL), result.stdout
    assert (found := list(tmp_path.glob(files))) and all(path.stat().st_size for path in found)


def test_the_table_lists_exactly_the_files_and_notebooks_have_no_outputs():
    listed = re.findall(r"^\| \[(.+)\]\(\1\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted([*listed, "README.md"]) == sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())
    for path in EXAMPLES.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name
