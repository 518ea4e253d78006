"""Temperature sampling of a real model: patch histograms against those of the published implementation.

The laws of the samplers themselves are in test_samplers.py.
"""

import pytest
import torch
from goldens import golden_model, golden_tensors

from calm.generation_calm import PatchSampling
from calm.samplers_calm import group_patches

HISTOGRAMS = {"T1": 1.0, "T1_2": 1 / 2, "T1_3": 1 / 3}


def histograms(patches_MK, chunks_CK, recorded_C):
    """Ours and the recorded counts over the patches that either has seen."""
    group = group_patches(torch.cat([chunks_CK, patches_MK])[None])[0][0]
    size = len(chunks_CK) + len(patches_MK)
    ours = torch.bincount(group[len(chunks_CK) :], minlength=size)
    theirs = torch.nn.functional.pad(recorded_C, (0, size - len(recorded_C)))
    return ours, theirs


def two_sample_chi_square(one, other, least=10):
    """Chi-square of two histograms over the same cells, those with few counts put together; its degrees of freedom."""
    big = one + other >= least
    one, other = (torch.cat([h[big], h[~big].sum()[None]]).double() for h in (one, other))
    filled = one + other > 0
    one, other = one[filled], other[filled]
    ratio = (other.sum() / one.sum()).sqrt()
    return ((one * ratio - other / ratio).square() / (one + other)).sum().item(), len(one) - 1


def p_value(one, other):
    from scipy.stats import chi2

    return chi2.sf(*two_sample_chi_square(one, other))


@torch.no_grad()
def draw_patches(sampling, num_patches, rows_at_once=500):
    model, hidden = golden_model("energy"), golden_tensors("energy")["hist.hidden"]
    generator = torch.Generator().manual_seed(0)
    context = hidden.expand(rows_at_once, -1)
    return torch.cat([model.next_patches(context, sampling, generator) for _ in range(num_patches // rows_at_once)])


@pytest.mark.parametrize(
    "name, method, num_patches",
    [
        ("T1", "batch", 20_000),
        ("T1_2", "batch", 2_000),
        ("T1_3", "batch", 2_000),
        ("T1_2", "exact", 1_000),
        ("T1_2", "adaptive", 2_000),
    ],
)
def test_histograms_agree_with_the_published_ones(name, method, num_patches):
    golden = golden_tensors("energy")
    sampling = PatchSampling(temperature=HISTOGRAMS[name], num_candidates=200, sampling_method=method)
    patches = draw_patches(sampling, num_patches)
    assert p_value(*histograms(patches, golden[f"hist.{name}.chunks"], golden[f"hist.{name}.counts"])) > 1e-3


def test_the_comparison_tells_temperatures_apart():
    golden = golden_tensors("energy")
    patches = draw_patches(PatchSampling(temperature=0.4), 2_000)
    assert p_value(*histograms(patches, golden["hist.T1_2.chunks"], golden["hist.T1_2.counts"])) < 1e-3


def test_greedy_takes_the_mode():
    golden = golden_tensors("energy")
    patch = draw_patches(PatchSampling(do_sample=False), 4, rows_at_once=2)
    assert patch.tolist() == [golden["hist.T1.chunks"][golden["hist.T1.counts"].argmax()].tolist()] * 4
