"""First steps with an installed package, outside the checkout, on the bundled model.

Deprecation warnings of upstream on stderr are failures. What a model's calls return and that they complain of nothing
is tested in test_generation.py, test_model.py and test_loading.py.
"""

import json
import re
import subprocess
import sys

import fresh_process
import pytest
from model_copies import ROOT
from server_process import running_server

pytestmark = [pytest.mark.slow, pytest.mark.transformers]
PROMPT = "Once upon a time"


def deprecations(printed):
    return [line for line in fresh_process.FreshCall(None, printed).complaints if "deprecated" in line]


def run_pipeline_snippet(snippet):
    """In a fresh process: runs a snippet that prints the outputs of a pipeline; returns the generated text."""
    printed = []
    exec(snippet, {"print": printed.append})
    ((output,),) = printed
    return output["generated_text"]


def test_pipeline_of_the_readme(tmp_path):
    text = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(import torch\nfrom transformers import pipeline\n.*?)```", text, re.DOTALL)
    assert snippet.count('model = "."') == 1
    snippet = snippet.replace('model = "."', f"model = {str(ROOT)!r}")
    called = fresh_process.call(run_pipeline_snippet, tmp_path, snippet=snippet)
    assert called.result.startswith(PROMPT) and len(called.result) > len(PROMPT)
    assert deprecations(called.stderr) == []


def run(folder, *words):
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert deprecations(done.stderr) == []
    return done.stdout


def test_brierlm(tmp_path):
    pytest.importorskip("datasets", reason="datasets (extra [eval]) is not installed")
    story = "Once upon a time there was a little girl named Lily. She loved to play with her toys."
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": story}) for _ in range(8)))
    command = ["-m", "calm_transformers.evaluation.brier_lm", "--model", ROOT, "--data", "text.jsonl"]
    run(tmp_path, *command, "--block_size", 32, "--json", "scores.json")
    (scores,) = json.loads((tmp_path / "scores.json").read_text())
    assert 0.1 < scores["brier"][0] < 1  # like the training text, so the demo predicts it


def test_server(tmp_path):
    with running_server(ROOT, tmp_path) as server:
        status, answer = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "seed": 0})
        assert status == 200 and answer["usage"]["completion_tokens"] == 8 and answer["choices"][0]["text"]
    assert deprecations(server.log.read_text()) == []
