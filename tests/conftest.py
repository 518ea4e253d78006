"""Settings and fixtures of all tests: one thread per process, and a GPU only for tests marked `gpu`.

Two pytest workers share the machine, so each process computes on one thread. Most tests compare CPU results, so GPUs
are hidden from them and the commands they start; `pytest -m gpu` (`make test-gpu`) runs those that need one.
"""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

for name, count in (("quick", 40), ("whole", 5000), ("hour", 50_000)):  # examples of a test: --hypothesis-profile NAME
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    fixed = {"derandomize": True, "database": None} if name == "quick" else {}
    settings.register_profile(name, max_examples=count, deadline=None, suppress_health_check=checks, **fixed)
settings.load_profile("quick")


def pytest_configure(config):
    """Hides GPUs before any test file imports torch, which looks for them once."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if config.option.markexpr != "gpu":
        reason = "needs a GPU to itself: pytest -m gpu -n 0"
    else:
        import torch

        reason = "" if torch.cuda.is_available() else "there is no GPU here"
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))


def needs(found: object, what: str):
    """Returns a mark that skips a test if a program is missing, except in CI, where the test then fails."""
    return pytest.mark.skipif(not found and "CI" not in os.environ, reason=f"{what} is not installed")


@pytest.fixture(scope="session")
def hub():
    """A Hub on loopback, initially empty; each test pushes to its own repositories."""
    from hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """Recipe fields with a corpus, and a tokenizer and autoencoder trained on it; copy them to change them."""
    from training_helpers import make_workshop

    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def workshop_of_one_more_token(tmp_path_factory):
    """A workshop with a Llama whose tokenizer lacks the last token (see llama_workshop.py)."""
    from llama_workshop import make_workshop_of_one_more_token

    return make_workshop_of_one_more_token(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama(workshop_of_one_more_token):
    return str(Path(workshop_of_one_more_token["tokenizer"]).with_name("theirs"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny model and a tokenizer with a chat template; copy the folder to change it."""
    from server_process import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Tiny models with tokenizers, and a text, for evaluations (see evaluation_folder.py)."""
    from evaluation_folder import make_folder

    return make_folder(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A demo model of the benchmarks, and recipes calm-tiny and transformer-tiny (see benchmark_demo.py)."""
    from benchmark_demo import make_demo

    return make_demo(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def server(tiny_folder, tmp_path_factory):
    """A process that serves the tiny model with at most 4 running and 4 waiting requests."""
    from server_process import running_server

    options = "--model_name tiny --max_rows 4 --max_waiting 4 --allow_origin http://page.example".split()
    with running_server(tiny_folder, tmp_path_factory.mktemp("server"), *options) as server:
        yield server


@pytest.fixture(scope="session")
def api(tiny_folder):
    """A client of the same application in this process, with request bodies of at most 20,000 bytes."""
    from server_process import in_process

    with in_process(tiny_folder, max_rows=4, max_waiting=4, max_draws=1000) as client:
        yield client


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A headless browser; each test sets its width and opens its own pages."""
    from browser import headless_browser

    with headless_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver
