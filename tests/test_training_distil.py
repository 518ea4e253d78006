"""A Llama is distilled into the MTP loss of a CALM, and is neither trained nor saved with it."""

import pytest
import torch
import torch.nn.functional as F
from llama_workshop import NUM_KNOWN, refusal
from safetensors.torch import load_file
from training_helpers import train
from transformers import LlamaForCausalLM

from calm_transformers.training.auxiliary import MultiTokenLoss
from calm_transformers.training.distil import SoftTargets, Teacher

K = 4


@pytest.fixture(scope="module")
def workshop(workshop_of_one_more_token):
    return workshop_of_one_more_token


@pytest.mark.parametrize("num_items, weight", [(None, 0.3), (40, 1.0)])
def test_a_teacher_that_predicts_the_text_changes_nothing(num_items, weight):
    torch.manual_seed(0)
    loss, hidden, labels = MultiTokenLoss(16, 12, K), torch.randn(2, 5, 16), torch.randint(10, (2, 5 * K))
    labels[:, :K] = labels[1, -3:] = -100
    truth = F.one_hot(labels.unflatten(1, (-1, K))[:, 1:].clamp(min=0), 12).float()
    plain = loss(hidden, labels, num_items)
    assert torch.allclose(loss(hidden, labels, num_items, SoftTargets(truth, weight)), plain)


def test_the_loss_is_the_mean_of_two_cross_entropies_by_loops():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    probabilities = torch.rand(3, 10, generator=generator, dtype=torch.float64)
    labels = torch.tensor([4, -100, 11])  # the last one is unknown to the teacher
    losses = SoftTargets(probabilities, 0.25).cross_entropy(logits, labels)
    log_q = logits.log_softmax(-1)
    soft = -sum(probabilities[0, v] * log_q[0, v] for v in range(10))
    expected = [-0.75 * log_q[0, 4] + 0.25 * soft, losses.new_zeros(()), -log_q[2, 11]]
    assert torch.allclose(losses, torch.stack(expected))


def test_soft_targets_are_the_llamas_probabilities_given_the_true_prefix(llama):
    before = LlamaForCausalLM.from_pretrained(llama).train()
    ids = torch.randint(NUM_KNOWN, (2, 3 * K))
    expected = Teacher(before, NUM_KNOWN + 1, K, 0.5).soft_targets(ids).probabilities
    assert expected.shape == (2, 2, K, NUM_KNOWN)
    assert not expected.requires_grad and not before.training
    for p in range(2):
        for k in range(K):
            logits = before(ids[:, : (p + 1) * K + k]).logits[:, -1]
            assert torch.allclose(expected[:, p, k], logits.softmax(-1), atol=1e-6)


def test_tokens_unknown_to_the_teacher_are_masked(llama):
    teacher = Teacher(LlamaForCausalLM.from_pretrained(llama), NUM_KNOWN + 1, K, 1.0)
    ids = torch.randint(NUM_KNOWN, (1, 3 * K))
    filled = torch.cat([torch.full((1, 2), NUM_KNOWN), ids[:, :-2]], dim=1)
    shifted = teacher.soft_targets(filled).probabilities.flatten(1, 2)
    plain = teacher.soft_targets(ids).probabilities.flatten(1, 2)
    assert torch.allclose(shifted[:, 2:], plain[:, :-2], atol=1e-6)
    assert torch.isfinite(shifted).all()
    fewer = Teacher(teacher.llama, NUM_KNOWN - 5, K, 1.0).soft_targets(ids.clamp(max=290)).probabilities
    assert fewer.shape[-1] == NUM_KNOWN - 5
    assert torch.allclose(fewer.sum(-1), torch.ones(()))


def test_distillation_trains_accumulates_and_resumes(workshop, llama, tmp_path):
    """Two micro-batches of two rows and one of four are the same step, without the head, whose loss is random."""
    fields = {**workshop, "distil": llama, "distil_weight": 0.5, "auxiliary_weight": 1.0, "head_weight": 0.0}
    fields |= {"eval_strategy": "no", "save_steps": 2, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    fields |= {"adam_epsilon": 0.01}

    def weights(name, steps=4, **changes):
        assert train("calm", **fields | changes, max_steps=steps, output_dir=str(tmp_path / name)) == 0
        return load_file(tmp_path / name / "model.safetensors")

    whole = weights("whole")
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": "true"}
    accumulated = weights("accumulated", **halves)
    weights("parts", steps=2)
    resumed = weights("parts")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert all(torch.allclose(whole[key], accumulated[key], atol=1e-6) for key in whole)
    changed = weights("changed", distil_weight=1.0)
    assert not all(torch.equal(whole[key], changed[key]) for key in whole)
    # The teacher is neither trained nor saved.
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / "auxiliary.safetensors")
    assert saved.keys() == {f"auxiliary.{name}" for name in MultiTokenLoss(32, NUM_KNOWN + 1, K).state_dict()}


def test_a_dry_run_counts_the_teacher_whose_positions_must_suffice(workshop, llama, tmp_path, capsys):
    assert train("calm", **workshop, distil=llama, auxiliary_weight=0.5, dry_run=[]) == 0
    lines = capsys.readouterr().out.splitlines()
    (flops,) = [float(line.split()[1]) for line in lines if line.startswith("  teacher") and "trained" in line]
    before = LlamaForCausalLM.from_pretrained(llama)
    linear = sum(m.weight.numel() for m in before.modules() if isinstance(m, torch.nn.Linear))
    assert flops == pytest.approx(2 * linear + 2 * 4 * 32 * 32, rel=0.01)  # attention over 32 tokens, 2 layers of 32
    fields = {**workshop, "auxiliary_weight": 0.5, "distil": llama, "output_dir": str(tmp_path / "run")}
    message = f"distil {llama}: max_position_embeddings=64 is less than block_size=128."
    assert message in refusal(capsys, **fields, block_size=128)
