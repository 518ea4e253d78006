"""`--dry_run` counts the configuration that the run would train, and says what it had to assume."""

import json
from pathlib import Path

import pytest
from training_helpers import train, values
from transformers import LlamaConfig

from calm_transformers.model.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm_transformers.training import train as training

KINDS = ("ar", "autoencoder", "calm")
DEMO = {"ar": "demo-transformer", "autoencoder": "demo-autoencoder", "calm": "demo-backbone"}


def fields_of(kind: str, workshop: dict) -> dict:
    return {key: value for key, value in workshop.items() if kind == "calm" or key != "autoencoder"}


def report(kind: str, recipe: str, capsys, **fields) -> list[str]:
    assert train(kind, recipe, dry_run=[], **fields) == 0
    return capsys.readouterr().out.splitlines()


def dry_run_config(kind: str, monkeypatch, **fields):
    counted = []
    monkeypatch.setattr(training, "print_cost", lambda recipe, config, notes, teacher: counted.append((config, notes)))
    assert train(kind, dry_run=[], **fields) == 0
    [(config, notes)] = counted
    assert list(notes) == []
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_is_the_one_that_a_run_trains(kind, workshop, tmp_path, monkeypatch):
    fields = fields_of(kind, workshop)
    classes = {"ar": LlamaConfig, "autoencoder": CALMAutoencoderConfig, "calm": CALMConfig}
    one_step = {"max_steps": 1, "eval_strategy": "no", "output_dir": str(tmp_path)}
    assert train(kind, **fields, **one_step) == 0
    trained = classes[kind].from_pretrained(tmp_path)
    assert trained.vocab_size == 300
    assert values(dry_run_config(kind, monkeypatch, **fields)) == values(trained)

    # Going on from it: also without any tokenizer named, and whatever sizes the recipe states.
    goes_on = {"init_from": str(tmp_path)} | ({} if kind == "calm" else {"hidden_size": 64})
    assert values(dry_run_config(kind, monkeypatch, **goes_on)) == values(trained)


@pytest.mark.parametrize("kind, total", [("ar", "3.3 M"), ("autoencoder", "1.94 M"), ("calm", "4.59 M")])
def test_the_demo_recipes_count_with_what_is_there(kind, total, workshop, tmp_path, capsys):
    CALMAutoencoderConfig(vocab_size=300, latent_size=64, hidden_size=256).save_pretrained(tmp_path)
    named = {"tokenizer": workshop["tokenizer"]} | ({"autoencoder": str(tmp_path)} if kind == "calm" else {})
    lines = report(kind, DEMO[kind], capsys, **named)
    assert lines[1] == ""  # nothing is assumed
    counted = next(line for line in lines if line.strip().startswith("total"))
    assert counted.split()[-2:] == total.split()


def test_what_is_not_there_yet_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report("calm", "demo-backbone", capsys)[:4] == [
        "recipe demo-backbone",
        "patch_size 4, latent_size 128: CALMConfig's default, for the autoencoder runs/demo-autoencoder is not there "
        "yet",
        "vocab_size 128,257: CALMConfig's default, for the tokenizer runs/demo-tokenizer is not there yet",
        "",
    ]


def test_where_one_of_the_two_is_there_its_vocabulary_counts(workshop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with_autoencoder = {"autoencoder": workshop["autoencoder"], "tokenizer": "runs/none"}
    with_tokenizer = {"autoencoder": "runs/none", "tokenizer": workshop["tokenizer"]}
    small = report("calm", "demo-backbone", capsys, **with_autoencoder)
    large = report("calm", "demo-backbone", capsys, **with_tokenizer)
    assert small[1] == ""
    assert (
        large[1]
        == "patch_size 4, latent_size 128: CALMConfig's default, for the autoencoder runs/none is not there yet"
    )
    assert small[3] == large[4]  # the token embedding


def test_a_recipe_that_says_nothing_of_the_vocabulary_is_told_so(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("kind: ar")
    lines = report("ar", str(tmp_path / "mine.yaml"), capsys)
    assert lines[1] == "vocab_size 32,000: LlamaConfig's default, for no tokenizer is named"
    lines = report("ar", "transformer-s", capsys, tokenizer="runs/typo")
    assert lines[1] == "vocab_size 128,256: the recipe's, for the tokenizer runs/typo is not there yet"


def test_what_is_there_and_wrong_is_refused_as_the_run_would(workshop, tmp_path, capsys):
    tokenizer = Path(tmp_path / "tokenizer")
    tokenizer.mkdir()
    assert train("ar", "demo-transformer", dry_run=[], tokenizer=str(tokenizer)) == 2
    assert f"error: tokenizer {tokenizer}: cannot be read: " in capsys.readouterr().err
    other = Path(workshop["autoencoder"]) / "config.json"
    changed = json.loads(other.read_text()) | {"vocab_size": 299}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert train("calm", dry_run=[], **workshop | {"autoencoder": str(tmp_path)}) == 2
    assert "knows 299 tokens, the tokenizer 300: both must be the ones" in capsys.readouterr().err
    assert train("ar", dry_run=[], init_from="runs/nowhere") == 2
    assert "runs/nowhere: no such folder" in capsys.readouterr().err
    assert train("ar", dry_run=[], init_from=workshop["autoencoder"]) == 2
    assert "is a model of type 'calm_autoencoder', not 'llama'" in capsys.readouterr().err
    assert train("calm", dry_run=[], init_from=workshop["autoencoder"]) == 2
    assert "is a model of type 'calm_autoencoder', not 'calm'" in capsys.readouterr().err
