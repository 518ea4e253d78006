"""A small corpus, tokenizer and autoencoder for the training tests, and functions that run trainings."""

import contextlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from server_process import free_port

from calm_transformers.model import heads_calm
from calm_transformers.model.heads_calm_energy import EnergyHead
from calm_transformers.training.train import main
from calm_transformers.training.trainer import CALMTrainer

WORDS = "the cat sat on a mat and saw one small dog run home to its red house by the sea".split()
RECIPES = Path(__file__).parent / "fixtures" / "recipes"


def write_corpus(path: Path, num_documents: int = 200, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    documents = [" ".join(rng.choice(WORDS, size=rng.integers(5, 40))) + "." for _ in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def train(kind: str, recipe: str | None = None, **fields) -> int:
    """Runs the training command, by default with the tiny recipe of its kind, and returns its exit code."""
    torch.set_num_threads(1)  # the models are so small that a second thread only costs
    arguments = [kind, "--recipe", recipe or str(RECIPES / f"{kind}.yaml")]
    for name, value in fields.items():
        arguments += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return main(arguments)


def values(config) -> dict:
    """Returns a configuration's fields except those that saving adds."""
    saved = (
        "_name_or_path architectures dtype torch_dtype transformers_version use_cache auto_map code_version".split()
    )
    return {key: value for key, value in config.to_dict().items() if key not in saved}


def make_workshop(folder: Path, **autoencoder_fields) -> dict:
    """Makes a corpus and trains a tokenizer and an autoencoder on it; returns the recipe fields that name them."""
    corpus = str(write_corpus(folder / "corpus.jsonl"))
    tokenizer, autoencoder = str(folder / "tokenizer"), str(folder / "autoencoder")
    data = {"train_files": corpus, "validation_files": corpus, "cache_dir": str(folder / "tokens")}
    assert train("tokenizer", train_files=corpus, output_dir=tokenizer) == 0
    assert train("autoencoder", **data, tokenizer=tokenizer, output_dir=autoencoder, **autoencoder_fields) == 0
    return {**data, "tokenizer": tokenizer, "autoencoder": autoencoder}


def same_noise_for_every_patch(monkeypatch) -> None:
    """Makes the energy loss deterministic: sample n has the same noise at each patch, whatever its batch."""

    def repeated(shape, like, sample=torch.randn):
        fixed = sample((shape[0], *[1] * (len(shape) - 2), shape[-1]), generator=torch.Generator().manual_seed(0))
        return fixed.to(like.device).expand(*shape)

    def noise(head, shape, like, generator):
        return repeated((*shape, head.noise_size), like, torch.rand) - 0.5

    monkeypatch.setattr(EnergyHead, "initial_noise", noise)
    monkeypatch.setattr(heads_calm, "standard_normal", lambda shape, like, generator: repeated(shape, like))


def _in_child(log: str, kind: str, fields: dict, environment: dict, fixed_noise: bool) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    if fixed_noise:
        same_noise_for_every_patch(pytest.MonkeyPatch())
    if "fsdp" in fields:
        _allow_fsdp_on_cpu()
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = train(kind, **fields)
    sys.exit(code)


def start_training(log: Path, kind: str, environment=None, fixed_noise: bool = False, **fields):
    """Starts a training in a new process, forked from a server with all imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["calm_transformers.training.train"])
    process = context.Process(target=_in_child, args=(str(log), kind, fields, environment or {}, fixed_noise))
    process.start()
    return process


def start_training_together(log: Path, kind: str, num_processes: int = 2, **fields) -> list:
    """Starts a training like torchrun, on `num_processes` CPU processes with gloo."""
    environment = {"WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{**environment, "RANK": rank, "LOCAL_RANK": rank} for rank in range(num_processes)]
    return [start_training(log, kind, environment=rank, fixed_noise=True, **fields) for rank in ranks]


def _allow_fsdp_on_cpu() -> None:
    """Makes accelerate shard on CPUs: with gloo the same code runs there, under another device's name."""
    create = CALMTrainer.create_accelerator_and_postprocess

    def create_for_cpu(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(self)

    CALMTrainer.create_accelerator_and_postprocess = create_for_cpu


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def changed_weights(before: Path, after: Path, file: str = "model.safetensors") -> set[str]:
    """Returns the names of the weights that differ between two folders, in which they have the same names."""
    one, other = load_file(before / file), load_file(after / file)
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def losses_of(folder: Path, name: str = "loss") -> list[float]:
    return [entry[name] for entry in log_of(folder) if name in entry]
