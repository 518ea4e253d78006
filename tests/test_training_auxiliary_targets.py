"""Pseudo-targets sampled from the MTP model for the head's loss: their distribution, the loss, and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from tiny import HEAD_TYPES, seeded, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import changed_weights, train

from calm_transformers.model import heads_calm, heads_calm_energy
from calm_transformers.model.heads_calm import PatchTarget
from calm_transformers.training import auxiliary
from calm_transformers.training.auxiliary import AUXILIARY_FILE, ExtraTargets, MultiTokenLoss, WithAuxiliary

K = 3
IDS = torch.randint(3, 90, (2, 24), generator=seeded())


def test_a_pseudo_target_equal_to_the_text_changes_nothing():
    model = tiny_model()
    hidden, own = model(input_ids=IDS).last_hidden_state, IDS.unflatten(1, (-1, 4))[:, 1:].flatten(0, 1)

    def loss(extra=None):
        context, target, _ = model.patch_targets(hidden, IDS)
        if extra is not None:
            target = ExtraTargets(target.tokens, model.autoencoder, extra.expand(3, -1, -1))
        return model.head.loss(context, target, generator=seeded(1)).mean()

    torch.testing.assert_close(loss(own), loss())
    assert (loss(own.flip(0)) - loss()).abs() > 1e-3


def test_the_loss_is_the_head_loss_with_pseudo_targets_plus_the_auxiliary_loss():
    model = tiny_model()
    wrapped = WithAuxiliary(model, weight=0.5, head_weight=2.0, num_targets=3)
    torch.manual_seed(3)
    outputs = wrapped(labels=IDS, input_ids=IDS)
    torch.manual_seed(3)
    hidden = model(input_ids=IDS).last_hidden_state
    context, target, _ = model.patch_targets(hidden, IDS)
    target = ExtraTargets(target.tokens, model.autoencoder, wrapped.auxiliary.sample(context, 3))
    head = model.head.loss(context, target).mean()
    torch.testing.assert_close(outputs.loss, 2.0 * head + 0.5 * wrapped.auxiliary(hidden, IDS))
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapped.parameters() if p.requires_grad)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.numel = max([self.numel, *(x.numel() for x in tensors if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_pseudo_targets_in_chunks(monkeypatch, dtype):
    torch.manual_seed(0)
    vocab_size, hidden, labels = 200, torch.randn(2, 21, 16), torch.randint(200, (2, 21 * K))
    labels[0, 9:15] = -100
    loss = MultiTokenLoss(16, vocab_size, K)

    def gradients(call):
        loss.zero_grad()
        states = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = call(states)
        value.backward()
        return [value, states.grad, *(p.grad for p in loss.parameters())]

    def in_one(states):
        logits = loss.teacher_forced(states[:, :-1], labels[:, K:].clamp(min=0).unflatten(1, (-1, K)))
        return F.cross_entropy(logits.flatten(0, 2).float(), labels[:, K:].flatten(), reduction="sum") / 7

    expected = gradients(in_one)
    monkeypatch.setattr(auxiliary, "LOGITS_CHUNK_SIZE", 7 * vocab_size)
    with Largest() as largest:
        actual = gradients(lambda states: loss(states, labels, num_items_in_batch=7))
        loss.sample(hidden, 7)
    torch.testing.assert_close(actual, expected, **({} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}))
    assert largest.numel <= max(7 * vocab_size, vocab_size * 16, hidden.numel() * K * 2)
    assert 2 * 20 * K * vocab_size > largest.numel  # of all logits


@pytest.mark.slow
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_a_training_step_is_one_graph(head_type):
    """With the MTP loss and pseudo-targets, and a patch that does not count."""
    model = WithAuxiliary(tiny_model(head_type), 1.0, num_targets=3).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = IDS.index_fill(1, torch.tensor(9), -100)
    compiled(input_ids=IDS, labels=labels, num_items_in_batch=40).loss.backward()
    torch.compiler.reset()


@torch.no_grad()
def test_posterior_samples_in_chunks(monkeypatch):
    """Drawn without noise, so that they are the same in chunks of 4 and of all 11 patches."""
    model, generator = tiny_model(), seeded()
    tokens, extra = (torch.randint(3, 90, (*shape, 11, 4), generator=generator) for shape in ((), (3,)))
    context = torch.randn(11, 48, generator=generator)
    noise, sizes = model.head.initial_noise((8, 11), tokens.float(), generator), []
    zeros = lambda shape, *rest: sizes.append(shape[1]) or torch.zeros(shape)  # noqa: E731
    for module in (heads_calm, auxiliary):
        monkeypatch.setattr(module, "standard_normal", zeros)
    for target in (PatchTarget(tokens, model.autoencoder), ExtraTargets(tokens, model.autoencoder, extra)):
        whole = model.head.loss(context, target, noise=noise)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heads_calm_energy, "TARGETS_CHUNK_SIZE", 4)
            torch.testing.assert_close(model.head.loss(context, target, noise=noise), whole)
    assert sizes == 2 * [11, 4, 4, 3]


def test_it_goes_on_from_the_checkpoint_in_init_from(workshop, tmp_path):
    fields = {**workshop, "auxiliary_weight": 0.5, "max_steps": 2, "save_steps": 2, "eval_strategy": "no"}
    assert train("calm", **fields, output_dir=str(tmp_path / "before")) == 0
    before = tmp_path / "before" / "checkpoint-2"
    still = {"learning_rate": 0.0, "auxiliary_targets": 2, "head_type": "token_chain", "autoencoder": None}
    assert train("calm", **fields | still, init_from=str(before), output_dir=str(tmp_path / "after")) == 0
    assert not changed_weights(before, tmp_path / "after" / "checkpoint-2", AUXILIARY_FILE)
