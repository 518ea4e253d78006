"""The check of lazy decoding against decoding everything."""

import pytest
import torch
from commands import refusal
from tiny import tiny_model

from calm import calibrate_radius, candidates_calm
from calm.benchmarks import repetitions
from calm.calibrate_radius import record_candidates
from calm.candidates_calm import weights_fingerprint


def repeating():
    model = tiny_model()
    with torch.no_grad():
        model.head.out_proj.weight.mul_(0.1)
        model.head.out_proj.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


def test_a_radius_that_is_too_small_is_seen_to_miss(monkeypatch):
    monkeypatch.setattr(candidates_calm, "FEW_TOKENS", 0)
    model = repeating()
    recorded = record_candidates(model, 0.5, 12, steps=3, num_texts=3)
    exact = repetitions.compare(model, recorded, 0.5, None)
    assert (exact.steps, exact.candidates, exact.missed, exact.other_choices) == (9, 108, 0, 0)
    assert 108 < exact.tokens_read < 4 * 108
    blind = repetitions.compare(model, recorded, 0.5, 1e-9)
    assert blind.missed > 0 and blind.tokens_read == 4 * 9  # of the chosen patch


@pytest.mark.parametrize("radius", [None, 100.0])
def test_the_command_compares_without_the_radius_and_with_it(tmp_path, capsys, radius):
    model = repeating()
    model.config.repetition_radius = radius
    model.config.repetition_radius_measured_at = {"weights": weights_fingerprint(model)}
    model.save_pretrained(tmp_path)
    assert repetitions.main(["--model", str(tmp_path), "--num_candidates", "10", "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    num_candidates = 2 * calibrate_radius.NUM_TEXTS * 10
    assert lines[-1] == f"screened in int8: 0 of {4 * num_candidates} tokens other than the full product's"
    rows = [line for line in lines if f" {num_candidates} " in line and line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| –", "| 100.00"][: 1 + (radius is not None)]
    assert all(row.endswith(" | 0 | 0 of 16 |") for row in rows)


@pytest.mark.parametrize(
    "options, complaint",
    [(["--num_candidates", "1"], "num_candidates=1 is too few"), (["--steps", "0"], "--steps: 0")],
)
def test_bad_options_are_refused(options, complaint, capsys):
    assert complaint in refusal(capsys, repetitions.main, *options)
