"""The token-flow head: its loss against a loop, its flow where the end is known, a law that it learns."""

import math

import pytest
import torch
from tiny import tiny_model
from torch import nn

from calm.heads_calm import PatchTarget
from calm.token_flow_head_calm import TokenFlowHead

K, V, Z = 4, 96, 16


def loop_loss(head, context, tokens, time, noise):
    """The loss of one patch and one draw, token by token."""
    chain, end = head.chain, sum(head.codes[k, tokens[k]] for k in range(K))
    x = (1 - time) * noise + time * end
    evidence = head.net(x, (time * 1000).long(), context)
    size, given, total = context.shape[-1], torch.zeros_like(context), 0.0
    for k in range(K):
        weight, bias = (p[k * size : (k + 1) * size] for p in (chain.context_proj.weight, chain.context_proj.bias))
        state = weight @ context + bias + evidence[k * size : (k + 1) * size] + given
        logits = chain.lm_head.weight @ chain.norm_out(state + chain.mlp(chain.norm_in(state)))
        log_normaliser = math.log(sum(math.exp(value) for value in logits.tolist()))
        total += log_normaliser - logits[tokens[k]].item()
        if k < K - 1:
            for token, logit in enumerate(logits.tolist()):
                given = given + math.exp(logit - log_normaliser) * chain.embeddings[k].weight[token]
    return total / K


@torch.no_grad()
def test_loss_agrees_with_a_loop():
    head = tiny_model("token_flow").head.double()
    context, tokens = torch.randn(3, 48).double(), torch.randint(V, (3, K))
    time, noise = torch.rand(head.num_samples, 3).double(), torch.randn(head.num_samples, 3, Z).double()
    losses = head.loss(context, PatchTarget(tokens), time=time, noise=noise)
    for row in range(3):
        draws = zip(time[:, row], noise[:, row], strict=True)
        expected = sum(loop_loss(head, context[row], tokens[row], *draw) for draw in draws) / head.num_samples
        assert losses[row].item() == pytest.approx(expected, rel=1e-6)  # time features are float32


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@torch.no_grad()
def test_a_net_that_is_certain_leads_to_the_sum_of_its_tokens_codes(num_steps):
    """The path to a fixed point is straight, and the midpoint rule has no error on it, however many steps."""
    head, tokens = tiny_model("token_flow", sampling_steps=num_steps).head, torch.tensor([5, 9, 1, 7])

    def certain(state):
        probabilities = nn.functional.one_hot(tokens, V).float().expand(*state.shape[:-1], V)
        return probabilities.log(), probabilities

    head.chain.probabilities = certain
    drawn = head.sample(torch.randn(2, 48), num_samples=3)
    expected = head.codes[torch.arange(K), tokens].sum(0).expand(3, 2, Z)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@torch.no_grad()
def test_a_draw_is_a_mean_of_tokens_points(num_steps):
    """Where the net changes its mind in the last step, the midpoint rule alone would end beyond the tokens' points."""
    head = tiny_model("token_flow", sampling_steps=num_steps).head
    head.codes.copy_(nn.functional.one_hot(torch.arange(V) % Z, Z).float().expand(K, V, Z))
    for layer in (head.net.out_proj, head.net.out_modulation):
        nn.init.normal_(layer.weight)
    drawn = head.sample(torch.randn(50, 48), num_samples=20)  # its Z values are then the probabilities of Z groups
    torch.testing.assert_close(drawn.sum(-1), torch.full((20, 50), float(K)), rtol=1e-4, atol=1e-4)
    assert (drawn >= 0).all()


@torch.no_grad()
def test_velocity_is_finite_at_the_end():
    head = tiny_model("token_flow").head
    assert head.velocity(torch.randn(3, 2, Z), torch.ones(3, 2), torch.randn(2, 48)).isfinite().all()


def test_it_learns_which_tokens_go_together():
    """Patches are ABCD or EFGH, three to one. Token by token that allows 16 patches; the head must draw those two."""
    torch.manual_seed(0)
    model = tiny_model("token_flow", num_samples=4, sampling_steps=24)  # few steps would favour the likelier patch
    head = TokenFlowHead(model.config)
    head.apply(model._init_weights)
    head.codes.copy_(torch.randn(K, V, Z, generator=torch.Generator().manual_seed(1)))
    patches, context = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]]), torch.randn(1, 48)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(120):
        which = (torch.rand(64) < 0.25).long()
        loss = head.loss(context.expand(64, -1), PatchTarget(patches[which])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = head.sample(context, num_samples=1000)[:, 0]
    ends = head.codes[torch.arange(K), patches].sum(1)
    distance = torch.cdist(drawn, ends)
    assert (distance.amin(-1) < 1).float().mean() > 0.97  # the two are some 11 apart
    assert (distance.argmin(-1) == 1).float().mean() == pytest.approx(0.25, abs=0.06)


def test_further_patches_are_targets_in_turn():
    head, generator = tiny_model("token_flow").head, torch.Generator().manual_seed(0)
    context, tokens = torch.randn(5, 48, generator=generator), torch.randint(V, (3, 5, K), generator=generator)
    draws = {"time": torch.rand(3, 5, generator=generator), "noise": torch.randn(3, 5, Z, generator=generator)}
    head.num_samples = 3
    loss = head.loss(context, PatchTarget(tokens[0], further=tokens[1:]), **draws)
    head.num_samples = 1
    alone = [
        head.loss(context, PatchTarget(tokens[n]), **{name: draw[n : n + 1] for name, draw in draws.items()})
        for n in range(3)
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean(0))


def test_the_posterior_is_not_asked_for(monkeypatch):
    model, ids = tiny_model("token_flow"), torch.randint(3, 90, (2, 24))
    monkeypatch.setattr(model.autoencoder, "encode", lambda *_: pytest.fail("the encoder has nothing to add"))
    loss = model(ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss
    context = model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    tokens = ids.view(2, -1, K)[:, 1:].flatten(0, 1)
    expected = model.head.loss(context, PatchTarget(tokens), generator=torch.Generator().manual_seed(0)).mean()
    torch.testing.assert_close(loss, expected)
