"""The head's own learning rate, the decay of the auxiliary weight, and how both resume."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import log_of, train

from calm_transformers.training.auxiliary import AUXILIARY_FILE

FIELDS = {"max_steps": 4, "save_steps": 1, "save_total_limit": 4, "eval_strategy": "no", "weight_decay": 1.0}
DECAY = {"auxiliary_weight": 0.5, "auxiliary_decay": 0.75, "head_weight": 0.0}


@pytest.fixture
def run(workshop, tmp_path):
    def run(name, **fields):
        folder = tmp_path / name
        assert train("calm", **{**workshop, **FIELDS, **fields}, output_dir=str(folder)) == 0
        return load_file(folder / "model.safetensors"), [entry for entry in log_of(folder) if "loss" in entry]

    return run


def differing(one: dict, other: dict) -> set[str]:
    return {key.split(".")[0] for key in one if not torch.equal(one[key], other[key])}


def test_the_head_has_its_own_learning_rate(run, tmp_path):
    own = {"auxiliary_weight": 0.5, "learning_rate": 1e-3}
    plain, _ = run("plain", **own)
    same, _ = run("same", **own, head_learning_rate=1e-3)
    assert differing(plain, same) == set()
    still, _ = run("still", **own, head_learning_rate=0.0)
    assert differing(still, load_file(tmp_path / "still" / "checkpoint-1" / "model.safetensors")) == {"model"}
    alone, _ = run("alone", **own | {"learning_rate": 0.0}, head_learning_rate=1e-3)
    assert differing(alone, load_file(tmp_path / "alone" / "checkpoint-1" / "model.safetensors")) == {"head"}


@pytest.mark.parametrize("own", [{"head_learning_rate": 1e-2}, DECAY], ids=["head learning rate", "decay"])
def test_a_resumed_run_ends_like_an_uninterrupted_one_and_the_auxiliary_weight_decays(run, tmp_path, own):
    whole, _ = run("run", **own)
    for step in (2, 3, 4):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    resumed, log = run("run", **own)
    assert differing(whole, resumed) == set() and [entry["step"] for entry in log] == [1, 2, 3, 4]
    if own == DECAY:
        weights = [entry["loss"] / entry["auxiliary_loss"] for entry in log]
        assert weights == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 / 3, 0.0], rel=1e-3)


def test_the_mtp_loss_is_initialised_from_the_checkpoint_in_init_from(run, tmp_path):
    run("before", auxiliary_weight=0.5)
    before = tmp_path / "before" / "checkpoint-4"
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "auxiliary_targets": 2, "head_type": "token_chain"}
    run("after", auxiliary_weight=0.5, autoencoder=None, init_from=str(before), **still)
    one, other = (load_file(folder / AUXILIARY_FILE) for folder in (before, tmp_path / "after" / "checkpoint-4"))
    assert one.keys() == other.keys() and differing(one, other) == set()
