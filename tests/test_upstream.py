"""All contact with transformers' inner parts is as it was recorded when it was last looked at.

A failure names the contact and what changed: its signature, or who in transformers uses it. Look at the change, mend
the code if it matters, and record anew, with each supported version, by `python tests/upstream_contacts.py`. Another
version than those recorded is compared with the nearest older one: what it names is what there is to check.
"""

import re

import pytest
import transformers
from model_copies import ROOT
from packaging.version import Version
from transformers import GenerationMixin
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils import logging
from upstream_contacts import differences, found_contacts, read_records

from calm_transformers.model.configuration_calm import TRANSFORMERS, check_transformers
from calm_transformers.model.generation_calm_upstream import GENERATION_SETTINGS
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
    texts = [(ROOT / name).read_text() for name in ("constraints.txt", "constraints-compat.txt")]
    pinned = [re.search(r"^transformers==(\S+)", text, re.MULTILINE).group(1) for text in texts]
    assert sorted(read_records()) == sorted(pinned)


def test_the_model_is_one_that_generates():
    """transformers looks for "GenerationMixin" among the names of the bases, and would add it where it isn't."""
    assert CALMForCausalLM.can_generate() and issubclass(CALMForCausalLM, GenerationMixin)
    assert add_generation_mixin_to_remote_model(CALMForCausalLM) is CALMForCausalLM


def test_the_table_of_settings_has_no_field_that_neither_version_has():
    signatures = [contacts["GenerationConfig"]["signature"] for contacts in read_records().values()]
    assert set(", ".join(signatures).split(", ")) == GENERATION_SETTINGS


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
