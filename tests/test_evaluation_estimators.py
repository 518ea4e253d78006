"""Both estimators are unbiased: with a language's own model and with another's they agree with the exact Brier-n.

The oracle implements the estimators' protocol (evaluation/branching.py) by exact sampling, so the tests cover
everything that an estimator does around a model: positions, targets, branches, dropped positions, sums.
"""

import numpy as np
import pytest
import torch
from language_oracle import LANGUAGE, OTHER, Oracle, sample_ids
from tiny import seeded

from calm_transformers.evaluation.ar_estimator import brier_counts_ar
from calm_transformers.evaluation.calm_estimator import brier_counts_calm
from calm_transformers.experiments.language import scored_beliefs

BLOCKS, LENGTH = 256, 48


def exact_brier(language, ids_BL, patch_size):
    """Returns 2 P(y) - sum_x P(x)^2 of the true continuations y at the scored positions, (B, M, 4)."""
    beliefs_BMS, symbols_BL = scored_beliefs(language, ids_BL, patch_size), language.to_symbols(ids_BL.numpy())
    starts = np.arange(1, beliefs_BMS.shape[1] + 1) * patch_size
    targets_BM4 = np.stack([symbols_BL[:, starts + i] for i in range(4)], axis=-1)
    accuracy_BM4 = 2 * language.probability(beliefs_BMS, targets_BM4)
    return torch.from_numpy(accuracy_BM4 - language.optimal_brier(beliefs_BMS))


@pytest.mark.parametrize("language", [LANGUAGE, OTHER], ids=["true_model", "wrong_model"])
@pytest.mark.parametrize("patch_size, max_error", [(None, 0.005), *((size, 0.03) for size in (1, 2, 3, 4, 8))])
def test_estimators_are_unbiased(patch_size, max_error, language):
    """Within 3 standard errors over blocks; an autoregressive model's Brier-1 is even exact."""
    ids_BL, oracle = sample_ids(BLOCKS, LENGTH), Oracle(language, patch_size)
    if patch_size is None:
        counts = brier_counts_ar(oracle, ids_BL, seeded(1), chunk=11)
    else:
        counts = brier_counts_calm(oracle, ids_BL, patch_size, seeded(1), chunk=13)
    exact_BM4 = exact_brier(language, ids_BL, patch_size or 1)
    assert counts.positions_B.tolist() == [exact_BM4.shape[1]] * BLOCKS
    estimate_B4 = (counts.accuracy_B4 - counts.collision_B4) / counts.positions_B.unsqueeze(1)
    error_B4 = estimate_B4 - exact_BM4.mean(1)
    standard_error_4 = error_B4.std(0) / BLOCKS**0.5
    assert (error_B4.mean(0).abs() <= 3 * standard_error_4 + 1e-6).all(), (error_B4.mean(0), standard_error_4)
    assert standard_error_4.max() < max_error
    if patch_size is None:
        assert counts.score().brier[0] == pytest.approx(exact_BM4[..., 0].mean().item(), rel=1e-5)
