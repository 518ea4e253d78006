"""Temperature distillation: what the teachers sample, the condition, the training, and `generate` at a distilled T."""

import pytest
import torch
from safetensors.torch import load_file
from test_rejection import SIGNIFICANCE, V, enumerate_patches, hidden_state, model_of_chain, numbers_of, p_value
from tiny import record_calls, seeded, tiny_model
from training_helpers import train
from transformers import AutoModelForCausalLM

from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.training.distil_temperature import ChainTeacher, HeadTeacher, TemperatureDistillation, resample

IDS = torch.tensor([[3, 4, 5, 6]])


def distilled_model(head_type="energy", **overrides):
    return tiny_model(head_type, distilled_temperature=0.25, **overrides)


@torch.no_grad()
def test_a_token_chain_teaches_each_position_its_temperature():
    """The samples of both rows against their enumerated distributions, and against each other's."""
    torch.manual_seed(0)
    model, temperatures = model_of_chain(2), torch.tensor([0.5, 0.8])
    contexts = torch.randn(2, 48, generator=seeded(3))
    many = 2000
    tokens = ChainTeacher(model.head.chain)(contexts.repeat(many, 1), temperatures.repeat(many), 1)[0]
    targets = [enumerate_patches(model.head, contexts[i, None], temperatures[i].item()) for i in range(2)]
    for row, other in ((0, 1), (1, 0)):
        assert p_value(tokens[row::2], targets[row]) > SIGNIFICANCE
        assert p_value(tokens[row::2], targets[other]) < SIGNIFICANCE


@torch.no_grad()
def test_a_head_teaches_by_the_batch_rule():
    """Closer to P^(1/T) than P is, whose samples it weighs."""
    torch.manual_seed(0)
    model, context = model_of_chain(2), hidden_state()
    teacher = HeadTeacher(model.head, model.autoencoder)
    tokens = teacher(context.expand(500, -1), torch.full((500,), 0.4), 4).flatten(0, 1)
    target, untempered = (enumerate_patches(model.head, context, each) for each in (0.4, 1.0))
    frequency = torch.bincount(numbers_of(tokens), minlength=V**2) / len(tokens)
    distance, distance_at_1 = ((p - target).abs().sum() / 2 for p in (frequency, untempered))
    assert distance < 0.4 * distance_at_1


def test_targets_are_drawn_by_weight_with_replacement():
    tokens, weights = torch.arange(12).view(3, 2, 2), torch.tensor([[0.0, 0.5], [1.0, 0.0], [0.0, 0.5]])
    drawn = resample(tokens, weights, 50)
    assert drawn.shape == (50, 2, 2) and (drawn[:, 0] == tokens[1, 0]).all()
    assert {tuple(patch.tolist()) for patch in drawn[:, 1]} == {(2, 3), (10, 11)}


@pytest.mark.parametrize("head_type", ["energy", "flow", "diffusion"])
def test_the_temperature_is_a_condition_that_vanishes_at_1(head_type):
    plain, distilled = tiny_model(head_type).head, distilled_model(head_type).head
    distilled.load_state_dict(plain.state_dict(), strict=False)
    context = torch.randn(3, 48)

    def sample(head, temperature):
        return head.sample(context, 5, seeded(), temperature=temperature)

    assert torch.equal(sample(distilled, 1.0), sample(plain, 1.0))
    assert not torch.equal(sample(distilled, 0.5), sample(plain, 1.0))
    one_by_one = sample(distilled, torch.tensor([0.5, 0.5, 0.5]))
    torch.testing.assert_close(one_by_one, sample(distilled, 0.5))


@pytest.mark.parametrize(
    "options, num_samples, temperature",
    [
        ({"temperature": 0.5}, 1, 0.5),
        ({"temperature": 0.25, "sampling_method": "distilled"}, 1, 0.25),
        ({"temperature": 1.0}, 1, 1.0),
        ({"temperature": 0.5, "top_k": 5}, 40, 0.5),
        ({"temperature": 0.2}, None, 0.25),
        ({"temperature": 1.5}, 40, 1.0),
        ({"temperature": 0.5, "sampling_method": "batch"}, 40, 1.0),
        ({"do_sample": False}, 40, 0.25),
    ],
)
def test_generate_asks_the_head_for_few_samples_at_its_temperature(monkeypatch, options, num_samples, temperature):
    model = distilled_model()
    calls = record_calls(
        monkeypatch, model.head, "sample", lambda _, context, num, *, temperature, **__: (num, temperature)
    )
    settings = {"do_sample": True, "num_candidates": 40, "max_new_tokens": 4, "eos_token_id": None, **options}
    model.generate(IDS, **settings)
    assert {call[1] for call in calls} == {temperature}
    assert num_samples is None or [call[0] for call in calls] == [num_samples]


