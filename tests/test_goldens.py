"""The published implementation's recorded outputs, tensor by tensor: float32 to 1e-5, bfloat16 to 2e-2.

Every tensor of the three golden files is used by a test here, but the histograms (test_temperature.py), `brier.*`
(test_brier.py), and the Brier scores of the forward pass with their noise, which follow from what is tested here and
there; `test_every_golden_tensor_is_used` checks that.
"""

import copy

import pytest
import torch
from goldens import HEAD_TYPES, golden_model, golden_tensors, relative_error

from calm_transformers.model.heads_calm import PatchTarget
from calm_transformers.model.heads_calm_energy import energy_score
from calm_transformers.model.heads_calm_flow_diffusion import DiffusionSchedule
from calm_transformers.model.modeling_calm_autoencoder import clipped_kl

USED = set()


class Golden:
    """Golden tensors that record which of them were used."""

    def __init__(self, head_type):
        self.head_type, self.tensors = head_type, golden_tensors(head_type)

    def __getitem__(self, name):
        USED.add((self.head_type, name))
        return self.tensors[name]


@pytest.fixture(params=HEAD_TYPES)
def golden(request):
    return Golden(request.param)


def model_in(dtype, head_type):
    model = golden_model(head_type)
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)


def assert_reproduces(actual, expected, dtype=torch.float32, tolerance=1e-5):
    assert relative_error(actual, expected) <= (tolerance if dtype == torch.float32 else 2e-2)


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@both_dtypes
@torch.no_grad()
def test_autoencoder(golden, dtype):
    autoencoder = model_in(dtype, golden.head_type).autoencoder
    mean, log_std = autoencoder.encoder(golden["input_ids"])
    assert_reproduces(mean, golden["ae.mean"], dtype)
    assert_reproduces(log_std, golden["ae.log_std"], dtype)
    logits = autoencoder.decoder(golden["ae.latents"].to(dtype)).flatten(1, 2)
    assert_reproduces(logits, golden["ae.logits"], dtype)


@both_dtypes
@torch.no_grad()
def test_autoencoder_losses(golden, dtype):
    autoencoder = model_in(dtype, golden.head_type).autoencoder
    ids = golden["input_ids"]
    output = autoencoder(ids, labels=ids, noise=golden["ae.eval_eps"].view(2, 6, 16).to(dtype))
    assert_reproduces(output.reconstruction_loss, golden["ae.eval_loss"], dtype)
    assert_reproduces(output.kl_loss, golden["ae.kl_loss"], dtype)
    assert_reproduces(clipped_kl(golden["ae.mean"], golden["ae.log_std"], 0.5).mean(), golden["ae.kl_loss"])
    patch_size, kl_weight = 4, 1e-3
    assert_reproduces(output.loss, patch_size * golden["ae.eval_loss"] + kl_weight * golden["ae.kl_loss"], dtype)


@both_dtypes
@torch.no_grad()
def test_backbone(golden, dtype):
    model = model_in(dtype, golden.head_type).model
    patches = model.embed_patches(model.embed_tokens(golden["input_ids"]))
    assert_reproduces(patches, golden["calm.patch_embeds"], dtype)
    assert_reproduces(model(golden["input_ids"]).last_hidden_state, golden["calm.hidden_states"], dtype)


@both_dtypes
@torch.no_grad()
def test_samples(golden, dtype):
    if golden.head_type == "energy":
        noise = {"noise": golden["head.uniform"] - 0.5}
    else:
        start = golden["head.x0" if golden.head_type == "flow" else "head.x_T"]
        noise = {"noise": start.view(1, 2, 6, 16)}
    if golden.head_type == "diffusion":
        noise["step_noise"] = golden["head.step_noise"].view(100, 1, 2, 6, 16)
    noise = {argument: value.to(dtype) for argument, value in noise.items()}
    latents = model_in(dtype, golden.head_type).head.sample(golden["calm.hidden_states"].to(dtype), **noise)
    tolerance = 5e-5 if golden.head_type == "diffusion" else 1e-5
    assert_reproduces(latents.squeeze(0), golden["head.latents"], dtype, tolerance)


@torch.no_grad()
def test_energy_score():
    golden = Golden("energy")
    targets = golden["energy.mean"] + golden["energy.log_std"].exp() * golden["energy.eps"]
    assert_reproduces(energy_score(golden["energy.x"], targets, beta=1.0), golden["energy.score"])


@both_dtypes
@pytest.mark.parametrize("head_type", ["flow", "diffusion"])
@torch.no_grad()
def test_nets(head_type, dtype):
    golden = Golden(head_type)
    head = model_in(dtype, head_type).head
    net = head.velocity if head_type == "flow" else head.net  # of times in [0, 1), or 0 … 999
    output = net(golden["net.x"].to(dtype), golden["net.t"], golden["net.c"].to(dtype))
    assert_reproduces(output, golden["net.out"], dtype)


@both_dtypes
@pytest.mark.parametrize("head_type", ["flow", "diffusion"])
@torch.no_grad()
def test_per_patch_losses(head_type, dtype):
    """A posterior of zero width makes the recorded target the one that the head samples."""
    golden = Golden(head_type)
    target = golden["loss.target"].view(10, 16).to(dtype)
    start = golden["loss.x0" if head_type == "flow" else "loss.noise"].to(dtype)
    losses = model_in(dtype, head_type).head.loss(
        golden["calm.hidden_states"][:, :-1].reshape(10, -1).to(dtype),
        PatchTarget(posterior=(target, torch.full_like(target, -torch.inf))),
        posterior_noise=torch.zeros_like(target)[None],
        time=golden["loss.t"][None],
        noise=start[None],
    )
    assert_reproduces(losses, golden["loss.value"], dtype)


def test_diffusion_schedule():
    golden = Golden("diffusion")
    schedule = DiffusionSchedule(100, torch.device("cpu"))
    assert torch.equal(schedule.timesteps, golden["diffusion.timestep_map"])
    assert relative_error(schedule.alphas_cumprod, golden["diffusion.alphas_cumprod"]) < 1e-14


@both_dtypes
@torch.no_grad()
def test_forward_loss(golden, dtype):
    model = model_in(dtype, golden.head_type)
    ids = golden["input_ids"]
    if golden.head_type == "energy":
        inputs = {
            "noise": golden["forward.draw0.uniform"].to(dtype) - 0.5,
            "posterior_noise": golden["forward.draw1.normal"].to(dtype),
        }
    else:
        time = golden["forward.draw1.uniform" if golden.head_type == "flow" else "forward.draw1.int"]
        inputs = {
            "posterior_noise": golden["forward.draw0.normal"].to(dtype),
            "time": time.view(8, 10),
            "noise": golden["forward.draw2.normal"].view(8, 10, 16).to(dtype),
        }
    loss = model.patch_loss(model(ids).last_hidden_state, ids, **inputs)
    assert_reproduces(loss, golden["forward.loss"], dtype)


def test_every_golden_tensor_is_used(request):
    names = {(head_type, name) for head_type in HEAD_TYPES for name in golden_tensors(head_type)}
    prefixes = ("hist.", "brier.", "forward.brier", "forward.draw3")
    elsewhere = {(head_type, name) for head_type, name in names if name.startswith(prefixes)}
    if len(request.session.items) < 10 or request.config.option.keyword or USED == set():
        pytest.skip("needs the whole file to have run")
    assert names - USED - elsewhere == set()
