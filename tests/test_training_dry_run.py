"""`--dry_run` counts the configuration that the run would train, and reports its assumptions."""

import json
from pathlib import Path

import pytest
from training_helpers import train, values

from calm_transformers.training import train as training
from calm_transformers.training.recipe import CONFIGS


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


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_configuration_is_the_one_that_a_run_trains(kind, workshop, tmp_path, monkeypatch):
    fields = {key: value for key, value in workshop.items() if kind == "calm" or key != "autoencoder"}
    one_step = {"max_steps": 1, "eval_strategy": "no", "output_dir": str(tmp_path)}
    assert train(kind, **fields, **one_step) == 0
    trained = CONFIGS[kind].from_pretrained(tmp_path)
    assert trained.vocab_size == 300
    assert values(dry_run_config(kind, monkeypatch, **fields)) == values(trained)

    # Initialised from it: also without a tokenizer, and whatever the sizes in the recipe.
    initialised = {"init_from": str(tmp_path)} | ({} if kind == "calm" else {"hidden_size": 64})
    assert values(dry_run_config(kind, monkeypatch, **initialised)) == values(trained)


MISSING = "patch_size 4, latent_size 128: CALMConfig's default, as the autoencoder {} does not exist yet"


def test_missing_inputs_and_assumed_defaults_are_reported(workshop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("kind: ar")
    neither = report("calm", "demo-backbone", capsys)
    assert neither[:2] == ["recipe demo-backbone", MISSING.format("runs/demo-autoencoder")]
    note = "vocab_size 128,257: CALMConfig's default, as the tokenizer runs/demo-tokenizer does not exist yet"
    assert neither[2:4] == [note, ""]
    unnamed, typo = report("ar", "mine.yaml", capsys), report("ar", "transformer-s", capsys, tokenizer="runs/typo")
    assert unnamed[1] == "vocab_size 32,000: LlamaConfig's default, as no tokenizer is named"
    assert typo[1] == "vocab_size 128,256: the recipe's, as the tokenizer runs/typo does not exist yet"
    # If one of the two exists, its vocabulary is used.
    two = [workshop["autoencoder"], "runs/none"], ["runs/none", workshop["tokenizer"]]
    one, other = (report("calm", "demo-backbone", capsys, autoencoder=a, tokenizer=t) for a, t in two)
    assert one[1] == "" and other[1] == MISSING.format("runs/none")
    assert one[3] == other[4]  # the token embedding


def test_invalid_inputs_raise_as_in_a_run(workshop, tmp_path, capsys):
    autoencoder, changed_workshop = workshop["autoencoder"], workshop | {"autoencoder": str(tmp_path)}
    changed = json.loads((Path(autoencoder) / "config.json").read_text()) | {"vocab_size": 299}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    for kind, fields, message in [
        ("calm", changed_workshop, "has a vocabulary of 299 tokens, the tokenizer one of 300: use the tokenizer"),
        ("ar", {"init_from": "runs/nowhere"}, "runs/nowhere: no such folder"),
        ("ar", {"init_from": autoencoder}, "is a model of type 'calm_autoencoder', not 'llama'"),
        ("calm", {"init_from": autoencoder}, "is a model of type 'calm_autoencoder', not 'calm'"),
    ]:
        assert train(kind, dry_run=[], **fields) == 2
        assert message in capsys.readouterr().err


def test_the_mtp_loss_counts(capsys):
    """Its parameters and memory: at 128,257 tokens four matrices of 131 M, but no logits of a whole batch."""
    plain, fast = (report("calm", recipe, capsys) for recipe in ("calm-m", "calm-m-fast"))
    [mtp] = [float(line.split()[-2]) for line in fast if line.startswith("  MTP loss (not exported)")]
    [total] = {line for line in plain if "total, no autoencoder" in line} & set(fast)  # of the exported model
    gib = [[float(line.split("GiB")[0].split()[-1]) for line in lines if "GiB" in line] for lines in (plain, fast)]
    assert gib[1][0] - gib[0][0] == pytest.approx(16 * mtp * 1e6 / 2**30, abs=0.02)
    assert 0.5 < gib[1][1] - gib[0][1] < 2 * 32_768 * 128_257 / 2**30
    [flops] = [float(line.split()[2]) for line in fast if line.startswith("  MTP loss ") and "trained" in line]
    assert flops == pytest.approx(6 * 1024 * 128_257, rel=0.05)  # logits of a token, forward and twice backward
