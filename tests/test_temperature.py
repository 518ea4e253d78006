"""Temperature sampling of a real model: patch histograms against those of the published implementation.

The laws of the samplers themselves are in test_samplers.py.
"""

import pytest
import torch
from goldens import golden_model, golden_tensors
from scipy.stats import chi2
from tiny import HEAD_TYPES, tiny_model

from calm_transformers.model.generation_calm_algorithms import first_occurrences
from calm_transformers.model.generation_calm_samplers import PatchSampling

HISTOGRAMS = {"T1": 1.0, "T1_2": 1 / 2, "T1_3": 1 / 3}


def histograms(patches_MK, chunks_CK, recorded_C):
    """Ours and the recorded counts over the patches that either has seen."""
    classes = first_occurrences(torch.cat([chunks_CK, patches_MK])[None])[0]
    size = len(chunks_CK) + len(patches_MK)
    ours = torch.bincount(classes[len(chunks_CK) :], minlength=size)
    theirs = torch.nn.functional.pad(recorded_C, (0, size - len(recorded_C)))
    return ours, theirs


def p_value(one, other, least=10):
    """By chi-square, of two histograms over the same cells, those with few counts put together."""
    big = one + other >= least
    one, other = (torch.cat([h[big], h[~big].sum()[None]]).double() for h in (one, other))
    filled = one + other > 0
    one, other = one[filled], other[filled]
    ratio = (other.sum() / one.sum()).sqrt()
    return chi2.sf(((one * ratio - other / ratio).square() / (one + other)).sum().item(), len(one) - 1)


@torch.no_grad()
def draws(model, hidden, sampling, num_patches, rows_at_once=500, seed=0):
    """Patches (num_patches, K) that a model chooses in one context, on the CPU wherever it is."""
    generator = torch.Generator(model.device).manual_seed(seed)
    context = hidden.to(model.device).expand(rows_at_once, -1)
    chunks = [model.sample_patches(context, sampling, generator).patches for _ in range(num_patches // rows_at_once)]
    return torch.cat(chunks).cpu()


def draw_patches(sampling, num_patches, rows_at_once=500):
    return draws(golden_model("energy"), golden_tensors("energy")["hist.hidden"], sampling, num_patches, rows_at_once)


@pytest.mark.parametrize(
    "name, method, num_patches",
    [
        ("T1", "batch", 20_000),
        ("T1_2", "batch", 500),
        pytest.param("T1_3", "batch", 2_000, marks=pytest.mark.slow),
        ("T1_2", "exact", 500),
        ("T1_2", "adaptive", 1_000),
    ],
)
def test_histograms_agree_with_the_published_ones(name, method, num_patches):
    golden = golden_tensors("energy")
    sampling = PatchSampling(temperature=HISTOGRAMS[name], num_candidates=200, sampling_method=method)
    patches = draw_patches(sampling, num_patches)
    assert p_value(*histograms(patches, golden[f"hist.{name}.chunks"], golden[f"hist.{name}.counts"])) > 1e-3


def test_the_comparison_tells_temperatures_apart():
    golden = golden_tensors("energy")
    patches = draw_patches(PatchSampling(temperature=1 / 3), 500)
    assert p_value(*histograms(patches, golden["hist.T1_2.chunks"], golden["hist.T1_2.counts"])) < 1e-3


def model_of_few_patches(head_type):
    """Patches of 2 of 5 tokens (what has no row of its own ties at zero, and the first of those wins)."""
    model = tiny_model(head_type, patch_size=2)
    with torch.no_grad():
        model.autoencoder.decoder.lm_head.weight[4:] = 0
    return model, torch.randn(1, 48, generator=torch.Generator().manual_seed(1))


def sharpened_by_hand(patches_MK, exponent):
    """What T = 1/n means, from draws at T = 1: of n of them that are all the same, that one."""
    groups_AnK = patches_MK[: len(patches_MK) // exponent * exponent].unflatten(0, (-1, exponent))
    return groups_AnK[(groups_AnK == groups_AnK[:, :1]).all(-1).all(-1), 0]


@pytest.mark.parametrize(
    "head_type, method", [("energy", m) for m in ("batch", "exact")] + [(head, "adaptive") for head in HEAD_TYPES]
)
def test_every_head_s_patches_are_sharpened(head_type, method):
    model, hidden = model_of_few_patches(head_type)
    plain = draws(model, hidden, PatchSampling(temperature=1.0), 10_000, seed=1)
    by_hand = sharpened_by_hand(plain, 2)
    assert len(plain.unique(dim=0)) > 10 and len(by_hand) > 250
    sampling = PatchSampling(temperature=0.5, num_candidates=200, sampling_method=method)
    patches = draws(model, hidden, sampling, 500)
    seen, counts = by_hand.unique(dim=0, return_counts=True)
    assert p_value(*histograms(patches, seen, counts)) > 1e-3
    assert p_value(*histograms(plain[:500], seen, counts)) < 1e-3  # as they would be unsharpened


def test_greedy_takes_the_mode():
    golden = golden_tensors("energy")
    patch = draw_patches(PatchSampling(do_sample=False), 4, rows_at_once=2)
    assert patch.tolist() == [golden["hist.T1.chunks"][golden["hist.T1.counts"].argmax()].tolist()] * 4
