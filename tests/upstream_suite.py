"""Runs transformers' own tests of a model's classes on CALM's: `make test-upstream`, which fetches them.

docs/inside/upstream_tests.md lists those that can't pass, and why: they must fail, so that the list stays true.
"""

import re
import sys
import types
import unittest
from contextlib import nullcontext
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from model_copies import ROOT
from tiny import VOCAB_SIZE, tiny_config
from transformers import set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from calm_transformers import CALMConfig, CALMForCausalLM, CALMModel

SOURCE = ROOT / ".venv" / f"transformers-{transformers.__version__}"
PAGE = ROOT / "docs" / "inside" / "upstream_tests.md"
LISTED = dict(re.findall(r"(?m)^\| `(test_\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8")))


# What the tests import and the distribution lacks: other tests, left out here, and a few lines about processes. These
# are forked, so that they know the modules made up below.
STUBS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "distributed_testing_utils": {
        "_get_distributed_backend": lambda: "gloo",
        "_get_distributed_device_type": lambda: "cpu",
        "_get_rank_device": lambda rank: torch.device("cpu"),
        "_set_rank_device": lambda rank: None,
        "_start_rank_processes": partial(mp.start_processes, start_method="fork"),
        "run_distributed": None,  # of tensor parallelism, for which CALM has no plan
    },
}
for path, names in ({path.partition(".")[0]: {} for path in STUBS} | STUBS).items():
    module = sys.modules[f"upstream.{path}"] = types.ModuleType(f"upstream.{path}")
    vars(module).update(names, __path__=[])
sys.modules["upstream"] = types.ModuleType("upstream")
sys.modules["upstream"].__path__ = [str(SOURCE / "tests")]

common, fsdp, tensor_parallel, training = (
    import_module(f"upstream.test_{name}")
    for name in ("modeling_common", "fsdp_mixin", "tensor_parallel_mixin", "training_mixin")
)
# The tests look here for classes that take labels, for base models, and for those that are worth several processes.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["calm"], MODEL_MAPPING_NAMES["calm"] = CALMForCausalLM.__name__, CALMModel.__name__
fsdp._get_available_fsdp_workers = lambda: 4  # on two cores, too
fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


# These want a loss without noise that falls to 0, or inputs longer than max_position_embeddings, which counts patches.
BY_TOKEN = ("test_training_overfit", "test_model_outputs", "test_hsdp_grad", "test_model_rope_scaling_from_config")


class CALMModelTester:
    """Returns what the tests ask for: a small configuration, and inputs of 4 patches."""

    causal_lm_class, base_model_class = CALMForCausalLM, CALMModel
    batch_size, encoder_seq_length, is_training = 3, 4, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 48, 2, 4, VOCAB_SIZE

    def __init__(self, head_type, patch_size):
        self.head_type, self.patch_size, self.seq_length = head_type, patch_size, patch_size * self.encoder_seq_length

    def get_config(self):
        return tiny_config(self.head_type, self.patch_size)

    def prepare_config_and_inputs_for_common(self):
        set_seed(0)
        ids = torch.randint(3, VOCAB_SIZE - 1, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class ModelTest(
    common.ModelTesterMixin,
    training.TrainingTesterMixin,
    fsdp.FSDPTesterMixin,
    tensor_parallel.TensorParallelTesterMixin,
    unittest.TestCase,
):
    all_model_classes = CALMModel, CALMForCausalLM
    model_tester = None

    def setUp(self):
        by_token = self._testMethodName.startswith(BY_TOKEN)
        self.model_tester = CALMModelTester("token_chain", 1) if by_token else CALMModelTester("energy", 4)

    def subTest(self, *args, **kwargs):
        """Lets a listed test fail as a whole: pytest counts one whose subtests fail as passed."""
        return nullcontext() if self._testMethodName in LISTED else super().subTest(*args, **kwargs)

    def _get_tiny_config(self):
        return CALMConfig, self.model_tester.get_config().to_diff_dict()  # upstream's changes one vocabulary of two


for name, reason in LISTED.items():
    setattr(ModelTest, name, pytest.mark.xfail(reason=reason, strict=True)(getattr(ModelTest, name)))
