"""Pushing to a Hub and pulling from it, with the real client over HTTP and hub_server's Hub on loopback."""

import hashlib
import inspect
import json
from pathlib import Path

import fresh_process
import pytest
from hub_server import TOKEN, USER
from model_copies import AUTO_MAP, assert_carries_its_code, code_digests, root_code, sample_text, weights_digest
from published import BUNDLE_FILES, PublishedRepository, write_tokenizer

REPO = f"{USER}/tiny-calm"

pytestmark = pytest.mark.transformers


def push_twice(repo):
    """In a fresh process: pushes a tokenizer and a model, then another model; returns a description of each."""
    from tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.push_to_hub(repo)
    pushed = []
    for seed in range(2):
        model = tiny_model(seed=seed)
        commit = model.push_to_hub(repo).oid
        pushed.append({"commit": commit, "weights": weights_digest(model), "text": sample_text(model, tokenizer)})
    return pushed


def pull(repo, revisions, copy):
    """In a fresh process: loads some revisions, saves the last one in `copy`, and returns a description of each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pulled = []
    for revision in revisions:
        model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)
        code = code_digests(Path(inspect.getfile(type(model))).parent)
        pulled.append({"code": code, "weights": weights_digest(model), "text": sample_text(model, tokenizer)})
    model.save_pretrained(copy)
    return pulled


def train_and_push(folder, repo):
    """In a fresh process: trains a tiny CALM that is uploaded during training and at the end."""
    from training_helpers import make_workshop, train

    fields = make_workshop(Path(folder))
    del fields["cache_dir"]  # the default one
    settings = {"push_to_hub": True, "hub_model_id": repo, "save_steps": 2, "hub_token": TOKEN}
    return train("calm", **fields, **settings, auxiliary_weight=0.5, output_dir=str(Path(folder) / "trained"))


def push_convert_push(folder, published, bundle):
    """In a fresh process: pushes published repositories, converts them by their Hub ids, and pushes the bundle."""
    from huggingface_hub import HfApi

    from calm_transformers.conversion.convert import main

    for name in ("calm", "autoencoder"):
        HfApi().create_repo(f"{published}-{name}")
        HfApi().upload_folder(repo_id=f"{published}-{name}", folder_path=f"{folder}/{name}")
    pair = ["--calm", f"{published}-calm", "--autoencoder", f"{published}-autoencoder"]
    return main([*pair, "--output", f"{folder}/bundle", "--push-to-hub", bundle])


def generate_from(repos):
    """In a fresh process: runs `calm generate` on repositories; returns each one's exit code, text and errors."""
    import contextlib
    import io
    import time

    from calm_transformers.generate import main

    found, time.sleep = [], lambda seconds: None  # between the client's attempts
    for repo in repos:
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main([repo, "ab", "--max_new_tokens", "8"])
        found.append((code, text.getvalue(), errors.getvalue().partition("\nThe continuation")[0]))  # with its speed
    return found


def push_and_be_killed(repo):
    """In a fresh process: pushes models from ten processes that are killed at random moments, then one more."""
    import multiprocessing
    import random
    import time

    from tiny import tiny_model

    context, moments = multiprocessing.get_context("fork"), random.Random(0)
    for seed in range(10):
        process = context.Process(target=tiny_model(seed=seed).push_to_hub, args=(repo,))
        process.start()
        time.sleep(moments.uniform(0, 1.5))
        process.kill()
        process.join()
    return tiny_model(seed=10).push_to_hub(repo).oid


def code_digests_of(commit):
    return {path: hashlib.sha256(content).hexdigest() for path, content in commit.files.items() if ".py" in path}


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("push")
    return fresh_process.call(push_twice, home, hub.client_environment(), repo=REPO).result


def test_a_pushed_repository_holds_the_model_and_its_code(hub, pushed):
    latest = next(hub.commits(REPO))
    assert latest.oid == pushed[-1]["commit"]
    code = code_digests_of(latest)
    assert code == root_code(), "the root's code files and nothing of training, evaluation, benchmarks or tests"
    assert set(latest.files) - set(code) == BUNDLE_FILES
    assert json.loads(latest.files["config.json"])["auto_map"] == AUTO_MAP


