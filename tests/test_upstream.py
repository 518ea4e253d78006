"""All contact with transformers' inner parts is as it was recorded when it was last looked at.

A failure names the contact and what changed: its signature, or who in transformers uses it. Look at the change, mend
the code if it matters, and record anew, with each supported version, by `python tests/upstream_contacts.py`. Another
version than those recorded is compared with the nearest older one: what it names is what there is to check.
"""

import ast
import re

import transformers
import upstream_contacts
from model_copies import ROOT
from packaging.version import Version
from transformers import GenerationMixin, Trainer
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from upstream_contacts import differences, found_contacts, inner_names, overrides, read_records

from calm.generation_calm import CALMGenerationMixin
from calm.modeling_calm import CALMForCausalLM
from calm.upstream_calm import GENERATION_SETTINGS, PatchGenerationMixin


def nearest(versions, installed):
    """The newest recorded version that is not newer than the installed one, else the oldest."""
    older = [version for version in versions if Version(version) <= Version(installed)]
    return max(older, key=Version) if older else min(versions, key=Version)


def test_contacts_are_as_recorded():
    records = read_records()
    version = nearest(records, transformers.__version__)
    changed = differences(records[version], found_contacts())
    headline = f"transformers {transformers.__version__} is not as {version} was recorded:"
    assert not changed, "\n".join([headline, *changed])


def test_both_supported_versions_are_recorded():
    pinned = [
        re.search(r"^transformers==(\S+)", (ROOT / name).read_text(), re.MULTILINE).group(1)
        for name in ("constraints.txt", "constraints-compat.txt")
    ]
    assert sorted(read_records()) == sorted(pinned)


def test_the_nearest_record():
    versions = ["4.57.6", "5.23.0"]
    found = [nearest(versions, installed) for installed in ("4.56.0", "4.57.6", "5.9.1", "5.23.0", "5.24.0")]
    assert found == ["4.57.6", "4.57.6", "4.57.6", "5.23.0", "5.23.0"]


def test_a_change_is_named():
    old = {"signature": "(self, a)", "used by": ["utils.py: generate"]}
    assert differences({"M._hook": old}, {"M._hook": dict(old)}) == []
    assert differences({}, {"M._hook": old}) == ["M._hook: is touched and has no record."]
    assert differences({"M._hook": old}, {}) == ["M._hook: is recorded, and no longer there or no longer touched."]
    new = {"signature": "(self, a, b)", "used by": ["utils.py: prepare"]}
    assert differences({"M._hook": old}, {"M._hook": new}) == [
        "M._hook: its signature was (self, a) and is (self, a, b).",
        "M._hook: no longer used by utils.py: generate.",
        "M._hook: now used by utils.py: prepare.",
    ]


def test_a_new_override_is_found():
    class Other(Trainer):
        _hook_of_our_own = 1

        def _inner_training_loop(self, *args):
            return super()._inner_training_loop(*args)

    assert set(overrides([Other])) == {"Trainer._inner_training_loop"}
    assert "Trainer._inner_training_loop" not in read_records()[nearest(read_records(), transformers.__version__)]


def test_inner_names_that_are_read_are_found():
    ours = "class A:\n    def _own(self):\n        self._set = 1\n        return self._set, self._own(), config._inner"
    assert inner_names([ast.parse(ours)]) == {"_inner"}


def test_uses_in_a_source():
    source = """
import torch
from .utils import helper
MAP = {"sample": "_sample"}
class Mixin:
    def generate(self, a: int, b: int = 2):
        torch._sample()
        self._hook(a)
        return getattr(self, "_asked")
"""
    uses = upstream_contacts.Uses()
    upstream_contacts._Reader("utils.py", uses).visit(ast.parse(source))
    found = {name: uses.places.get(name, set()) for name in ("_sample", "_hook", "_asked", "helper")}
    in_generate = {"utils.py: Mixin.generate"}
    assert found == {"_sample": {"utils.py"}, "_hook": in_generate, "_asked": in_generate, "helper": {"utils.py"}}
    assert uses.signatures == {"utils.py: Mixin.generate": "(self, a, b=2)"}


def test_what_the_known_hooks_are_used_by():
    """Some uses that are sure, so that an index that finds nothing would not pass."""
    found = found_contacts()
    assert "generation/utils.py: GenerationMixin.generate" in found["GenerationMixin._prepare_model_inputs"]["used by"]
    assert "generation/utils.py" in found["GenerationMixin._sample"]["used by"]  # GENERATION_MODES_MAPPING
    assert found["GenerationMixin._validate_model_kwargs"]["signature"] == "(self, model_kwargs)"
    assert found["Trainer._save_checkpoint"]["used by"] and found["_pad_token_tensor"]["used by"]


def test_the_loop_s_file_has_no_inner_parts_of_upstream():
    """Among the hooks of `generate` it has one, which upstream documents."""
    assert set(overrides([CALMGenerationMixin])) == {"GenerationMixin.prepare_inputs_for_generation"}
    assert inner_names([ast.parse((ROOT / "generation_calm.py").read_text())]) == set()
    assert len(overrides([PatchGenerationMixin])) > 10


def test_the_model_is_one_that_generates():
    """transformers 4.57 looks for "GenerationMixin" among the names of the bases, and would add it where it isn't."""
    assert CALMForCausalLM.can_generate() and issubclass(CALMForCausalLM, GenerationMixin)
    assert add_generation_mixin_to_remote_model(CALMForCausalLM) is CALMForCausalLM


def test_the_table_of_settings_has_no_field_that_neither_version_has():
    recorded = {
        name for contacts in read_records().values() for name in contacts["GenerationConfig"]["signature"].split(", ")
    }
    assert set(GENERATION_SETTINGS) == recorded
