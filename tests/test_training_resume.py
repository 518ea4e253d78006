"""A run that is killed and resumed ends with the weights of an uninterrupted one."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import fresh_process
import pytest
from model_copies import generate_by_batcher
from safetensors.torch import load_file, save_file
from training_helpers import start_training, start_training_together, train, write_corpus

from calm_transformers.command_line import InputError
from calm_transformers.training.recipe import allowed_changes, load_recipe
from calm_transformers.training.trainer import EXIT_PREEMPTED, find_damage, last_checkpoint

KILLS = 10
STEPS = 90


def fields_of_run(workshop: dict, folder: Path) -> dict:
    # Everything with state: two epochs of data, a learning rate schedule, Adam, noise, auxiliary loss.
    own = {"max_steps": STEPS, "save_steps": 1, "auxiliary_weight": 0.5, "seed": 3, "lr_scheduler_type": "cosine"}
    return {**workshop, **own, "eval_strategy": "no", "output_dir": str(folder)}


def complete_checkpoints(folder: Path) -> set[Path]:
    return set(folder.glob("checkpoint-*/trainer_state.json"))


@pytest.mark.slow
def test_ten_kills_at_random_moments_do_not_change_the_weights(workshop, tmp_path):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    reference = start_training(log, "calm", **fields_of_run(workshop, whole))
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start_training(log, "calm", **fields_of_run(workshop, killed))
        seen, deadline = complete_checkpoints(killed), time.monotonic() + 60
        while process.is_alive() and complete_checkpoints(killed) <= seen and time.monotonic() < deadline:
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

    assert same_weights(whole, killed) and not same_weights(killed / f"checkpoint-{STEPS - 1}", killed)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes, num_workers, streams", [(1, 0, 0), (2, 0, 0), (1, 2, 0), (1, 2, 1)])
def test_a_preempted_run_saves_its_step_and_resumes(workshop, tmp_path, num_processes, num_workers, streams):
    """SIGTERM, of two processes to the second one alone, and to the workers that load data."""
    fields, log = fields_of_run(workshop, tmp_path / "run") | {"save_steps": 1000}, tmp_path / "log"
    fields |= {"dataloader_num_workers": num_workers, "max_steps": STEPS * 4, "upload_to": str(tmp_path / "copy")}
    fields |= {"streaming": "true", "left_fill": 0} if streams else {}
    log.touch()
    processes = start_training_together(log, "calm", num_processes=num_processes, **fields)
    deadline = time.monotonic() + 60
    while "'loss'" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    pid = processes[-1].pid
    for each in [*Path(f"/proc/{pid}/task/{pid}/children").read_text().split(), pid]:
        os.kill(int(each), signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == num_processes * [EXIT_PREEMPTED], log.read_text()[-2000:]
    saved = last_checkpoint(tmp_path / "run")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 0 < step < 4 * STEPS and f"SIGTERM: saved step {step}; the same command resumes" in log.read_text()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert find_damage(tmp_path / "copy" / saved.name) is None
    for process in (again := start_training_together(log, "calm", num_processes=num_processes, **fields)):
        process.join(120)
    assert [process.exitcode for process in again] == num_processes * [0], log.read_text()[-2000:]
    assert f"resuming from checkpoint-{step}" in log.read_text()


@pytest.fixture(scope="module")
def run_of_two_steps(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two steps")
    fields = fields_of_run(workshop, folder) | {"max_steps": 2, "per_device_train_batch_size": 4}
    assert train("calm", **fields) == 0
    return fields, folder


@pytest.fixture
def copied_run(run_of_two_steps, tmp_path):
    fields, folder = run_of_two_steps
    copy = shutil.copytree(folder, tmp_path / "run")
    return fields | {"output_dir": str(copy), "max_steps": 3}, copy


def same_weights(one: Path, other: Path) -> bool:
    expected, found = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return expected.keys() == found.keys() and all((expected[key] == found[key]).all() for key in expected)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(copied_run, run_of_two_steps):
    fields, folder = copied_run
    shutil.rmtree(folder / "checkpoint-2")
    assert train("calm", **fields | {"max_steps": 2}) == 0
    assert same_weights(run_of_two_steps[1], folder)
    assert train("calm", **fields, resume="never") == 2


OTHER = {
    **{"seed": 4, "data_seed": 4, "learning_rate": 2e-2, "lr_scheduler_type": "linear", "warmup_steps": 1},
    **{"auxiliary_weight": 0.25, "head_weight": 0.5},
    **{"left_fill": 0.5, "random_phase": False, "block_size": 64, "weight_decay": 0.1, "max_grad_norm": 0.5},
    **{"optim": "sgd", "num_hidden_layers": 2, "beta": 1.5, "batch_size": 8, "tokens": "other"},
}


@pytest.mark.parametrize("name", OTHER)
def test_fixed_fields_must_not_change(name, run_of_two_steps):
    previous = load_recipe(str(run_of_two_steps[1] / "recipe.yaml"))
    overrides = {} if name in previous.run_facts else {name: OTHER[name]}
    now = load_recipe(str(run_of_two_steps[1] / "recipe.yaml"), overrides)
    now.run_facts = previous.run_facts | {name: OTHER[name]} if name in previous.run_facts else previous.run_facts
    with pytest.raises(InputError, match=rf"holds checkpoints of another training \({name} .* -> .*name another"):
        allowed_changes(previous, now)


def test_the_command_does_not_resume_with_another_text(copied_run, tmp_path, capsys):
    fields, folder = copied_run
    assert train("calm", **fields | {"train_files": str(write_corpus(tmp_path / "other.jsonl", seed=1))}) == 2
    error = capsys.readouterr().err
    assert "holds checkpoints of another training (tokens " in error and "name another --output_dir" in error
    assert load_recipe(str(folder / "recipe.yaml")).training["max_steps"] == 2  # unchanged


@pytest.mark.slow
def test_a_checkpoint_carries_its_code(copied_run, tmp_path):
    folder = str(copied_run[1] / "checkpoint-2")
    assert fresh_process.call(generate_by_batcher, tmp_path / "home", folder=folder).result


def test_a_run_resumes_with_more_steps_moved_text_and_other_micro_batches(copied_run, monkeypatch, tmp_path, capsys):
    fields, _ = copied_run
    autoencoder = Path(fields["autoencoder"])
    monkeypatch.chdir(autoencoder.parent)
    changed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 7}
    changed |= {"train_files": shutil.copy(fields["train_files"], tmp_path), "autoencoder": f"./{autoencoder.name}/"}
    assert train("calm", **fields | changed) == 0
    printed = capsys.readouterr().out
    assert "resuming with changed fields: gradient_accumulation_steps 1 -> 2, max_steps 2 -> 3, per_device" in printed
    assert "resuming from checkpoint-2" in printed and f"the model is in {fields['output_dir']}" in printed


def test_a_checkpoint_of_another_step_or_with_a_damaged_or_missing_file_is_skipped(copied_run):
    _, folder = copied_run
    state = folder / "checkpoint-2" / "trainer_state.json"
    needed = {"model.safetensors": "no weights", "optimizer.pt": "no optimizer", "scheduler.pt": "no schedule"}
    for name in [*needed, state.name, "rng_state.pth", "config.json"]:
        content = (state.parent / name).read_bytes()
        for damaged in (content[: len(content) // 2], b"", None):
            (state.parent / name).unlink() if damaged is None else (state.parent / name).write_bytes(damaged)
            wrong = f"has a damaged {name}" if damaged is not None else f"has {needed.get(name)}"
            if damaged is not None or name in needed:
                assert find_damage(state.parent).startswith(wrong) and last_checkpoint(folder).name == "checkpoint-1"
        (state.parent / name).write_bytes(content)
    state.write_text('{"global_step": 1}')
    assert "it is from step 1" in find_damage(state.parent)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(copied_run, capsys):
    fields, folder = copied_run
    state = folder / "checkpoint-2" / "trainer_state.json"
    state.unlink()
    assert train("calm", **fields) == 0
    printed = capsys.readouterr().out
    assert "checkpoint-2 was not finished, and is not used" in printed and "resuming from checkpoint-1" in printed
    assert state.is_file()  # written again


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_every_optimizer_is_resumed(workshop, tmp_path, optim):
    fields = fields_of_run(workshop, tmp_path) | {"optim": optim, "max_steps": 2}
    assert train("calm", **fields) == 0
    assert train("calm", **fields | {"max_steps": 3}) == 0


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"num_hidden_layers": 2, "auxiliary_weight": 0.0}, "doesn't fit this model: missing ['model.layers.1."),
        ({"optim": "adagrad"}, "the optimizer of"),
        ({}, "Unexpected key"),
    ],
)
def test_a_checkpoint_of_another_training_raises_also_without_its_recipe(copied_run, changed, message, capsys):
    fields, folder = copied_run
    (folder / "recipe.yaml").unlink()
    path = folder / "checkpoint-2" / "auxiliary.safetensors"
    if not changed:
        save_file({f"renamed.{key}": value for key, value in load_file(path).items()}, path)
    assert train("calm", **fields | changed) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_optimizer_state_does_not_resume(workshop, tmp_path, capsys):
    fields = fields_of_run(workshop, tmp_path) | {"max_steps": 1, "save_only_model": True}
    assert train("calm", **fields) == 0
    assert train("calm", **fields | {"max_steps": 2}) == 2
    assert "has no optimizer (save_only_model)" in capsys.readouterr().err


def test_the_best_checkpoint_is_kept_and_exported(workshop, tmp_path):
    fields = fields_of_run(workshop, tmp_path)
    fields |= {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    fields |= {"learning_rate": 3.0, "lr_scheduler_type": "constant"}  # worse at each step
    assert train("calm", **fields, load_best_model_at_end=True) == 0
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1"}
    assert same_weights(tmp_path / "checkpoint-1", tmp_path)
