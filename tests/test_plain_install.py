"""First steps with an installed package, outside the checkout, on the bundled model.

`make test-newest` runs it in an environment installed without constraints, except for torch. Deprecation warnings of
upstream on stderr are failures.
"""

import json
import math
import re
import subprocess
import sys

import fresh_process
import pytest
from model_copies import ROOT
from server_process import running_server

pytestmark = [pytest.mark.slow, pytest.mark.transformers]
PROMPTS = ["Once upon a time", "The dog ran"]  # of different lengths, so a batch is padded


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
    assert called.result.startswith(PROMPTS[0]) and len(called.result) > len(PROMPTS[0])
    assert deprecations(called.stderr) == []


def call_model(folder, prompts):
    """In a fresh process: generates greedily in several ways; returns the texts, a loss and forward differences."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    class Streamed(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    def generate(*prompts, **settings):
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, **settings)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    streamer = Streamed(tokenizer, skip_special_tokens=True)
    generate(prompts[0], streamer=streamer)
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids[:, :4]

    def in_two_parts(name):
        first = model(ids[:, :2], use_cache=True)
        rest = model(ids[:, 2:], **{name: getattr(first, name)})
        return torch.cat([first.last_hidden_state, rest.last_hidden_state], dim=1)

    whole = model(ids, labels=ids, generator=torch.Generator().manual_seed(0))
    parts = [in_two_parts(name) for name in ("cache", "past_key_values")]
    return {
        "alone": [generate(prompt)[0] for prompt in prompts],
        "batch": generate(*prompts),
        "static cache": generate(*prompts, cache_implementation="static"),
        "streamed": streamer.text,
        "loss": whole.loss.item(),
        "distances": [(part - whole.last_hidden_state).abs().max().item() for part in parts],
    }


def test_a_model_s_calls(tmp_path):
    called = fresh_process.call(call_model, tmp_path, folder=str(ROOT), prompts=PROMPTS)
    result = called.result
    assert all(len(text) > len(prompt) + 12 for text, prompt in zip(result["alone"], PROMPTS, strict=True))
    assert result["batch"] == result["static cache"] == result["alone"]
    assert result["streamed"] == result["alone"][0]
    assert math.isfinite(result["loss"])
    assert max(result["distances"]) < 1e-4
    assert called.complaints == []


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
        status, answer = server.post("/v1/completions", {"prompt": PROMPTS[0], "max_tokens": 8, "seed": 0})
        assert status == 200 and answer["usage"]["completion_tokens"] == 8 and answer["choices"][0]["text"]
    assert deprecations(server.log.read_text()) == []
