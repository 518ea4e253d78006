"""Golden checkpoints in the published layout and outputs of the published implementation, each read once.

They are shared by all tests: don't modify them.
"""

from functools import cache

from calm_transformers.benchmarks.golden import HEAD_TYPES, recorded_model, recorded_tensors, relative_error

__all__ = ["HEAD_TYPES", "golden_model", "golden_tensors", "relative_error"]

golden_model, golden_tensors = cache(recorded_model), cache(recorded_tensors)
