"""The same documents from files, from a Hub dataset and streamed; exact resuming of each."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import RECIPES, changed_weights, start_training_together, train

from calm_transformers.command_line import InputError
from calm_transformers.documents import DataOptions
from calm_transformers.loading import load_tokenizer
from calm_transformers.training import data, tokenize
from calm_transformers.training.data import load_tokens
from calm_transformers.training.trainer import CALMTrainer


@pytest.fixture(scope="module")
def hub_dataset(workshop, tmp_path_factory):
    """A local dataset folder, as from a Hub id, with splits and another text column."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = [json.loads(line)["text"] for line in Path(workshop["train_files"]).read_text().splitlines()]
    for split, texts in {"train": rows, "validation": rows[:20]}.items():
        lines = (json.dumps({"body": text, "n": n}) for n, text in enumerate(texts))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture
def blocks_seen(monkeypatch):
    seen, compute_loss = [], CALMTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        if model.training:
            seen.extend(inputs["input_ids"].tolist())
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CALMTrainer, "compute_loss", record)
    return seen


def from_hub(workshop, dataset, **changes) -> dict:
    fields = {key: value for key, value in workshop.items() if not key.endswith("_files")}
    return {**fields, "dataset": dataset, "text_column": "body", "validation_split": "validation", **changes}


def test_a_hub_dataset_and_a_file_of_its_documents_give_the_same_blocks(workshop, hub_dataset, tmp_path, blocks_seen):
    assert train("calm", **workshop, output_dir=str(tmp_path / "file")) == 0
    from_file, blocks_seen[:] = list(blocks_seen), []
    assert train("calm", **from_hub(workshop, hub_dataset, eval_steps=4), output_dir=str(tmp_path / "hub")) == 0
    assert blocks_seen == from_file and len(from_file) == 16
    assert "eval_loss" in (tmp_path / "hub" / "trainer_state.json").read_text()


@pytest.mark.parametrize("source, num_workers", [("file", 0), ("hub", 2)])
def test_a_stream_resumes_with_the_next_block(workshop, hub_dataset, tmp_path, blocks_seen, source, num_workers):
    fields = workshop if source == "file" else from_hub(workshop, hub_dataset)
    fields = {**fields, "streaming": "true", "save_steps": 2, "lr_scheduler_type": "constant", "eval_strategy": "no"}
    fields |= {"dataloader_num_workers": num_workers, "left_fill": 0}
    assert train("calm", **fields, output_dir=str(tmp_path / "whole")) == 0
    whole, blocks_seen[:] = list(blocks_seen), []
    assert train("calm", **fields | {"max_steps": 2}, output_dir=str(tmp_path / "cut")) == 0
    assert train("calm", **fields, output_dir=str(tmp_path / "cut")) == 0
    assert blocks_seen == whole and len({tuple(ids) for ids in whole}) == 16
    assert not changed_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_share_a_stream(workshop, tmp_path):
    fields = {**workshop, "streaming": "true", "eval_strategy": "no", "max_steps": 2, "dataloader_num_workers": 2}
    fields |= {"per_device_train_batch_size": 2, "output_dir": str(tmp_path / "two")}
    processes = start_training_together(tmp_path / "log", "calm", **fields)
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0], (tmp_path / "log").read_text()[-2000:]
    assert torch.isfinite(load_file(tmp_path / "two" / "model.safetensors")["model.norm.weight"]).all()


def test_an_error_of_a_stream_is_one_line(workshop, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "the cat"}\n{"text": "\\ud800"}\n')
    own, bad = {"streaming": "true", "eval_strategy": "no", "dataloader_num_workers": 2}, str(tmp_path / "bad.jsonl")
    no_files = {key: value for key, value in workshop.items() if not key.endswith("_files")}
    for fields, message in [
        (workshop | {"train_files": bad}, f"{bad}, line 2: not valid Unicode: character 1"),
        (workshop | {"max_steps": -1}, "streaming needs max_steps"),
        (no_files, "no data: give --train_files"),
    ]:
        assert train("calm", **own | fields, output_dir=str(tmp_path / "run")) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_a_training_uses_the_tokens_of_calm_tokenize(workshop, tmp_path, monkeypatch, capsys):
    words = [word for name in ("train_files", "tokenizer") for word in (f"--{name}", workshop[name])]
    words += ["--output", str(tmp_path / "tokens"), "--recipe"]

    def tokenized(*own: str) -> str:
        assert tokenize.main([*words, *own]) == 0
        return capsys.readouterr().out

    def trained(**fields) -> str:
        fields = {**workshop, "train_files": tmp_path / "tokens", "validation_files": tmp_path / "tokens", **fields}
        return capsys.readouterr().err if train("calm", **fields, output_dir=str(tmp_path / "run")) else ""

    recipe = str(RECIPES / "calm.yaml")
    assert " tokens of 100 documents in 1 of 2 shards of " in tokenized(recipe, "--shard", "0/2")
    assert "tokens: 1 of 2 shards are missing, the first is 1." in trained()
    tokenized(recipe, "--shard", "1/2")
    monkeypatch.setattr(data, "tokenize_documents", None)
    monkeypatch.setattr(tokenize, "tokenize_documents", None)
    assert " tokens of 100 documents in 1 of 2 shards of " in tokenized(recipe, "--shard", "1/2")  # it is there
    assert "(append_eos True in place of False): tokenise the text again." in trained(append_eos=False)
    assert trained() == ""
    assert tokenize.main([*words, "demo-tokenizer"]) == 2
    capsys.readouterr()
    assert tokenize.main([*words, recipe, "--shard", "1/2", "--max_documents", "3"]) == 2
    assert "tokens holds other tokens (max_documents None in place of 3): name another" in capsys.readouterr().err
    monkeypatch.setattr(data, "MAX_BYTES_IN_TRAINING", 1000)
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = DataOptions([workshop["train_files"]]), "train", load_tokenizer(workshop["tokenizer"]), 4
    with pytest.raises(InputError, match="corpus.jsonl: 0 GB of text are too much .*, then give --train_files DIR"):
        load_tokens(*arguments, tmp_path)
    monkeypatch.undo()
    load_tokens(*arguments, tmp_path)
    monkeypatch.setattr(data, "MAX_BYTES_IN_TRAINING", 1000)
    monkeypatch.setenv("WORLD_SIZE", "2")
    load_tokens(*arguments, tmp_path)  # they are there already


@pytest.mark.slow
def test_processes_of_calm_tokenize_write_a_shard_each(workshop, tmp_path, capsys):
    own = ["--train_files", workshop["train_files"], "--tokenizer", workshop["tokenizer"], "--num_proc", "2"]
    assert tokenize.main(["--recipe", str(RECIPES / "calm.yaml"), "--output", str(tmp_path), *own]) == 0
    assert " tokens of 200 documents in 2 of 2 shards of " in capsys.readouterr().out
    assert len(list(tmp_path.glob("shard-*"))) == 2
