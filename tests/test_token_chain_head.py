"""The autoregressive patch head: its loss and probabilities against a loop and the MTP loss, its samples."""

import math

import pytest
import torch
from enumerable_distributions import chi_square_p_value
from tiny import seeded, tiny_model

from calm_transformers.model.heads_calm import PatchTarget
from calm_transformers.training.auxiliary import ExtraTargets, MultiTokenLoss

K, V = 4, 96
SIGNIFICANCE = 1e-4


@torch.no_grad()
def log_probability(head, context, tokens):
    """Returns the log-probability of one patch, token by token, in nats."""
    chain, size, given, total = head.chain, context.shape[-1], torch.zeros_like(context), 0.0
    for k, token in enumerate(tokens):
        weight, bias = (p[k * size : (k + 1) * size] for p in (chain.context_proj.weight, chain.context_proj.bias))
        state = weight @ context + bias + given
        logits = chain.lm_head.weight @ chain.norm_out(state + chain.mlp(chain.norm_in(state)))
        total += logits[token].item() - math.log(sum(math.exp(value) for value in logits.tolist()))
        if k < len(tokens) - 1:
            given = given + chain.embeddings[k].weight[token]
    return total


@torch.no_grad()
def test_loss_agrees_with_a_loop():
    head = tiny_model("token_chain").head.double()
    context, tokens = torch.randn(3, 48).double(), torch.randint(V, (3, 3, K))
    expected = [[-log_probability(head, context[row], patch[row]) / K for row in range(3)] for patch in tokens]
    torch.testing.assert_close(head.loss(context, PatchTarget(tokens[0])), torch.tensor(expected[0]))
    with_extra = head.loss(context, ExtraTargets(tokens[0], None, tokens[1:]))
    torch.testing.assert_close(with_extra, torch.tensor(expected).mean(0))
    of_tokens = head.token_logits(context.expand(3, 3, 48), tokens).log_softmax(-1).gather(-1, tokens[..., None])
    torch.testing.assert_close(of_tokens.mean((-1, -2)), -torch.tensor(expected).double(), rtol=0, atol=1e-6)


def test_the_model_s_loss_is_the_mtp_loss():
    """So a backbone trained with one can be trained further with the other; the encoder is not called."""
    model, ids = tiny_model("token_chain"), torch.randint(3, 90, (2, 24))
    auxiliary = MultiTokenLoss(48, V, K)
    auxiliary.load_state_dict(model.head.chain.state_dict())
    model.autoencoder.encode = lambda *_: pytest.fail("the encoder has nothing to add")
    outputs = model(ids, labels=ids)
    torch.testing.assert_close(outputs.loss, auxiliary(outputs.last_hidden_state, ids))


@pytest.mark.transformers
@torch.no_grad()
def test_logits_of_a_text_of_any_length_are_those_of_its_patches():
    """The first token ends a patch, as in generation; a text's own logits don't depend on what follows it."""
    model, ids = tiny_model("token_chain", prompt_filler_token_id=5), torch.randint(3, 90, (2, 10))
    logits = model(ids).logits
    assert logits.shape == (2, 10, V) and model(ids)["logits"].equal(logits)
    for row in range(2):
        patches = torch.cat([torch.tensor([5, 5, 5]), ids[row]])[:12].view(3, K)
        found = logits[row].log_softmax(-1)[torch.arange(9), ids[row, 1:]]
        for p in (1, 2):
            hidden = model(patches[:p].view(1, -1)).last_hidden_state[0, -1]
            expected = log_probability(model.head, hidden, patches[p])
            assert found[K * p - K : K * p].sum().item() == pytest.approx(expected, abs=1e-4)
    for length in range(1, 10):
        torch.testing.assert_close(model(ids[:, :length]).logits, logits[:, :length], rtol=1e-4, atol=1e-4)
    for options in ({"labels": ids[:, :8]}, {"attention_mask": torch.ones(2, 8)}):
        with pytest.raises(AttributeError, match="CALM has no logits"):
            _ = model(ids[:, :8], **options).logits


@torch.no_grad()
def test_samples_follow_the_head_s_distribution():
    """All V² patches: chi-square against their enumerated probabilities, and against those of another context.

    Twice, since noise of one row, as recorded for it, is shared by both contexts.
    """
    sizes = {"vocab_size": 24, "pad_token_id": 0, "autoencoder_config": {"vocab_size": 24}}
    head = tiny_model("token_chain", patch_size=2, **sizes).head.double()
    head.chain.lm_head.weight.mul_(0.3)
    contexts = torch.randn(2, 48, generator=seeded(3)).double()
    patches = [(first, second) for first in range(24) for second in range(24)]
    probs_BV = torch.tensor([[log_probability(head, c, patch) for patch in patches] for c in contexts]).double().exp()
    for shared in ({}, head.predrawn_noise(20000, 1, contexts, seeded())):
        samples = head.sample(contexts, num_samples=20000, generator=seeded(), **shared)
        numbers = samples[..., 0] * 24 + samples[..., 1]
        assert chi_square_p_value(numbers[:, 0], probs_BV[0]) > SIGNIFICANCE
        assert chi_square_p_value(numbers[:, 1], probs_BV[1]) > SIGNIFICANCE
        assert chi_square_p_value(numbers[:, 0], probs_BV[1]) < 1e-6


@torch.no_grad()
def test_a_token_of_zero_probability_is_never_sampled():
    head = tiny_model("token_chain").head
    logits_V = torch.full((V,), -math.inf).index_fill(0, torch.tensor(7), 0)
    head.chain.logits = lambda state: logits_V.expand(*state.shape[:-1], V)
    noise = torch.tensor([0.0, 1e-30, 0.5, 1 - 2**-24])[:, None].expand(4, K)
    assert (head.sample(torch.randn(48), noise=noise) == 7).all()


def test_noise_keeps_its_precision_in_bfloat16():
    head = tiny_model("token_chain").head.bfloat16()
    noise = head.initial_noise((1000,), torch.zeros(1, dtype=torch.bfloat16), seeded())
    assert noise.dtype == torch.float32 and len(noise.unique()) > 3990
