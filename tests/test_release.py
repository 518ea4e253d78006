"""The release of this checkout, uploaded to hub_server's Hub."""

import json
import sys
import zipfile

import fresh_process
import pytest
from commands import refusal
from hub_server import USER
from huggingface_hub import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from model_copies import CODE_FILES, ROOT
from published import BUNDLE_FILES

REPO = f"{USER}/demo"

pytestmark = pytest.mark.transformers


def release(folder, repo):
    """In a fresh process: releases the checkout; returns the version and the exit code."""
    from calm_transformers import __version__
    from calm_transformers.conversion.release import main

    return __version__, main(["--version", __version__, "--output", folder, "--push_to_hub", repo])


def push_a_card(folder, repo):
    """In a fresh process: pushes a folder; returns the error."""
    from calm_transformers.conversion.convert import push_to_hub

    with pytest.raises(ValueError) as error:
        push_to_hub(folder, repo, "a card")
    return str(error.value)


@pytest.fixture(scope="module")
def released(hub, tmp_path_factory):
    """The folder of a release, and its version."""
    home = tmp_path_factory.mktemp("release")
    arguments = {"folder": str(home / "new"), "repo": REPO}
    done = fresh_process.call(release, home, hub.client_environment(), **arguments)
    version, code = done.result
    assert code == 0, done.stderr
    return home / "new", version


@pytest.mark.slow
def test_a_release_is_the_model_with_its_code_and_the_package(released):
    folder, version = released
    model = folder / "calm-demo"
    assert {path.name for path in model.iterdir()} == CODE_FILES | BUNDLE_FILES | {"LICENSE"}
    for name in CODE_FILES | {"model.safetensors", "LICENSE"}:
        assert (model / name).read_bytes() == (ROOT / name).read_bytes()
    assert json.loads((model / "config.json").read_text())["code_version"].startswith(f"{version}, ")
    (wheel,) = folder.glob("dist/*.whl")
    (sdist,) = folder.glob("dist/*.tar.gz")
    assert f"-{version}-" in wheel.name and sdist.name.endswith(f"-{version}.tar.gz")
    assert "calm_transformers/conversion/release.py" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_the_card_states_the_results_and_is_checked_by_the_hub(released, hub):
    path = released[0] / "calm-demo" / "README.md"
    metadata, text = metadata_load(path), path.read_text(encoding="utf-8")
    name, (result,) = model_index_to_eval_results(metadata["model-index"])
    assert (name, metadata["license"], metadata["library_name"]) == (REPO, "mit", "transformers")
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("brierlm", 16.49, "validation")
    assert text in hub.api.cards and f'model="{REPO}"' in text and "vLLM" in text and "{" not in text.split("---")[2]


@pytest.mark.slow
def test_the_hub_has_the_released_files_under_the_tag_of_the_version(released, hub):
    folder, version = released
    commit = hub.api.repositories[REPO].at(f"v{version}")
    assert commit is next(hub.commits(REPO)) and commit.message == f"Version {version}"
    assert commit.files == {path.name: path.read_bytes() for path in (folder / "calm-demo").iterdir()}


@pytest.mark.slow
def test_a_card_that_the_hub_refuses_is_not_uploaded(hub, tmp_path, monkeypatch):
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("---\nlicense: none\n---\n")
    monkeypatch.setattr(hub, "faults", {"validate-yaml": 400})
    arguments = {"folder": str(tmp_path / "card"), "repo": f"{USER}/refused"}
    done = fresh_process.call(push_a_card, tmp_path / "home", hub.client_environment(), **arguments)
    assert "did not take it: Invalid metadata in README.md" in done.result
    assert list(hub.commits(arguments["repo"])) == []


def test_a_version_that_differs_is_named(tmp_path, capsys, monkeypatch):
    from calm_transformers.conversion import release

    for file in ("CITATION.cff", "CHANGELOG.md"):
        (tmp_path / file).write_text((ROOT / file).read_text().replace(release.VERSION, "9.8.7"))
    monkeypatch.setattr(release, "ROOT", tmp_path)
    words = ["--version", "9.8.7", "--output", tmp_path / "new"]
    own = f"__version__ is {release.VERSION}, VERSION of configuration_calm.py is {release.VERSION}."
    assert refusal(capsys, release.main, *words) == f"The release is to be 9.8.7, but calm_transformers.{own}"
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n## [Unreleased]\n")
    assert refusal(capsys, release.main, *words).endswith(", CHANGELOG.md is Unreleased.")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_transformers_cannot_load_is_an_error(tmp_path):
    from calm_transformers.conversion.release import check_loads

    (tmp_path / "config.json").write_text('{"model_type": "calm"}')
    with pytest.raises(ValueError, match=f"{tmp_path.name} can't be loaded with .*python"):
        check_loads(tmp_path, sys.executable)
