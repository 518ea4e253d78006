"""The `repetition_radius`: measured by a command, tied to the weights, not used at others."""

import errno
import json
import os

import pytest
import torch
from model_copies import ROOT
from tiny import BOS, tiny_model
from torch import nn

from calm import calibrate_radius, candidates_calm, generation_calm
from calm.calibrate_radius import Recording, calibrated_radius, largest_distance, record_candidates
from calm.candidates_calm import trusted_radius, weights_fingerprint
from calm.configuration_calm import CALMConfig
from calm.modeling_calm import CALMForCausalLM

K = 4


def repeating_model():
    """A model whose candidates repeat: their latent vectors hardly depend on the noise."""
    model = tiny_model()
    with torch.no_grad():
        model.head.out_proj.weight.mul_(0.1)
        model.head.out_proj.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


def with_radius(model, radius=2.5):
    model.config.repetition_radius = radius
    model.config.repetition_radius_measured_at = {"weights": weights_fingerprint(model)}
    return model


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that the radius gives, each time anew."""
    seen = []
    monkeypatch.setattr(candidates_calm.logger, "warning_once", seen.append)
    return seen


# Measuring


def recording(last=2.0):
    """Four steps of three candidates: equal ones 3 and 1 apart in the first half, 2 and `last` in the second; others
    are closer."""
    equal_then_other = torch.tensor([[1, 2], [1, 2], [1, 3]])
    latents = [[0.0, 3.0, 9.0], [0.0, 1.0, 0.5], [0.0, 2.0, 1.0], [0.0, last, 1.0]]
    return Recording(equal_then_other.expand(4, -1, -1), torch.tensor(latents)[..., None])


def test_the_radius_by_hand():
    assert largest_distance(recording()) == 3
    assert calibrated_radius(recording()) == pytest.approx(1.5 * 3)
    assert calibrated_radius(recording(last=4.4)) == pytest.approx(1.5 * 3)
    assert calibrated_radius(Recording(torch.arange(12).view(2, 3, 2), torch.zeros(2, 3, 1))) is None
    with pytest.raises(ValueError, match="found 4.6 apart in the second half.* radius of 4.5: take more --steps"):
        calibrated_radius(recording(last=4.6))


def test_distances_of_rounding_errors_alone_make_no_radius():
    """Equal patches have one point, of length 10, but for 1e-3: a hundredth of the length is the radius."""
    points = torch.tensor([[6.0, 8.0], [6.0, 8.0], [0.0, 0.0]]).expand(4, -1, -1).clone()
    points[:, 1] += torch.tensor([6e-4, 8e-4])
    patches = torch.tensor([[1, 2], [1, 2], [1, 3]]).expand(4, -1, -1)
    assert calibrated_radius(Recording(patches, points)) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recording_holds_the_candidates_that_the_texts_were_chosen_from(monkeypatch, dtype):
    model, texts = repeating_model().to(dtype), []
    write = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: texts.append(write(*args, **kwargs)))
    state = torch.random.get_rng_state()
    recorded = record_candidates(model, 0.5, 10, steps=2, num_texts=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert recorded.patches_CNK.shape == (2 * 3, 10, K)
    assert torch.equal(model.autoencoder.decode_tokens(recorded.latents_CNZ), recorded.patches_CNK)
    (text_BL,) = texts
    assert (text_BL[:, 0] == BOS).all()
    written_CK = text_BL[:, 1:].unflatten(1, (2, K)).transpose(0, 1).flatten(0, 1)
    assert (recorded.patches_CNK == written_CK[:, None]).all(-1).any(-1).all()
    assert not model.head._forward_hooks
    assert largest_distance(recorded) > 0


@pytest.fixture
def saved(tmp_path):
    repeating_model().save_pretrained(tmp_path)
    return tmp_path


def run(folder, *options):
    return calibrate_radius.main(["--model", str(folder), "--device", "cpu", "--num_candidates", "10", *options])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_the_command_saves_the_radius_and_what_it_was_measured_at(saved, capsys, dtype):
    before = json.loads((saved / "config.json").read_text())
    assert run(saved, "--steps", "4", "--dtype", dtype, "--save") == 0
    config = CALMConfig.from_pretrained(saved)
    measured_at = {"temperature": 0.5, "num_candidates": 10, "steps": 4}
    measured_at["dtype"] = "float32" if dtype == "auto" else dtype
    measured_at["weights"] = weights_fingerprint(repeating_model())
    assert config.repetition_radius > 0 and config.repetition_radius_measured_at == measured_at
    fields = {name: getattr(config, name) for name in ("repetition_radius", "repetition_radius_measured_at")}
    assert json.loads(capsys.readouterr().out) == fields
    assert json.loads((saved / "config.json").read_text()) == before | fields
    assert [path.name for path in saved.glob("config.json*")] == ["config.json"]
    assert trusted_radius(CALMForCausalLM.from_pretrained(saved)) == config.repetition_radius


def test_without_save_nothing_is_written(saved):
    before = (saved / "config.json").read_text()
    assert run(saved, "--steps", "4") == 0
    assert (saved / "config.json").read_text() == before


@pytest.mark.parametrize(
    "error, code", [(OSError(errno.ENOSPC, "No space left on device"), 2), (KeyboardInterrupt, 130)]
)
def test_what_cannot_be_saved_leaves_config_json_as_it_was(saved, capsys, monkeypatch, error, code):
    def fail(*_):
        raise error

    before = {path: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(os, "replace", fail)
    assert run(saved, "--steps", "4", "--save") == code
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    assert json.loads(printed.out)["repetition_radius"] > 0  # not lost
    assert {path: path.read_bytes() for path in saved.iterdir()} == before


def test_the_radius_of_before_has_no_say(saved, capsys):
    assert run(saved, "--steps", "4") == 0
    first = capsys.readouterr().out
    config = json.loads((saved / "config.json").read_text())
    measured_at = {"weights": weights_fingerprint(repeating_model())}
    fields = {"repetition_radius": 1e-9, "repetition_radius_measured_at": measured_at}
    (saved / "config.json").write_text(json.dumps(config | fields))
    assert run(saved, "--steps", "4") == 0
    assert capsys.readouterr().out == first


def test_without_repetitions_there_is_no_radius(tmp_path, capsys):
    with_radius(tiny_model()).save_pretrained(tmp_path)
    assert run(tmp_path, "--num_candidates", "2", "--steps", "2", "--save") == 0
    assert capsys.readouterr().out.startswith("no candidate came twice")
    config = CALMConfig.from_pretrained(tmp_path)
    assert config.repetition_radius is None and config.repetition_radius_measured_at is None


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--num_candidates", "1"], "num_candidates=1 is too few"),
        (["--steps", "1"], "--steps 1: "),
        (["--model", "nowhere", "--save"], "--save: there is no nowhere/config.json"),
        (["--device", "abacus"], "--device abacus: "),
    ],
)
def test_bad_options_are_refused_in_one_sentence(saved, capsys, options, complaint):
    assert run(saved, *options) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {complaint}") and printed.err.count("\n") == 1 and not printed.out


def test_another_model_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert run(tmp_path) == 2
    assert capsys.readouterr().err == f"error: --model {tmp_path} is no CALM.\n"


# The weights it belongs to


def test_a_radius_measured_at_these_weights_is_used(monkeypatch, warnings):
    model, radii = with_radius(repeating_model()), []
    pool = generation_calm.LazyPool
    monkeypatch.setattr(generation_calm, "LazyPool", lambda *args: radii.append(args[-1]) or pool(*args))
    prompt = torch.tensor([[BOS, 5, 6, 7]])
    model.generate(prompt, do_sample=True, temperature=0.5, max_new_tokens=8, eos_token_id=None)
    assert set(radii) == {2.5} and not warnings


@pytest.mark.parametrize(
    "part", ["model.layers.0.mlp.up_proj", "head.out_proj", "autoencoder.decoder.latent_to_hidden"]
)
def test_a_step_of_training_is_noticed(warnings, part):
    """By a model that has already used its radius, too."""
    model = with_radius(repeating_model())
    assert trusted_radius(model) == 2.5
    weight = model.get_parameter(f"{part}.weight").requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=1e-4)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert trusted_radius(model) is None
    (warning,) = warnings
    assert "`python -m calm.calibrate_radius`" in warning and warning.count(". ") == 0


@pytest.mark.parametrize(
    "changed", [(slice(None), slice(1, None)), (slice(None), slice(0, -1)), (slice(2, None), slice(None))]
)
def test_a_change_of_some_rows_or_columns_is_noticed(changed):
    model = repeating_model()
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.autoencoder.decoder.expand_layer.weight[changed] *= 1.5
    assert weights_fingerprint(model) != before


def test_where_no_draws_are_compared_nothing_is_said(warnings):
    model = with_radius(repeating_model())
    model.config.repetition_radius_measured_at = {"weights": "of others"}
    settings = {"max_new_tokens": 4, "eos_token_id": None, "num_candidates": 4}
    model.generate(torch.tensor([[BOS, 5, 6, 7]]), do_sample=True, temperature=1.0, **settings)
    assert not warnings
    model.generate(torch.tensor([[BOS, 5, 6, 7]]), do_sample=False, **settings)
    assert len(warnings) == 1


def test_the_warning_comes_once(caplog):
    model = with_radius(repeating_model())
    model.config.repetition_radius_measured_at = {"weights": "of others"}
    candidates_calm.logger.warning_once.cache_clear()
    for _ in range(3):
        assert trusted_radius(model) is None
    assert sum("repetition_radius is not used" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("measured_at", [None, {}, {"weights": None}, {"weights": "0123456789abcdef"}])
def test_a_radius_that_does_not_say_of_which_weights_is_not_used(warnings, measured_at):
    model = with_radius(repeating_model())
    model.config.repetition_radius_measured_at = measured_at
    assert trusted_radius(model) is None and len(warnings) == 1


def test_without_a_radius_nothing_is_said(warnings):
    assert trusted_radius(repeating_model()) is None and not warnings


@pytest.mark.parametrize("head_type", ["energy", "flow", "diffusion"])
def test_the_same_weights_have_the_same_fingerprint(tmp_path, head_type):
    model = tiny_model(head_type)
    fingerprint = weights_fingerprint(model)
    assert len(fingerprint) == 16 and fingerprint == weights_fingerprint(model.train())
    model.save_pretrained(tmp_path)
    assert weights_fingerprint(CALMForCausalLM.from_pretrained(tmp_path)) == fingerprint
    assert weights_fingerprint(CALMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)) == fingerprint
    assert weights_fingerprint(tiny_model(head_type, seed=1)) != fingerprint
    decoder, encoder = model.autoencoder.decoder, model.autoencoder.encoder
    decoder.lm_head.weight = nn.Parameter(encoder.embed_tokens.weight.detach().clone())  # no longer tied
    assert weights_fingerprint(model) == fingerprint


@pytest.mark.parametrize("how", ["meta", "int8"])
def test_weights_that_cannot_be_read_have_none(warnings, how):
    model = with_radius(repeating_model())
    layer = model.head.out_proj
    weight = torch.empty_like(layer.weight, device="meta") if how == "meta" else layer.weight.to(torch.int8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert weights_fingerprint(model) is None
    assert trusted_radius(model) is None
    (warning,) = warnings
    assert "quantised or offloaded" in warning and warning.count(". ") == 0


def test_what_a_radius_was_measured_at_goes_with_it():
    assert CALMConfig(repetition_radius_measured_at={"weights": "x"}).repetition_radius_measured_at is None
    with pytest.raises(ValueError, match="repetition_radius_measured_at='x': must be of type dict"):
        CALMConfig(repetition_radius=1.0, repetition_radius_measured_at="x")


def test_the_bundled_model_uses_its_radius(warnings):
    model = CALMForCausalLM.from_pretrained(ROOT)
    assert trusted_radius(model) == model.config.repetition_radius > 0 and not warnings
    assert trusted_radius(model.bfloat16()) == model.config.repetition_radius and not warnings
