"""A run that is killed and started again ends where the uninterrupted one does."""

import random
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from training_helpers import make_workshop, start_training, train

KILLS = 10
STEPS = 90


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def fields_of_run(workshop: dict, folder: Path) -> dict:
    # Everything that carries state: two epochs of data, a learning rate schedule, Adam, noise, the auxiliary loss, the
    # average of the weights.
    own = {"max_steps": STEPS, "save_steps": 1, "auxiliary_weight": 0.5, "seed": 3, "lr_scheduler_type": "cosine"}
    own |= {"ema_decay": 0.9, "head_learning_rate": 3e-3}
    return {**workshop, **own, "eval_strategy": "no", "output_dir": str(folder)}


def test_ten_kills_at_random_moments_do_not_change_the_weights(workshop, tmp_path):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    reference = start_training(log, "calm", **fields_of_run(workshop, whole))
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start_training(log, "calm", **fields_of_run(workshop, killed))
        seen = set(killed.glob("checkpoint-*"))
        deadline = time.monotonic() + 60
        while process.is_alive() and set(killed.glob("checkpoint-*")) <= seen and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))  # of steps of 0.02 to 0.05 seconds, half of them spent on a checkpoint
        assert process.is_alive(), f"the run ended before it was killed: {log.read_text()[-2000:]}"
        process.kill()
        process.join()
    last = start_training(log, "calm", **fields_of_run(workshop, killed))
    last.join(120)
    reference.join(120)
    assert (last.exitcode, reference.exitcode) == (0, 0), log.read_text()[-2000:]
    assert log.read_text().count("resuming from checkpoint") == KILLS

    expected, found = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    start = load_file(killed / f"checkpoint-{STEPS - 1}" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all((expected[key] == found[key]).all() for key in expected)
    assert any((start[key] != found[key]).any() for key in expected)


def test_checkpoint_of_another_model_is_refused(workshop, tmp_path, capsys):
    fields = fields_of_run(workshop, tmp_path) | {"max_steps": 2}
    assert train("calm", **fields) == 0
    assert train("calm", **fields | {"max_steps": 3, "num_hidden_layers": 2, "auxiliary_weight": 0.0}) == 2
    assert "the checkpoint is not of this model: missing ['model.layers.1." in capsys.readouterr().err


def test_never_resuming_refuses_a_folder_with_checkpoints(workshop, tmp_path, capsys):
    fields = fields_of_run(workshop, tmp_path) | {"max_steps": 1}
    assert train("calm", **fields) == 0
    assert train("calm", **fields, resume="never") == 2
    assert "holds checkpoint-1" in capsys.readouterr().err


def test_only_the_last_checkpoints_are_kept(workshop, tmp_path):
    fields = fields_of_run(workshop, tmp_path) | {"max_steps": 12, "save_total_limit": 3}
    assert train("calm", **fields) == 0
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-10", "checkpoint-11", "checkpoint-12"}


def test_a_checkpoint_whose_auxiliary_loss_is_another_is_refused(workshop, tmp_path):
    fields = fields_of_run(workshop, tmp_path) | {"max_steps": 1}
    assert train("calm", **fields) == 0
    path = tmp_path / "checkpoint-1" / "auxiliary.safetensors"
    weights = load_file(path)
    save_file({f"renamed.{key}": value for key, value in weights.items()}, path)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        train("calm", **fields | {"max_steps": 2})
