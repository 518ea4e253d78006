"""Trainer's options that must change neither the law nor the log: precision, checkpointing, compilation, reporters."""

import json
import re

import pytest
from commands import refusal
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_helpers import RECIPES, start_training, train

from calm_transformers.training.train import main


@pytest.fixture
def run(workshop, tmp_path):
    """Trains with fixed draws, in a process of its own, for accelerate keeps such options; weights and losses."""
    fields = {**workshop, "auxiliary_weight": 0.5, "adam_epsilon": 0.01, "eval_strategy": "no"}

    def run(name, **changes):
        folder, log = tmp_path / name, tmp_path / "log"
        process = start_training(log, "calm", fixed_draws=True, **{**fields, **changes, "output_dir": str(folder)})
        process.join(180)
        assert process.exitcode == 0, log.read_text()[-2000:]
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return load_file(folder / "model.safetensors"), [entry["loss"] for entry in history if "loss" in entry]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({"gradient_checkpointing": "true"}, 1e-6),
        ({"torch_compile": "true", "torch_compile_backend": "aot_eager"}, 1e-5),
        ({"bf16": "true"}, 2e-2),
        ({"dataloader_num_workers": 1}, 1e-6),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_option_leaves_the_trajectory(run, options, tolerance):
    plain, plain_losses = run("plain")
    weights, losses = run("option", **options)
    assert losses == pytest.approx(plain_losses, rel=tolerance)
    assert max((weights[key] - plain[key]).abs().max() for key in plain) < max(tolerance, 1e-6)
    assert all(weights[key].dtype == plain[key].dtype for key in plain)


def test_tensorboard_gets_every_logged_figure(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))  # transformers 5
    fields = {key: value for key, value in workshop.items() if key != "autoencoder"}
    fields |= {"report_to": "tensorboard", "max_steps": 3, "eval_steps": 3, "output_dir": str(tmp_path)}
    assert train("autoencoder", **fields) == 0
    (events,) = tmp_path.rglob("events.out.tfevents*")
    board = EventAccumulator(str(events.parent)).Reload()
    names = "loss grad_norm reconstruction_loss kl_loss kl posterior_sigma active_dimensions reconstruction_accuracy"
    assert {f"train/{name}" for name in f"{names} tokens_per_second learning_rate".split()} <= set(
        board.Tags()["scalars"]
    )
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3]
    assert [event.step for event in board.Scalars("eval/loss")] == [3]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--seed -1", "seed=-1: must be a whole number from 0"),
        ("--data_seed 4294967296", "data_seed=4294967296: must be"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size=0: must be at least 1"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps=0: must be at least 1"),
        ("--max_steps -1 --num_train_epochs 0", "num_train_epochs=0: must be above 0"),
        ("--max_steps -1 --num_train_epochs .inf", "num_train_epochs=inf: must be above 0"),
        ("--learning_rate -1", "optim adamw_torch_fused: Invalid learning rate: -1"),
        ("--optim lomo", "optim lomo: "),
        ("--optim adamw_torch --optim_args 5", "optim adamw_torch: "),
        ("--lr_scheduler_type cosine --lr_scheduler_kwargs {nothing: 1}", "lr_scheduler_type cosine: "),
        ("--report_to nowhere", "report_to ['nowhere']: nowhere is not supported"),
        ("--label_smoothing_factor 0.1", "label_smoothing_factor=0.1: leave it out, training here relies on 0.0"),
        ("--resume_from_checkpoint runs/x", "resume_from_checkpoint='runs/x': leave it out"),
        ("--auxiliary_weight .nan", "auxiliary_weight=nan: must be a finite number"),
    ],
)
def test_what_trainer_would_stumble_over_later_is_refused_before_a_model_is_made(
    words, message, workshop, tmp_path, capsys, monkeypatch
):
    monkeypatch.delattr("calm_transformers.training.train.make_model")
    fields = [word for name, value in workshop.items() for word in (f"--{name}", value)]
    recipe = ["--recipe", str(RECIPES / "calm.yaml"), "--output_dir", str(tmp_path / "run")]
    assert message in refusal(capsys, main, "calm", *recipe, *fields, *re.findall(r"\{.*?\}|\S+", words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--dataloader_num_workers -1", "num_workers"),
        ("--attn_implementation nope", "nope"),
        ("--deepspeed nope.json", "deepspeed"),
        ("--autoencoder TOKENIZER", "holds none, its config.json has model_type None"),
        ("--autoencoder nowhere/at/all", "no such folder"),
    ],
)
def test_what_only_the_model_or_the_data_show_is_one_line_too(words, message, workshop, tmp_path, capsys):
    fields = [word for name, value in workshop.items() for word in (f"--{name}", value)]
    recipe = ["--recipe", str(RECIPES / "calm.yaml"), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    words = words.replace("TOKENIZER", workshop["tokenizer"]).split()
    assert message in refusal(capsys, main, "calm", *recipe, *fields, *words)


def test_the_autoencoder_of_a_calm_will_do(workshop, tmp_path):
    calm = str(tmp_path / "calm")
    assert train("calm", **workshop, max_steps=1, output_dir=calm) == 0
    assert train("calm", **workshop | {"autoencoder": calm}, max_steps=1, output_dir=str(tmp_path / "other")) == 0
    same = [load_file(tmp_path / name / "model.safetensors") for name in ("calm", "other")]
    assert all((same[0][key] == same[1][key]).all() for key in same[0] if key.startswith("autoencoder."))
