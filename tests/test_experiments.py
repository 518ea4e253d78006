"""`calm experiments`: the commands that it runs, what it skips, and the tables of what was measured."""

import json
import subprocess
from pathlib import Path

import pytest
from commands import ROOT, refusal

from calm_transformers.experiments import plan
from calm_transformers.experiments.__main__ import main
from calm_transformers.experiments.plan import FOLDER, Plan, Run
from calm_transformers.experiments.tables import document, draw_curves

FILE = Path(__file__).parent / "fixtures" / "language.yaml"
DOCS = ROOT / "docs"
NAMES = [
    *("language", "autoencoders/k4", "autoencoders/k4/noise", "models/ar-seed1", "models/calm-seed1"),
    *("models/begun-seed1", "models/ar-seed1/score", "models/calm-seed1/score", "models/begun-seed1/score"),
    "models/calm-seed1/replacements",
]


def option(run: Run, name: str) -> str:
    return run.words[run.words.index(f"--{name}") + 1]


def test_runs_come_after_what_they_need_and_whole_comparisons_before_the_next_seed(tmp_path):
    runs = Plan(FILE, tmp_path, None, None).runs
    assert set(runs) == {f"language/{name}" for name in NAMES}
    names = list(runs)
    for name, run in runs.items():
        needed = [other for other in runs if str(runs[other].result.parent) in run.words and other != name]
        assert all(names.index(other) < names.index(name) for other in needed if not runs[other].measures), name
    begun = runs["language/models/begun-seed1"]
    assert option(begun, "init_backbone") == str(tmp_path / "language/models/ar-seed1")
    assert option(begun, "seed") == "1" and "--recipe" in begun.words and "--seeds" not in begun.words
    runs = Plan(FOLDER / "language.yaml", tmp_path, None, ["learn"]).runs
    seeds = [int(name[-7]) for name in runs if name.endswith("/score")]
    assert seeds == sorted(seeds) and seeds.count(1) == 5 and set(seeds) == {1, 2, 3}


def test_models_of_stories_are_scored_on_the_same_text(tmp_path):
    for part in ("train", "validation"):
        (tmp_path / f"tinystories-{part}.jsonl.xz").touch()
    runs = Plan(FOLDER / "stories.yaml", tmp_path / "out", tmp_path, None).runs
    scores = {name: run for name, run in runs.items() if name.endswith("/score")}
    assert {option(run, "max_positions") for name, run in scores.items() if "/ar-" not in name} == {str(400 * 63)}
    assert option(scores["stories/models/ar-seed1/score"], "max_positions") == str(400 * 252)
    assert all("--append_eos" in run.words and "True" not in run.words for run in scores.values())
    assert runs["stories/tokenizer"].words[:2] == ["calm_transformers.training.train", "tokenizer"]


def test_a_field_that_no_recipe_has_is_refused_before_any_work(tmp_path, capsys):
    file = tmp_path / "language.yaml"
    file.write_text(FILE.read_text().replace("num_mlp_layers", "num_mlp_layer"))
    error = refusal(capsys, main, "--experiments", file, "--output", tmp_path / "out")
    assert "unknown field 'num_mlp_layer': did you mean num_mlp_layers" in error
    assert "give --corpus" in refusal(capsys, main, "--corpus", tmp_path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def share(value):
    return {"share": value, "share_interval": [value - 0.1, value + 0.1], "brierlm": {"value": 10 * value}}


@pytest.fixture
def commands(monkeypatch):
    """The commands that were run: each only writes its result, but one of `failing`, which fails."""
    done = []
    noise = [{"sigma": sigma, "token_accuracy": 0.9} for sigma in (0, 0.3, 0.5, 1)]
    result = {**share(0.8), "nothing": share(0.8), "posterior_sigma": 0.3, "kl": 40, "noise": noise}

    def run(words, **_):
        name = next(word for word in words if word.endswith(("output", "output_dir", "json")))
        path = Path(words[words.index(name) + 1], {"--output": "language.json"}.get(name, "trainer_state.json"))
        path = path.parent if name == "--json" else path
        if any(word in str(path) for word in run.failing):
            return subprocess.CompletedProcess(words, 1)
        done.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
        return subprocess.CompletedProcess(words, 0)

    run.failing, run.done = [], done
    monkeypatch.setattr(plan.subprocess, "run", run)
    monkeypatch.setattr(plan, "cost", lambda folder: {"tokens": 2e6, "flops": 1e9, "cpu_seconds": 7.0})
    return run


def test_commands_run_once_and_their_figures_come_into_the_tables(tmp_path, commands, capsys):
    """One that fails is named, the others go on, and the next run makes up for it."""
    words = ["--experiments", str(FILE), "--output", str(tmp_path)]
    assert main([*words, "--only", "replacements"]) == 0
    assert len(commands.done) == 6
    commands.failing.append("ar-seed1/score")
    assert main(words) == 1 and len(commands.done) == len(NAMES) - 1
    output = capsys.readouterr()
    assert "failed: see" in output.err and "failed: language/models/ar-seed1/score" in output.out
    assert "| AR | not run yet |" in (tmp_path / "experiments.md").read_text()
    commands.failing.clear()
    assert main(words) == 0 and len(commands.done) == len(NAMES)
    text = (tmp_path / "experiments.md").read_text()
    assert "| AR | 2.00 M | 1.0e+09 | 7 | 8.00 | 80.0% (70.0% to 90.0%) | 6.05 |  |" in text
    assert "| calm-seed1 | 80.0% (70.0% to 90.0%) |  |  |  |" in text and "| k4 | 90.00% | 90.00% |" in text
    records = json.loads((tmp_path / "experiments.json").read_text())
    assert set(records) == {f"language/{name}" for name in NAMES if name.endswith(("noise", "score", "replacements"))}


# the tables


def test_the_tables_of_the_document_are_those_of_the_records(tmp_path):
    """docs/experiments.md is kept by hand; its figures are the records'. The table of heads has one that is gone."""
    records, text = json.loads((DOCS / "experiments.json").read_text()), (DOCS / "experiments.md").read_text()
    made = document([Plan(FOLDER / "language.yaml", tmp_path, None, None)], records)
    lines = [line for line in made.splitlines() if line.startswith("|")]
    assert len(lines) > 100 and [line for line in lines if line not in text] == []


def test_curves_are_drawn(tmp_path):
    plan = Plan(FOLDER / "language.yaml", tmp_path, None, ["curves"])
    record = {**share(0.2), "cost": {"tokens": 1e6, "flops": 1e9, "cpu_seconds": 7.0}}
    draw_curves([plan], {"language/models/k4-seed1/score": record}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# the whole


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    assert main(["--output", str(tmp_path), "--experiments", str(FILE)]) == 0
    ar, calm, begun = (
        json.loads((tmp_path / "experiments.json").read_text())[f"language/models/{name}-seed1/score"]
        for name in ("ar", "calm", "begun")
    )
    assert [record["cost"]["tokens"] for record in (ar, begun)] == [2 * 4 * 32, 2 * 2 * 4 * 32]
    assert begun["cost"]["cpu_seconds"] > ar["cost"]["cpu_seconds"] > 0
    assert calm["positions"] == 63 and 0 < calm["best_brierlm"] < 100
    low, high = calm["share_interval"]
    text = (tmp_path / "experiments.md").read_text()
    assert f"{calm['share']:.1%} ({low:.1%} to {high:.1%}) | 5.72 | " in text
    replaced = next(line for line in text.splitlines() if line.startswith("| calm-seed1 |"))
    assert replaced.count("%") == 9  # as it is, head, head and backbone
