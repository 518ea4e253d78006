"""What holds for every test: one thread a process, and a GPU only for the tests that are marked `gpu`.

Two pytest workers share the machine, so each, and every process that a test starts, computes on one thread. The tests
compare a CPU's numbers, so a GPU is hidden from them and from the commands that they start; `pytest -m gpu` runs those
that need one, one after another (`make test-gpu`).
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config):
    """Before any test file imports torch, which looks for a GPU once."""
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
    """Marks a test to be skipped where a program is missing. In CI, where all are installed, it runs, and so fails."""
    return pytest.mark.skipif(not found and "CI" not in os.environ, reason=f"{what} is not installed")


@pytest.fixture(scope="session")
def hub():
    """A Hub on loopback, empty at first; each test pushes to repositories of its own."""
    from hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """Fields that name a corpus, and a tokenizer and an autoencoder trained on it. Copied by what changes them."""
    from training_helpers import make_workshop

    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def workshop_of_one_more_token(tmp_path_factory):
    """The same, beside a Llama's tokenizer that lacks the last token (see llama_workshop.py)."""
    from llama_workshop import make_workshop_of_one_more_token

    return make_workshop_of_one_more_token(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny model and a tokenizer with a chat template. Copied by what changes them."""
    from server_process import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Tiny models, each with a tokenizer, and a text, for the evaluations (see evaluation_folder.py)."""
    from evaluation_folder import make_folder

    return make_folder(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A demo model of the benchmarks, and recipes calm-tiny and transformer-tiny (see benchmark_demo.py)."""
    from benchmark_demo import make_demo

    return make_demo(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def server(tiny_folder, tmp_path_factory):
    """A process that serves the tiny model, of 4 rows and 4 texts that may wait."""
    from server_process import running_server

    options = (
        "--model_name",
        "tiny",
        "--max_rows",
        "4",
        "--max_waiting",
        "4",
        "--allow_origin",
        "http://page.example",
    )
    with running_server(tiny_folder, tmp_path_factory.mktemp("server"), *options) as server:
        yield server


@pytest.fixture(scope="session")
def api(tiny_folder):
    """A client of the same application in this process, whose bodies may have 20,000 bytes."""
    from server_process import in_process

    with in_process(tiny_folder, max_rows=4, max_waiting=4, max_draws=1000) as client:
        yield client


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A browser; a test sets its width, and opens pages of its own."""
    from browser import headless_browser

    with headless_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver
