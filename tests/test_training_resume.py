"""A run that is killed and started again ends where the uninterrupted one does."""

import random
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from training_helpers import start_training, train, write_corpus

from calm_transformers.training.recipe import load_recipe

KILLS = 10
STEPS = 90


def fields_of_run(workshop: dict, folder: Path) -> dict:
    # Everything that carries state: two epochs of data, a learning rate schedule, Adam, noise, the auxiliary loss, the
    # average of the weights.
    own = {"max_steps": STEPS, "save_steps": 1, "auxiliary_weight": 0.5, "seed": 3, "lr_scheduler_type": "cosine"}
    own |= {"ema_decay": 0.9, "head_learning_rate": 3e-3}
    return {**workshop, **own, "eval_strategy": "no", "output_dir": str(folder)}


def complete_ones(folder: Path) -> set[Path]:
    return set(folder.glob("checkpoint-*/trainer_state.json"))


@pytest.mark.slow
def test_ten_kills_at_random_moments_do_not_change_the_weights(workshop, tmp_path):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    reference = start_training(log, "calm", **fields_of_run(workshop, whole))
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start_training(log, "calm", **fields_of_run(workshop, killed))
        seen, deadline = complete_ones(killed), time.monotonic() + 60
        while process.is_alive() and complete_ones(killed) <= seen and time.monotonic() < deadline:
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
    (tmp_path / "recipe.yaml").unlink()  # which would tell before
    assert train("calm", **fields | {"max_steps": 3, "num_hidden_layers": 2, "auxiliary_weight": 0.0}) == 2
    assert "the checkpoint is not of this model: missing ['model.layers.1." in capsys.readouterr().err


def test_a_run_that_is_cut_ends_where_the_whole_one_does(copied_run):
    fields, folder = copied_run
    expected = load_file(folder / "model.safetensors")
    shutil.rmtree(folder / "checkpoint-2")
    assert train("calm", **fields | {"max_steps": 2}) == 0
    found = load_file(folder / "model.safetensors")
    assert all((expected[key] == found[key]).all() for key in expected)
    assert train("calm", **fields, resume="never") == 2


OTHER = {
    "learning_rate": 2e-2,
    "batch_size": 8,
    "optim": "sgd",
    "num_hidden_layers": 2,
    "ema_decay": 0.0,
    "tokens": None,
}


@pytest.fixture(scope="module")
def run_of_two_steps(workshop, tmp_path_factory):
    """Its fields, without the folder, and the folder to be copied."""
    folder = tmp_path_factory.mktemp("two steps")
    fields = fields_of_run(workshop, folder) | {"max_steps": 2, "per_device_train_batch_size": 4}
    assert train("calm", **fields) == 0
    return fields, folder


@pytest.fixture
def copied_run(run_of_two_steps, tmp_path):
    fields, folder = run_of_two_steps
    copy = shutil.copytree(folder, tmp_path / "run")
    return fields | {"output_dir": str(copy), "max_steps": 3}, copy


@pytest.mark.parametrize("name", OTHER)
def test_a_run_does_not_go_on_as_another(copied_run, name, tmp_path, capsys):
    fields, folder = copied_run
    another = {"per_device_train_batch_size": 8} if name == "batch_size" else {name: OTHER[name]}
    if name == "tokens":
        another = {"train_files": str(write_corpus(tmp_path / "other.jsonl", seed=1))}
    assert train("calm", **fields | another) == 2
    error = capsys.readouterr().err
    assert f"holds checkpoints of another training ({name} " in error and "name another --output_dir" in error
    assert load_recipe(str(folder / "recipe.yaml")).training["max_steps"] == 2  # it is as it was


def test_a_run_goes_on_longer_with_the_same_text_elsewhere_in_other_pieces(copied_run, tmp_path, capsys):
    fields, _ = copied_run
    moved = shutil.copy(fields["train_files"], tmp_path / "moved.jsonl")
    pieces = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 7}
    assert train("calm", **fields | pieces | {"train_files": moved}) == 0
    printed = capsys.readouterr().out
    assert "going on with gradient_accumulation_steps 1 -> 2, max_steps 2 -> 3, per_device" in printed
    assert "resuming from checkpoint-2" in printed and f"the model is in {fields['output_dir']}" in printed


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "all"])
def test_the_checkpoint_before_a_damaged_one_is_used(copied_run, name, capsys):
    fields, folder = copied_run
    last = folder / "checkpoint-2"
    if name == "all":
        shutil.rmtree(last)
        last.mkdir()
    else:
        content = (last / name).read_bytes()
        (last / name).write_bytes(content[: len(content) // 2])
    assert train("calm", **fields) == 0
    printed = capsys.readouterr().out
    wrong = "was not finished" if name == "all" else f"has a damaged {name}"
    assert f"checkpoint-2 {wrong}" in printed and "resuming from checkpoint-1" in printed
    assert (folder / "checkpoint-2" / "trainer_state.json").is_file()  # written again


@pytest.mark.parametrize(
    "name, content, wrong",
    [
        ("model.safetensors", None, "has no weights"),
        ("optimizer.pt", None, "has no optimizer"),
        ("trainer_state.json", '{"global_step": 1}', "has a damaged trainer_state.json (it is of step 1)"),
        ("config.json", "{", "has a damaged config.json"),
    ],
)
def test_the_checkpoint_before_one_that_lacks_something_is_used(copied_run, name, content, wrong, capsys):
    fields, folder = copied_run
    file = folder / "checkpoint-2" / name
    file.unlink() if content is None else file.write_text(content)
    assert train("calm", **fields) == 0
    printed = capsys.readouterr().out
    assert f"checkpoint-2 {wrong}" in printed and "resuming from checkpoint-1" in printed


def test_the_same_folder_by_another_name_is_no_other_training(copied_run, monkeypatch):
    fields, _ = copied_run
    autoencoder = Path(fields["autoencoder"])
    monkeypatch.chdir(autoencoder.parent)
    assert train("calm", **fields | {"autoencoder": f"./{autoencoder.name}/"}) == 0


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_every_optimizer_is_resumed(workshop, tmp_path, optim):
    fields = fields_of_run(workshop, tmp_path) | {"optim": optim, "max_steps": 2}
    assert train("calm", **fields) == 0
    assert train("calm", **fields | {"max_steps": 3}) == 0


def test_the_state_of_another_optimizer_is_refused(copied_run, capsys):
    fields, folder = copied_run
    (folder / "recipe.yaml").unlink()
    assert train("calm", **fields | {"optim": "adagrad"}) == 2
    assert "the optimizer of" in capsys.readouterr().err


def test_what_has_no_optimizer_does_not_go_on(workshop, tmp_path, capsys):
    fields = fields_of_run(workshop, tmp_path) | {"max_steps": 1, "save_only_model": True}
    assert train("calm", **fields) == 0
    assert train("calm", **fields | {"max_steps": 2}) == 2
    assert "has no optimizer (save_only_model)" in capsys.readouterr().err


def test_the_best_checkpoint_is_kept_and_exported(workshop, tmp_path):
    fields = fields_of_run(workshop, tmp_path) | {"ema_decay": 0.0}
    fields |= {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    fields |= {"learning_rate": 3.0, "head_learning_rate": 3.0, "lr_scheduler_type": "constant"}  # worse at each step
    assert train("calm", **fields, load_best_model_at_end=True) == 0
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1"}
    best, exported = (load_file(folder / "model.safetensors") for folder in (tmp_path / "checkpoint-1", tmp_path))
    assert best.keys() == exported.keys() and all((best[name] == exported[name]).all() for name in best)


def test_a_checkpoint_whose_auxiliary_loss_is_another_is_refused(workshop, tmp_path, capsys):
    fields = fields_of_run(workshop, tmp_path) | {"max_steps": 1}
    assert train("calm", **fields) == 0
    path = tmp_path / "checkpoint-1" / "auxiliary.safetensors"
    weights = load_file(path)
    save_file({f"renamed.{key}": value for key, value in weights.items()}, path)
    assert train("calm", **fields | {"max_steps": 2}) == 2
    assert "checkpoint-1 can't be loaded: " in (error := capsys.readouterr().err) and "Unexpected key" in error
