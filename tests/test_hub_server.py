"""The Hub of the push and pull tests is itself held against the real client, lest its faults pass for the model's."""

import hashlib
from pathlib import Path
from urllib.request import Request, urlopen

import huggingface_hub
import pytest
from hub_server import TOKEN, USER, hub  # noqa: F401 (a fixture)
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

REPO = f"{USER}/notes"


@pytest.fixture
def client(hub, monkeypatch):  # noqa: F811
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    client = HfApi(endpoint=hub.url, token=TOKEN)
    client.create_repo(REPO)
    return client


def upload(client, content, name="notes.txt", **where):
    with pytest.MonkeyPatch.context() as patch:
        # huggingface_hub 0.36 reads the repository's name off the commit's URL with this constant.
        patch.setattr(huggingface_hub.constants, "ENDPOINT", client.endpoint)
        return client.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO, **where).oid


def test_every_revision_is_kept(client, hub, tmp_path):  # noqa: F811
    first = upload(client, b"first")
    client.create_tag(REPO, tag="v1")
    client.create_branch(REPO, branch="draft")
    second = upload(client, b"second")
    upload(client, b"third", revision="draft")

    expected = {"main": b"second", second: b"second", first: b"first", "v1": b"first", "draft": b"third"}
    for revision, content in expected.items():
        path = client.hf_hub_download(REPO, "notes.txt", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_bytes() == content, revision
    assert [commit.oid for commit in hub.commits(REPO)] == [second, first]
    assert client.model_info(REPO, revision="v1").sha == first
    assert {tag.name: tag.target_commit for tag in client.list_repo_refs(REPO).tags} == {"v1": first}


def test_an_unchanged_file_makes_no_commit(client):
    assert upload(client, b"same") == upload(client, b"same")


def test_weights_go_through_lfs(client, hub, tmp_path):  # noqa: F811
    content = bytes(range(256)) * 64
    upload(client, content, name="model.safetensors")
    assert Path(client.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)).read_bytes() == content
    [entry] = client.list_repo_tree(REPO)
    assert (entry.lfs.sha256, entry.size) == (hashlib.sha256(content).hexdigest(), len(content))
    part = Request(f"{hub.url}/{REPO}/resolve/main/model.safetensors", headers={"Range": "bytes=250-259"})
    with urlopen(part) as response:
        assert (response.status, response.read()) == (206, content[250:260])


def test_errors_are_the_ones_that_the_client_knows(client, hub, tmp_path):  # noqa: F811
    upload(client, b"text")
    with pytest.raises(RevisionNotFoundError):
        client.hf_hub_download(REPO, "notes.txt", revision="v9", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        client.hf_hub_download(REPO, "absent.txt", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        client.hf_hub_download(f"{USER}/absent", "notes.txt", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="401"):
        upload(HfApi(endpoint=hub.url, token="hf_wrong"), b"text")
    with pytest.raises(HfHubHTTPError, match="409"):
        client.create_repo(REPO)
