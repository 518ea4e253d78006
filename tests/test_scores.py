"""The energy score and the clipped KL: values by hand, reference loops in float64, equal samples, memory."""

import itertools
import math

import pytest
import torch

from calm_transformers.benchmarks.meters import PeakMemory
from calm_transformers.model import heads_calm_energy
from calm_transformers.model.heads_calm_energy import energy_score
from calm_transformers.model.modeling_calm_autoencoder import clipped_kl


def energy_score_by_loops(samples_NPZ, targets_SPZ, beta):
    """Computes the definition pair by pair; differentiable by autograd where no pair coincides."""
    samples_PNZ, targets_PSZ = samples_NPZ.transpose(0, 1), targets_SPZ.transpose(0, 1)

    def mean_distance(pairs):
        return torch.stack([(x - y).square().sum() ** (beta / 2) for x, y in pairs]).mean()

    scores = []
    for samples, targets in zip(samples_PNZ, targets_PSZ, strict=True):
        repulsion = mean_distance(itertools.permutations(samples, 2))
        scores.append(repulsion - 2 * mean_distance(itertools.product(samples, targets)))
    return torch.stack(scores)


def value_and_gradient(score, samples, targets, beta):
    samples = samples.clone().requires_grad_(True)
    value = score(samples, targets, beta)
    weights = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view(value.shape)
    return value.detach(), torch.autograd.grad((weights * value).sum(), samples)[0]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("beta, num_samples", [(0.1, 3), (0.5, 2), (1.0, 8), (1.5, 3), (1.9, 2)])
@pytest.mark.parametrize("spread", [1.0, 0.05], ids=["wide posterior", "narrow posterior"])
def test_agrees_with_reference_loops(dtype, tolerance, beta, num_samples, spread):
    generator = torch.Generator().manual_seed(1)
    centre = 3 * torch.randn(1, 5, 16, generator=generator, dtype=torch.float64)
    samples = centre + spread * torch.randn(num_samples, 5, 16, generator=generator, dtype=torch.float64)
    targets = centre + spread * torch.randn(7, 5, 16, generator=generator, dtype=torch.float64)
    expected = value_and_gradient(energy_score_by_loops, samples.to(dtype).double(), targets.to(dtype).double(), beta)
    actual = value_and_gradient(energy_score, samples.to(dtype), targets.to(dtype), beta)
    for got, want in zip(actual, expected, strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


def test_nearly_coinciding_samples_keep_their_gradient():
    """An untrained head: samples within 1e-4 of each other, far from the targets."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(1, 3, 16, generator=generator) + 1e-4 * torch.randn(4, 3, 16, generator=generator)
    targets = torch.randn(5, 3, 16, generator=generator)
    _, expected = value_and_gradient(energy_score_by_loops, samples.double(), targets.double(), 1.0)
    _, actual = value_and_gradient(energy_score, samples, targets, 1.0)
    assert (actual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("beta", [0.01, 1.0, 1.01, 1.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_where_samples_coincide(beta, dtype):
    point = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for samples, targets in [
        (point.expand(5, -1, -1), point.expand(6, -1, -1)),  # all samples and targets equal
        (point.expand(5, -1, -1), torch.randn(6, 4, 8).to(dtype)),  # a collapsed head
        (torch.randn(5, 4, 8).to(dtype), point.expand(6, -1, -1)),  # a posterior of zero width
        (1e-20 * point.expand(5, -1, -1), torch.zeros(6, 4, 8, dtype=dtype)),  # squares underflow
        (1e-18 * point.expand(5, -1, -1) * torch.arange(5)[:, None, None], torch.randn(6, 4, 8).to(dtype)),  # nearly
    ]:
        value, gradient = value_and_gradient(energy_score, samples, targets, beta)
        assert value.isfinite().all() and gradient.isfinite().all()
    value, gradient = value_and_gradient(energy_score, point.expand(5, -1, -1), point.expand(6, -1, -1), beta)
    assert (value == 0).all() and (gradient == 0).all()


def test_chunks_of_patches_do_not_change_the_score(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    samples, targets = torch.randn(4, 3, 11, 6, generator=generator), torch.randn(5, 3, 11, 6, generator=generator)
    whole = value_and_gradient(energy_score, samples, targets, 1.0)
    monkeypatch.setitem(heads_calm_energy.PATCHES_CHUNK_SIZE, "cpu", 4)
    chunked = value_and_gradient(energy_score, samples, targets, 1.0)
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert energy_score(samples[:, :0], targets[:, :0]).shape == (0, 11)


@pytest.mark.slow
def test_never_builds_the_difference_tensor():
    """Peak extra memory of value and gradient at P = 2048, N = 8, S = 100, Z = 128."""
    samples, targets = torch.randn(8, 2048, 128, requires_grad=True), torch.randn(100, 2048, 128)
    with PeakMemory(torch.device("cpu")) as memory:
        energy_score(samples, targets).sum().backward()
    if memory.extra is None:
        pytest.skip("the process's memory can't be read here")
    assert samples.nbytes <= memory.extra < 100 * samples.nbytes / 10  # a tenth of all differences


@pytest.mark.parametrize("targets, message", [((5, 2, 4), "must agree"), ((5, 3, 4), "detach")])
def test_invalid_arguments_raise_an_error(targets, message):
    with pytest.raises(ValueError, match=message):
        energy_score(torch.zeros(2, 3, 4), torch.zeros(targets, requires_grad=message == "detach"), beta=1.0)


def test_clipped_kl_by_hand():
    """KL of N(2, 1) is 2 nats, that of N(0, 1) is 0 and counts as the floor; a dimension there has no gradient."""
    mean = torch.tensor([2.0, 0.0], requires_grad=True)
    kl = clipped_kl(mean, torch.zeros(2), clamp=0.5)
    assert kl.item() == 2.5
    kl.backward()
    assert mean.grad.tolist() == [2.0, 0.0]
    log_std = torch.tensor([math.log(2.0)])
    assert clipped_kl(torch.zeros(1), log_std, 0.0).item() == pytest.approx(0.5 * (4 - 1 - 2 * math.log(2)))