def test_a_temperature_out_of_range_raises_before_any_work():
    for model, range_ in ((distilled_model(), "from 0.25 to 1"), (tiny_model(), "1 alone")):
        message = f"sampling_method='distilled': T=0.2, but the head samples at T {range_}"
        with pytest.raises(ValueError, match=message):
            model.generate(IDS, do_sample=True, temperature=0.2, sampling_method="distilled", max_new_tokens=4)


def test_only_the_head_is_trained_at_a_temperature_for_each_patch():
    model = distilled_model()
    seen = []

    class Teacher(torch.nn.Module):
        def forward(self, context, temperature, num_targets):
            seen.append((len(context), temperature))
            return torch.randint(3, 90, (num_targets, len(context), 4))

    wrapped, ids = TemperatureDistillation(model, Teacher(), 8).train(), torch.randint(3, 90, (2, 24))
    wrapped(input_ids=ids, labels=ids).loss.backward()
    ((num_contexts, temperatures),) = seen
    assert num_contexts == 2 * 5 and len(temperatures) == 10
    assert temperatures.min() >= 0.25 and temperatures.max() <= 1 and len(temperatures.unique()) == 10
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"head"}


@pytest.mark.parametrize("auxiliary, teacher", [("0", "its head"), ("1", "the MTP loss")])
def test_a_training_resumes_and_its_model_samples_in_one_draw(workshop, tmp_path, capsys, auxiliary, teacher):
    """From a model whose checkpoint has the MTP loss, and from one without."""
    options = {**workshop, "save_steps": 2, "eval_strategy": "no", "lr_scheduler_type": "constant"}

    def weights(name, steps, **fields):
        assert train("calm", **options, **fields, max_steps=steps, output_dir=str(tmp_path / name)) == 0
        return load_file(tmp_path / name / "model.safetensors")

    before = weights("model", 2, auxiliary_weight=auxiliary)
    fields = {"recipe": "distil-temperature", "init_from": str(tmp_path / "model"), "block_size": 16, "num_samples": 4}
    options = {name: value for name, value in options.items() if name not in ("autoencoder", "tokenizer")}
    whole = weights("whole", 4, **fields)
    assert f"the teacher is {teacher}, of {tmp_path / 'model'}" in capsys.readouterr().out
    weights("parts", 2, **fields)
    resumed = weights("parts", 4, **fields)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], whole[name])}
    assert changed == {"head"} and not any(name.startswith("teacher") for name in whole)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert isinstance(model, CALMForCausalLM) and model.config.distilled_temperature == 0.25
    assert model.patch_sampling(do_sample=True, temperature=0.5).takes_single_sample


def test_a_dry_run_counts_the_teacher(workshop, tmp_path, capsys):
    """100 samples of the head for each target patch; the backbone is not trained."""
    assert train("calm", **workshop, max_steps=1, output_dir=str(tmp_path / "model")) == 0
    capsys.readouterr()

    def flops(**fields):
        assert train("calm", **fields, init_from=str(tmp_path / "model"), block_size=32, dry_run=[]) == 0
        rows = [line.rsplit(maxsplit=4) for line in capsys.readouterr().out.splitlines() if line.endswith("generated")]
        return {row[0].strip(): (float(row[1]), float(row[3])) for row in rows}

    plain, distilled = flops(), flops(recipe="distil-temperature")
    sampled = plain["head"][1] + plain["autoencoder"][1]
    assert distilled["teacher"][0] == pytest.approx(100 * sampled, rel=0.02)
    assert distilled["backbone"][0] == pytest.approx(plain["backbone"][0] / 3, rel=0.02)


def test_recipes_that_make_no_sense_raise(workshop, capsys, tmp_path):
    fields, chain, energy = {**workshop, "output_dir": str(tmp_path / "run")}, tmp_path / "chain", tmp_path / "energy"
    for folder, head_type in ((chain, "token_chain"), (energy, "energy")):
        assert train("calm", **workshop, head_type=head_type, max_steps=1, output_dir=folder) == 0
    distil, autoencoder = {"distil_temperature": 0.25}, workshop["autoencoder"]
    every_temperature = "head_type=token_chain: samples at every temperature"
    for options, message in (
        (distil, "distil_temperature=0.25: needs init_from"),
        ({**distil, "init_from": autoencoder, "auxiliary_weight": 1}, "alone"),
        ({**distil, "init_from": chain, "head_type": "token_chain"}, every_temperature),
        ({**distil, "init_from": energy, "num_mlp_layers": 3}, "has other layers: keep them"),
        ({"distilled_temperature": 1.5}, "distilled_temperature=1.5: must lie in (0, 1)"),
    ):
        assert train("calm", **fields | options) == 2
        assert message in capsys.readouterr().err