def test_a_pull_returns_what_was_pushed_at_each_revision(hub, pushed, tmp_path):
    older, latest = pushed
    assert older["weights"] != latest["weights"] and older["text"] != latest["text"]
    copy, environment = tmp_path / "copy", hub.client_environment()
    arguments = {"repo": REPO, "revisions": [older["commit"], None], "copy": str(copy)}
    pulled = fresh_process.call(pull, tmp_path / "home", environment, **arguments).result
    for before, after in zip(pushed, pulled, strict=True):
        code = code_digests_of(hub.api.repositories[REPO].at(before["commit"]))
        assert after == {"code": code, "weights": before["weights"], "text": before["text"]}
    assert_carries_its_code(copy)


@pytest.mark.slow
def test_errors_of_the_hub_are_one_sentence_and_the_next_run_completes_the_download(hub, pushed, tmp_path):
    faults = {"e500": 500, "e429": 429, "cut": "cut", "bad": "damaged"}  # the client checks no hash of small files
    repos = {f"{USER}/{name}": fault for name, fault in faults.items()}
    hub.api.repositories |= dict.fromkeys(repos, hub.api.repositories[REPO])
    outcomes, environment = [], hub.client_environment() | {"HF_HOME": str(tmp_path / "cache")}
    for hub.faults, settings in ((repos, {}), ({}, {}), ({}, {"HF_HUB_OFFLINE": "1"})):
        call = fresh_process.call(generate_from, tmp_path / "home", environment | settings, repos=list(repos))
        outcomes.append(call.result)
    first, second, offline = outcomes
    for repo, (code, text, error) in zip(repos, first, strict=True):
        assert (code, text) == (2, "") and error.startswith("error: ") and error.count("\n") == 1 and repo in error
    assert offline == second and second[0][1].startswith("ab") and second[:3] == 3 * [[0, second[0][1], ""]]
    assert second[3][0] == 2 and f"`hf cache rm model/{USER}/bad`, and it is downloaded again" in second[3][2]


@pytest.mark.slow
def test_a_killed_push_leaves_no_incomplete_commit(hub, tmp_path):
    arguments = {"repo": f"{USER}/killed"}
    last = fresh_process.call(push_and_be_killed, tmp_path / "home", hub.client_environment(), **arguments).result
    commits = list(hub.commits(arguments["repo"]))
    assert commits[0].oid == last and len(commits) > 1
    assert all({"config.json", "model.safetensors"} <= commit.files.keys() for commit in commits)
    assert all(code_digests_of(commit) == root_code() for commit in commits)


@pytest.mark.slow
def test_training_uploads_the_model_without_text_or_optimizer(hub, tmp_path):
    repo = f"{USER}/trained"
    environment = hub.client_environment()
    trained = fresh_process.call(train_and_push, tmp_path / "home", environment, folder=str(tmp_path), repo=repo)
    assert trained.result == 0
    commits = list(hub.commits(repo))
    assert [commit.message[:11] for commit in commits[:2]] == ["End of trai", "Training in"]
    for commit in commits:
        assert code_digests_of(commit) == root_code()
        others = {path for path in commit.files if not path.endswith(".py")}
        assert BUNDLE_FILES - {"README.md"} <= others
        assert others - BUNDLE_FILES <= {"recipe.yaml", "training_args.bin", "trainer_state.json"}
    recipe = commits[0].files["recipe.yaml"].decode()
    assert "hub_model_id" in recipe and TOKEN not in recipe


def test_hub_ids_are_converted_and_the_bundle_is_pushed(hub, tmp_path):
    PublishedRepository("energy_k4/calm", tmp_path / "calm")
    PublishedRepository("energy_k4/autoencoder", tmp_path / "autoencoder").write("sharded safetensors")
    write_tokenizer(tmp_path / "calm")
    ids = {"published": f"{USER}/published", "bundle": f"{USER}/bundle"}
    environment = hub.client_environment()
    done = fresh_process.call(push_convert_push, tmp_path / "home", environment, folder=str(tmp_path), **ids)
    assert done.result == 0, done.stderr
    files = next(hub.commits(ids["bundle"])).files
    assert {path for path in files if not path.endswith(".py")} == BUNDLE_FILES
    assert code_digests_of(next(hub.commits(ids["bundle"]))) == root_code()
    card = files["README.md"].decode()
    assert f"base_model:\n- {USER}/published-calm\n- {USER}/published-autoencoder\n" in card
    assert f'model="{USER}/bundle"' in card
