"""The calibration of `repetition_radius` and the check of lazy decoding against decoding everything."""

import json

import pytest
import torch
from commands import refusal
from tiny import tiny_model

from calm import candidates_calm
from calm.benchmarks import repetitions, workloads
from calm.benchmarks.workloads import Recording
from calm.configuration_calm import CALMConfig


def recording():
    """Two steps of three candidates: first equal at a distance of 3, then equal at 1 and another patch at 0.5."""
    patches = torch.tensor([[[1, 2], [1, 2], [1, 3]], [[4, 4], [4, 4], [4, 5]]])
    latents = torch.tensor([[[0.0], [3.0], [9.0]], [[0.0], [1.0], [0.5]]])
    return Recording(patches, latents)


def test_the_radius_by_hand():
    assert repetitions.calibrated_radius(recording()) == pytest.approx(1.5 * 3)
    distinct = Recording(torch.arange(6).view(1, 3, 2), torch.zeros(1, 3, 1))
    assert repetitions.calibrated_radius(distinct) is None


def test_a_radius_that_is_too_small_is_seen_to_miss(monkeypatch):
    monkeypatch.setattr(workloads, "RECORDED_ROWS", 3)
    monkeypatch.setattr(candidates_calm, "FEW_TOKENS", 0)
    model = repeating()
    recorded = workloads.record_candidates(model, 0.5, 12, steps=3)
    exact = repetitions.compare(model, recorded, 0.5, None)
    assert (exact.steps, exact.candidates, exact.missed, exact.other_choices) == (9, 108, 0, 0)
    assert 108 < exact.tokens_read < 4 * 108
    blind = repetitions.compare(model, recorded, 0.5, 1e-9)
    assert blind.missed > 0 and blind.tokens_read == 4 * 9  # of the chosen patch


def repeating():
    model = tiny_model()
    with torch.no_grad():
        model.head.out_proj.weight.mul_(0.1)
        model.head.out_proj.bias.normal_(generator=torch.Generator().manual_seed(0))
    return workloads._never_stopping(model)


def test_the_command_saves_the_radius(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(workloads, "RECORDED_ROWS", 2)
    repeating().save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    repetitions.main(["--model", str(tmp_path), "--num_candidates", "10", "--steps", "4", "--save"])
    radius = CALMConfig.from_pretrained(tmp_path).repetition_radius
    assert radius > 0
    assert json.loads((tmp_path / "config.json").read_text()) == before | {"repetition_radius": radius}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "screened in int8: 0 of 320 tokens other than the full product's"
    assert lines[-3].startswith("| all steps | – | 80 | ") and lines[-3].endswith(" | 0 | 0 of 8 |")
    assert lines[-2].startswith(f"| second half | {radius:.2f} | 40 | ")


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--num_candidates", "1"], "num_candidates=1 is too few"),
        (["--steps", "1"], "--steps 1"),
        (["--model", "nowhere", "--save"], "there is no nowhere/config.json"),
    ],
)
def test_bad_options_are_refused(options, complaint, capsys):
    assert complaint in refusal(capsys, repetitions.main, *options)
