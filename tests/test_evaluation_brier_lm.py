"""`calm evaluate brier_lm`: table, JSON and plot; exact terms don't depend on the batch size."""

import json
import os
import subprocess
import sys

import pytest
import torch
from commands import refusal
from evaluation_folder import DOCUMENT_TOKENS, DOCUMENTS, tiny_llama
from server_process import free_port
from tiny import VOCAB_SIZE
from torch import nn

from calm_transformers.evaluation.brier_lm import main
from calm_transformers.evaluation.models import brier_counts
from calm_transformers.loading import load_causal_lm
from calm_transformers.training.train import add_lora


def run(folder, *more, model=("ar",), data="text.jsonl.xz", block_size=24):
    names = [str(folder / name) for name in model]
    return main(["--model", *names, "--data", str(folder / data), "--block_size", str(block_size), *map(str, more)])


def test_json_of_one_model(folder, tmp_path, capsys):
    run(folder, "--json", tmp_path / "out.json")
    [result] = json.loads((tmp_path / "out.json").read_text())
    assert result["block_size"] == 24
    assert result["blocks"] == DOCUMENTS * DOCUMENT_TOKENS // 24
    assert result["positions"] == 52 * 20
    assert len(result["brier"]) == 4 and result["brier"][0] < 1
    lm = result["brierlm"]
    assert lm["low"] <= lm["value"] <= lm["high"]
    printed = capsys.readouterr().out
    assert f"{lm['value']:.2f}" in printed and "| 24 | 1040 |" in printed


@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    """Processes are started as by torchrun; each evaluates half of the blocks."""
    words = [sys.executable, "-m", "calm_transformers.evaluation.brier_lm", "--model", folder / "ar"]
    words += ["--data", folder / "text.jsonl.xz", "--block_size", "24", "--max_positions", "100"]
    words += ["--json", tmp_path / "two.json"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(words, env=environment, **pipes) for environment in ranks]
    try:
        (printed, errors), (nothing, more_errors) = (worker.communicate(timeout=120) for worker in workers)
    finally:
        for worker in workers:
            worker.kill()
    assert printed.count("| model |") == 1 and nothing == "", errors + more_errors
    run(folder, "--max_positions", 100, "--json", tmp_path / "one.json")
    [two], [one] = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    assert (two["positions"], two["blocks"]) == (one["positions"], one["blocks"]) == (100, 5)
    assert two["brier"][0] == pytest.approx(one["brier"][0], rel=1e-5)  # Brier-1 of an AR model is exact


def test_comparison_of_models_and_plot(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(folder, "--max_positions", 30, model=("calm", "ar"))
    rows = [line for line in capsys.readouterr().out.splitlines() if str(folder) in line]
    assert len(rows) == 2
    assert rows[0].endswith("| 24 | 30 |")  # 12 patches: 10 positions a block, 3 blocks
    assert rows[1].endswith("| 24 | 40 |")  # 20 positions a block, 2 blocks
    assert (tmp_path / "brier_lm.png").read_bytes().startswith(b"\x89PNG")


def loss_of(model, blocks):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(input_ids=blocks, labels=blocks).loss.item()


@pytest.mark.parametrize("name", ["ar", "calm"])
def test_an_adapter_equals_the_merged_model(folder, tmp_path, monkeypatch, name):
    """The adapter is saved as by LoRA training, without configuration and tokenizer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapted = add_lora(load_causal_lm(str(folder / name)), rank=2)
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    blocks = torch.randint(VOCAB_SIZE, (2, 12))
    loaded = load_causal_lm(str(tmp_path / "adapter"))
    base, merged = load_causal_lm(str(folder / name)), adapted.merge_and_unload().eval()
    assert type(loaded) is type(base) and not loaded.training
    losses = [loss_of(model, blocks) for model in (loaded, merged, base)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != pytest.approx(losses[2], rel=1e-2)

    text = folder / "text.jsonl.xz"
    run(tmp_path, "--tokenizer", folder / name, "--json", tmp_path / "out.json", model=("adapter",), data=text)
    [result] = json.loads((tmp_path / "out.json").read_text())
    assert result["model"] == str(tmp_path / "adapter") and result["positions"] > 0


def test_an_adapter_without_a_base_raises(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    error = refusal(capsys, lambda _: run(folder, model=(tmp_path,)))
    assert error.startswith(f"{tmp_path}: is an adapter whose adapter_config.json names no base_model_name_or_path")
    monkeypatch.setattr("calm_transformers.command_line.importlib.util.find_spec", lambda package: None)
    assert "needs peft" in refusal(capsys, lambda _: run(folder, model=(tmp_path,)))


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ((), dict(model=("calm",), block_size=25), "block_size=25: not divisible by the patch size 2"),
        ((), dict(block_size=4), "block_size=4: too short to predict 4 tokens"),
        ((), dict(block_size=65), "supports at most 64 tokens"),
        ((), dict(model=("calm",), block_size=2000), "has 1260 tokens, fewer than one block of 2000"),
        ((), dict(data="no_such_dataset"), "neither a local file nor a reachable Hub dataset"),
        (("--text_column", "body"), {}, 'no string under the key "body"'),
        (("--tokenizer", "/no/where"), {}, "no such folder"),
    ],
)
def test_errors_are_one_sentence(folder, monkeypatch, capsys, more, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert message in refusal(capsys, lambda words: run(folder, *words, **options), *more)


def test_a_tokenizer_of_another_model_raises(folder, tmp_path, capsys):
    tiny_llama(vocab_size=2 * VOCAB_SIZE).save_pretrained(tmp_path)
    error = refusal(capsys, lambda words: run(folder, *words, model=(tmp_path,)), "--tokenizer", folder / "calm")
    assert error.endswith("It is another model's tokenizer.")


@pytest.mark.parametrize("name", ["ar", "calm"])
def test_batch_size_changes_only_the_samples(folder, name):
    """Exact terms don't depend on the batch size; a seed fixes the rest."""
    model = load_causal_lm(str(folder / name))
    blocks = torch.randint(VOCAB_SIZE, (6, 12), generator=torch.Generator().manual_seed(0))
    one, repeated, batched = (brier_counts(model, blocks, batch_size) for batch_size in (1, 1, 4))
    assert one.score() == repeated.score()
    assert one.positions_B.tolist() == batched.positions_B.tolist()
    if name == "ar":
        torch.testing.assert_close(one.accuracy_B4, batched.accuracy_B4)
        torch.testing.assert_close(one.collision_B4[:, 0], batched.collision_B4[:, 0])


def test_ids_outside_the_vocabulary_raise(folder):
    with pytest.raises(ValueError, match="token id 96: outside the model's vocabulary of 96"):
        brier_counts(load_causal_lm(str(folder / "ar")), torch.full((1, 12), VOCAB_SIZE))
