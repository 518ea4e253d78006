"""The first five steps of each training are as recorded, and small changes of settings change them.

A failure means that training has changed: either by an error, or on purpose, then record again (see trajectories.py).
"""

import json

import pytest
import torch
from trajectories import RECORD, RUNS, SETTINGS, first_steps, workshop

RELATIVE = 2e-5  # ten times the measured effect of other vector instructions
CHANGES = [
    *(("energy", {name: 1.01 * SETTINGS[name]}) for name in ("learning_rate", "weight_decay")),
    *(("energy", change) for change in ({"max_grad_norm": 0.19}, {"data_seed": 2}, {"beta": 1.01})),
    *(("autoencoder", change) for change in ({"latent_dropout": 0.16}, {"kl_weight": 0.101})),
    ("auxiliary", {"auxiliary_weight": 0.505}),
]

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="dropout masks differ without MKL")


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    return workshop(tmp_path_factory.mktemp("workshop"))


def expected_steps(run: str) -> dict:
    recorded = json.loads(RECORD.read_text())[run]
    loss = pytest.approx(recorded["loss"], rel=RELATIVE)
    return {"loss": loss, "grad_norm": pytest.approx(recorded["grad_norm"], rel=RELATIVE)}


@pytest.mark.parametrize("run", RUNS)
def test_the_first_steps_are_as_recorded(run, fields, tmp_path):
    assert first_steps(run, fields, tmp_path) == expected_steps(run)


@pytest.mark.slow
@pytest.mark.parametrize("run, change", CHANGES, ids=str)
def test_a_small_change_of_a_setting_is_detected(run, change, fields, tmp_path):
    """So that the tolerance doesn't hide one."""
    assert first_steps(run, fields, tmp_path, **change) != expected_steps(run)
