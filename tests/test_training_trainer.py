"""The training loop: exact accumulation, a frozen autoencoder, logs, a clean stop, and an export that loads."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import log_of, losses_of, same_noise_for_every_patch, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.model.heads_calm_energy import EnergyHead
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder
from calm_transformers.training.cost import recipe_cost
from calm_transformers.training.recipe import load_recipe
from calm_transformers.training.speed import Speed
from calm_transformers.training.trainer import CALMTrainer

LAYOUTS = [(4, 1), (1, 4)]
# Plain SGD shows differences of gradients as they are; Adam would amplify those near zero.
PLAIN = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0, "lr_scheduler_type": "constant", "max_steps": 3}


def weights_by_layout(kind, fields, tmp_path) -> list[dict]:
    for rows, steps in LAYOUTS:
        own = {**PLAIN, "per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        assert train(kind, **{**fields, **own}, output_dir=str(tmp_path / f"{rows}x{steps}")) == 0
    return [load_file(tmp_path / f"{rows}x{steps}" / "model.safetensors") for rows, steps in LAYOUTS]


def largest_difference(one: dict, other: dict) -> float:
    return max((one[key] - other[key]).abs().max().item() for key in one)


def test_accumulation_is_exact_for_calm(workshop, tmp_path, monkeypatch):
    same_noise_for_every_patch(monkeypatch)
    fields = {**workshop, "auxiliary_weight": 0.5, "eval_strategy": "no"}
    weights = weights_by_layout("calm", fields, tmp_path)
    assert largest_difference(weights[0], weights[1]) < 1e-6
    one, other = ([entry["auxiliary_loss"] for entry in log_of(tmp_path / name)[:3]] for name in ("4x1", "1x4"))
    assert one == pytest.approx(other, rel=1e-4)
    assert train("calm", **{**fields, **PLAIN, "max_steps": 1}, output_dir=str(tmp_path / "one")) == 0
    assert largest_difference(weights[0], load_file(tmp_path / "one" / "model.safetensors")) > 1e-4


def test_accumulation_is_exact_for_the_autoencoder_and_unequal_labels(workshop, tmp_path, monkeypatch):
    forward = CALMAutoencoder.forward
    monkeypatch.setattr(CALMAutoencoder, "forward", lambda self, *args, **kw: forward(self, *args, noise=0.0, **kw))
    fields = {name: workshop[name] for name in ("train_files", "cache_dir", "tokenizer")}
    fields |= {"ae_dropout": 0.0, "left_fill": 0.7}
    weights = weights_by_layout("autoencoder", fields, tmp_path)
    assert largest_difference(weights[0], weights[1]) < 1e-6


@pytest.fixture(scope="module", params=["energy", "token_chain"])
def trained(request, workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    fields = {**workshop, "head_type": request.param, "sampling_steps": 2, "auxiliary_weight": 0.5, "eval_steps": 2}
    assert train("calm", **fields, output_dir=str(folder)) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.1, 1.9])
def test_the_energy_score_trains_near_both_limits_of_beta(workshop, tmp_path, beta):
    """Initially all samples of the head coincide."""
    fields = {**workshop, "beta": beta, "max_steps": 30, "learning_rate": 3e-3, "eval_strategy": "no"}
    assert train("calm", **fields, output_dir=str(tmp_path)) == 0
    losses = losses_of(tmp_path)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_export_is_a_repository_that_generates_with_the_given_autoencoder(trained, workshop):
    model = AutoModelForCausalLM.from_pretrained(trained, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert "auxiliary.safetensors" not in {path.name for path in trained.iterdir()}
    weights = load_file(trained / "model.safetensors")
    autoencoder = load_file(f"{workshop['autoencoder']}/model.safetensors")
    assert not any("auxiliary" in key for key in weights)
    assert {key for key in weights if key.startswith("autoencoder.")} == {f"autoencoder.{key}" for key in autoencoder}
    assert all(torch.equal(weights[f"autoencoder.{key}"], value) for key, value in autoencoder.items())
    assert model.config.prompt_filler_token_id == 0
    assert (model.generation_config.temperature, model.generation_config.num_candidates) == (0.5, 200)
    assert model.generation_config.sampling_method == "auto"
    inputs = tokenizer("the cat", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=5, num_candidates=4).shape[1] <= inputs["input_ids"].shape[1] + 5


def test_the_log_has_every_metric(trained):
    steps = [entry for entry in log_of(trained) if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    wanted = {"grad_norm", "auxiliary_loss", "brier_1"}
    if "energy" in trained.name:
        wanted |= {"distance_to_target", "distance_between_samples"}
    assert all(wanted <= set(entry) for entry in steps)
    assert ["tokens_per_second" in entry for entry in steps] == [False, True, True, True]  # the first step warms up
    assert all(entry["tokens_per_cpu_second"] > 0 and 0 <= entry["data_wait"] < 1 for entry in steps[1:])
    [flops] = {entry["total_flos"] for entry in log_of(trained) if "total_flos" in entry}
    cost = recipe_cost(load_recipe(str(trained / "recipe.yaml")), CALMConfig.from_pretrained(trained))
    assert flops == 4 * 4 * 32 * sum(cost.train_flops.values())
    assert [entry["step"] for entry in log_of(trained) if "eval_loss" in entry] == [2, 4]


def test_the_autoencoders_log_has_its_two_terms_and_the_posterior(workshop):
    first = log_of(Path(workshop["autoencoder"]))[0]
    assert first["loss"] == pytest.approx(4 * first["reconstruction_loss"] + 1e-3 * first["kl_loss"], rel=1e-3)
    assert 0 < first["kl"] < first["kl_loss"] and 0 < first["posterior_sigma"] < 2
    assert 0 <= first["active_dimensions"] <= 8 and 0 <= first["reconstruction_accuracy"] <= 1


def test_a_nan_loss_raises_with_step_blocks_and_checkpoint(workshop, tmp_path, monkeypatch, capsys):
    loss, factors = EnergyHead.compute_loss, iter([1, 1, 1, 1, float("nan")])  # two calls count the FLOPs
    monkeypatch.setattr(EnergyHead, "compute_loss", lambda self, *args, **kw: loss(self, *args, **kw) * next(factors))
    assert train("calm", **{**workshop, "save_steps": 1}, output_dir=str(tmp_path)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 3 on the blocks [8, 9, 10, 11]: the loss is nan" in message
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-2'}" in message


def test_weights_that_are_not_finite_are_not_saved(workshop, tmp_path, monkeypatch, capsys):
    step = CALMTrainer.training_step

    def step_with_infinite_weight(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        model.model.norm.weight.data[0] = float("inf")
        return loss

    monkeypatch.setattr(CALMTrainer, "training_step", step_with_infinite_weight)
    assert train("calm", **{**workshop, "save_steps": 1, "max_steps": 1}, output_dir=str(tmp_path)) == 2
    assert "the weights are not finite any more, model.norm.weight first" in capsys.readouterr().err
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_missing_or_mismatched_part_is_named(workshop, tmp_path, capsys):
    for fields, message in [
        ({"tokenizer": "runs/nowhere"}, "no such folder (train tokenizer makes one)"),
        ({"autoencoder": "runs/nowhere"}, "no such folder (train autoencoder makes one)"),
        ({"recipe": "transformer-s"}, "the recipe 'transformer-s' is for train ar"),
    ]:
        assert train("calm", **workshop | fields, output_dir=str(tmp_path)) == 2
        assert message in capsys.readouterr().err


def test_mfu_and_memory_of_a_known_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    speed = Speed()
    speed.tokens, speed.data_seconds = 4_000_000, 0.5
    args = SimpleNamespace(device=torch.device("cuda"), bf16=True, fp16=False, world_size=8)
    results = speed.results(args, flops_per_token=7e8)
    assert results["tokens_per_second"] == 8 * 400_000 and results["data_wait"] == 0.05
    assert results["mfu"] == pytest.approx(7e8 * 400_000 / 989e12, abs=1e-4) and results["memory_gib"] == 3
