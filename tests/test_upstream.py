"""All contact with transformers' inner parts is as it was recorded when it was last looked at.

A failure names the contact and what changed: its signature, or who in transformers uses it. Look at the change, mend
the code if it matters, and record anew, with each supported version, by `python tests/upstream_contacts.py`. Another
version than those recorded is compared with the nearest older one: what it names is what there is to check.
"""

import ast
import re

import pytest
import transformers
from model_copies import ROOT
from packaging.version import Version
from transformers import GenerationMixin
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils import logging
from upstream_contacts import differences, found_contacts, inner_names, overrides, read_records

from calm_transformers.model.configuration_calm import TRANSFORMERS, check_transformers
from calm_transformers.model.generation_calm import CALMGenerationMixin
from calm_transformers.model.generation_calm_upstream import CACHE_ARGUMENT, GENERATION_SETTINGS, PatchGenerationMixin
from calm_transformers.model.modeling_calm import CALMForCausalLM

pytestmark = pytest.mark.transformers

RANGE = re.compile(r"transformers>=[\d.]+,<[\d.]+")


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
    """transformers looks for "GenerationMixin" among the names of the bases, and would add it where it isn't."""
    assert CALMForCausalLM.can_generate() and issubclass(CALMForCausalLM, GenerationMixin)
    assert add_generation_mixin_to_remote_model(CALMForCausalLM) is CALMForCausalLM


def test_the_table_of_settings_has_no_field_that_neither_version_has():
    recorded = {
        name for contacts in read_records().values() for name in contacts["GenerationConfig"]["signature"].split(", ")
    }
    assert recorded == GENERATION_SETTINGS


def test_the_range_ends_where_the_tests_end_and_is_the_same_wherever_it_is_stated():
    oldest, newest = sorted(map(Version, read_records()))
    assert f"transformers>={oldest.major}.{oldest.minor},<{newest.major}.{newest.minor + 1}" == TRANSFORMERS
    stated = {path.name: RANGE.findall(path.read_text()) for path in (ROOT / "setup.cfg", *ROOT.glob("*.md"))}
    assert stated["setup.cfg"] and stated["README.md"]
    assert {each for found in stated.values() for each in found} == {TRANSFORMERS}


def test_an_older_version_is_an_error(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.16.1")
    with pytest.raises(ImportError, match=f'found transformers==5.16.1.\n.*pip install "{TRANSFORMERS}"'):
        check_transformers()


@pytest.mark.parametrize("version, warnings", [("5.17.0", 0), ("5.24.9", 0), ("5.25.0", 1), ("6.0.0", 1)])
def test_a_newer_version_is_warned_of(version, warnings, monkeypatch):
    heard, logger = [], logging.get_logger("calm_transformers.model.configuration_calm")
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setattr(logger, "warning_once", heard.append)
    check_transformers()
    assert len(heard) == warnings and all(TRANSFORMERS in text for text in heard)


def test_what_is_imported_and_not_overridden_is_recorded():
    """Arguments and fields of outputs, such as the cache's, whose name transformers 5.24 changed."""
    found = found_contacts()
    for contact in ("GenerateDecoderOnlyOutput.__init__", "BaseModelOutputWithPast.__init__", "LlamaModel.forward"):
        assert f", {CACHE_ARGUMENT}=None" in found[contact]["signature"]
