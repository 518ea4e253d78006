"""Trainer's options: those that leave the trajectory as it is, reporters, and errors before a model is built."""

import copy
import re

import pytest
from commands import refusal
from safetensors.torch import load_file
from training_helpers import RECIPES, losses_of, start_training
from transformers import TrainingArguments

from calm_transformers.loading import load_tokenizer
from calm_transformers.training.recipe import load_recipe
from calm_transformers.training.train import build_model, main
from calm_transformers.training.trainer import prepare_run, set_up


def arguments_of(fields: dict, tmp_path) -> list[str]:
    own = {"recipe": RECIPES / "calm.yaml", "output_dir": tmp_path / "run", **fields}
    return [str(word) for name, value in own.items() for word in (f"--{name}", value)]


@pytest.fixture
def run(workshop, tmp_path):
    """Trains with fixed noise, in its own process as accelerate keeps such options; returns weights and losses."""
    fields = {**workshop, "auxiliary_weight": 0.5, "adam_epsilon": 0.01, "eval_strategy": "no"}

    def run(name, **changes):
        folder, log = tmp_path / name, tmp_path / "log"
        process = start_training(log, "calm", fixed_noise=True, **{**fields, **changes, "output_dir": str(folder)})
        process.join(180)
        assert process.exitcode == 0, log.read_text()[-2000:]
        return load_file(folder / "model.safetensors"), losses_of(folder)

    return run


TOLERANCES = {"gradient_checkpointing": 1e-6, "torch_compile": 1e-4, "bf16": 2e-2, "dataloader_num_workers": 1e-6}


@pytest.mark.slow
@pytest.mark.parametrize("name, tolerance", TOLERANCES.items())
def test_an_option_leaves_the_trajectory(run, name, tolerance):
    plain, plain_losses = run("plain")
    weights, losses = run("option", **{name: 1 if name.startswith("dataloader") else "true"})
    assert losses == pytest.approx(plain_losses, rel=tolerance)
    assert max((weights[key] - plain[key]).abs().max() for key in plain) < max(tolerance, 1e-6)
    assert all(weights[key].dtype == plain[key].dtype for key in plain)


def test_what_trainer_checks_late_raises_without_a_model(workshop, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("calm_transformers.training.train.build_model")
    for words, message in (
        ("--seed -1", "seed=-1: must be an integer from 0"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size=0: must be at least 1"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps=0: must be at least 1"),
        ("--max_steps -1 --num_train_epochs 0", "num_train_epochs=0: must be above 0"),
        ("--learning_rate -1", "optim adamw_torch_fused: Invalid learning rate: -1"),
        ("--optim lomo", "optim lomo: "),
        ("--optim adamw_torch --optim_args 5", "optim adamw_torch: "),
        ("--lr_scheduler_type cosine --lr_scheduler_kwargs {nothing: 1}", "lr_scheduler_type cosine: "),
        ("--report_to nowhere", "report_to ['nowhere']: nowhere is not supported"),
        ("--label_smoothing_factor 0.1", "label_smoothing_factor=0.1: leave it out, this trainer relies on 0.0"),
        ("--resume_from_checkpoint runs/x", "resume_from_checkpoint='runs/x': leave it out"),
        ("--auxiliary_weight .nan", "auxiliary_weight=nan: must be a finite number"),
    ):
        words = [*arguments_of(workshop, tmp_path), *re.findall(r"\{.*?\}|\S+", words)]
        assert message in refusal(capsys, main, "calm", *words)
        assert not (tmp_path / "run").exists()


def test_several_gpus_need_a_process_each(workshop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 8)
    error = refusal(capsys, main, "calm", *arguments_of(workshop, tmp_path))
    assert "8 GPUs: start `torchrun --nproc_per_node 8 -m calm_transformers.training.train …`" in error


def test_errors_that_only_model_or_data_show_are_one_line(workshop, tmp_path, capsys):
    fields = arguments_of(workshop | {"max_steps": 1}, tmp_path)
    for words, message in {
        ("--dataloader_num_workers", "-1"): "num_workers",
        ("--attn_implementation", "nope"): "nope",
        ("--deepspeed", "nope.json"): "deepspeed",
        ("--hidden_act", "nonsense"): "hidden_act='nonsense': must be one of gelu, ",
        ("--autoencoder", workshop["tokenizer"]): "has no autoencoder, its config.json has model_type None",
    }.items():
        assert message in refusal(capsys, main, "calm", *fields, *words)


def test_a_calm_can_provide_the_autoencoder_and_a_run_changes_neither_recipe_nor_arguments(workshop, tmp_path):
    def weights(name, autoencoder):
        own = {"autoencoder": autoencoder, "max_steps": 1, "output_dir": str(tmp_path / name)}
        recipe = load_recipe(str(RECIPES / "calm.yaml"), {**workshop, **own})
        args, tokenizer = set_up(recipe), load_tokenizer(workshop["tokenizer"])
        before = copy.deepcopy(recipe), copy.deepcopy(args.to_dict())
        prepare_run(recipe, args, build_model(recipe, tokenizer), tokenizer, 4).train_and_export()
        assert (recipe, args.to_dict()) == before
        return load_file(tmp_path / name / "model.safetensors")

    one, other = weights("calm", workshop["autoencoder"]), weights("other", str(tmp_path / "calm"))
    assert all((one[key] == other[key]).all() for key in one if key.startswith("autoencoder."))
