"""Temperature sampling of a real model: patch histograms against those of the published implementation.

The distributions of the samplers themselves are in test_samplers.py.
"""

import pytest
import torch
from goldens import golden_model, golden_tensors
from scipy.stats import chi2_contingency
from tiny import HEAD_TYPES, few_tokens, seeded, tiny_model

from calm_transformers.model.generation_calm_algorithms import first_occurrences
from calm_transformers.model.generation_calm_samplers import PatchSampling

HISTOGRAMS = {"T1": 1.0, "T1_2": 1 / 2, "T1_3": 1 / 3}


def histograms(patches_MK, chunks_CK, recorded_C):
    """Returns our and the recorded counts over the patches that either has seen."""
    classes = first_occurrences(torch.cat([chunks_CK, patches_MK])[None])[0]
    size = len(chunks_CK) + len(patches_MK)
    ours = torch.bincount(classes[len(chunks_CK) :], minlength=size)
    theirs = torch.nn.functional.pad(recorded_C, (0, size - len(recorded_C)))
    return ours, theirs


def p_value(one, other, least=10):
    """Returns the chi-square p-value of two histograms over the same cells, those with few counts merged."""
    big = one + other >= least
    table = torch.stack([torch.cat([h[big], h[~big].sum()[None]]) for h in (one, other)])
    return chi2_contingency(table[:, table.any(0)], correction=False).pvalue


@torch.no_grad()
def sample(model, hidden, sampling, num_patches, batch_size=500, seed=0):
    """Returns patches (num_patches, K) that a model samples in one context, on the CPU."""
    generator = torch.Generator(model.device).manual_seed(seed)
    context = hidden.to(model.device).expand(batch_size, -1)
    chunks = [model.sample_patches(context, sampling, generator).patches for _ in range(num_patches // batch_size)]
    return torch.cat(chunks).cpu()


def sample_golden(sampling, num_patches, batch_size=500):
    return sample(golden_model("energy"), golden_tensors("energy")["hist.hidden"], sampling, num_patches, batch_size)


@pytest.mark.parametrize(
    "name, method, num_patches",
    [
        *(("T1", "batch", 20_000), ("T1_2", "batch", 500), ("T1_2", "exact", 500), ("T1_2", "adaptive", 1_000)),
        pytest.param("T1_3", "batch", 2_000, marks=pytest.mark.slow),
    ],
)
def test_histograms_agree_with_the_published_ones(name, method, num_patches):
    golden = golden_tensors("energy")
    sampling = PatchSampling(temperature=HISTOGRAMS[name], num_candidates=200, sampling_method=method)
    patches = sample_golden(sampling, num_patches)
    other = "T1_2" if name == "T1_3" else "T1_3"
    for recorded, agrees in ((name, True), (other, False)):
        value = p_value(*histograms(patches, golden[f"hist.{recorded}.chunks"], golden[f"hist.{recorded}.counts"]))
        assert (value > 1e-3) == agrees


def model_of_few_patches(head_type):
    """Returns a model whose patches are 2 of 5 tokens (rows of zeros tie, and the first of them wins)."""
    model = few_tokens(tiny_model(head_type, patch_size=2), 4)
    if model.head.samples_tokens:
        with torch.no_grad():
            model.head.chain.lm_head.weight.mul_(3)
    return model, torch.randn(1, 48, generator=seeded(1))


def rejection_samples(patches_MK, exponent):
    """Returns samples at T = 1/n from samples at T = 1: of each n that are all equal, that one."""
    groups_AnK = patches_MK[: len(patches_MK) // exponent * exponent].unflatten(0, (-1, exponent))
    return groups_AnK[(groups_AnK == groups_AnK[:, :1]).all(-1).all(-1), 0]


OF_HEADS = [("energy", "batch"), ("energy", "exact"), *((head_type, "adaptive") for head_type in HEAD_TYPES)]


@pytest.mark.parametrize("head_type, method", OF_HEADS)
def test_temperature_of_every_head(head_type, method):
    model, hidden = model_of_few_patches(head_type)
    plain = sample(model, hidden, PatchSampling(temperature=1.0), 10_000, seed=1)
    by_hand = rejection_samples(plain, 2)
    assert len(plain.unique(dim=0)) > 10 and len(by_hand) > 250
    sampling = PatchSampling(temperature=0.5, num_candidates=200, sampling_method=method)
    patches = sample(model, hidden, sampling, 500)
    seen, counts = by_hand.unique(dim=0, return_counts=True)
    assert p_value(*histograms(patches, seen, counts)) > 1e-3
    assert p_value(*histograms(plain[:500], seen, counts)) < 1e-3  # as they are at T = 1


def test_greedy_takes_the_mode():
    golden = golden_tensors("energy")
    patch = sample_golden(PatchSampling(do_sample=False), 4, batch_size=2)
    assert patch.tolist() == [golden["hist.T1.chunks"][golden["hist.T1.counts"].argmax()].tolist()] * 4
