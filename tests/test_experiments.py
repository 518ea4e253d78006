"""`calm experiments`: the commands it runs, the finished ones it skips, and the tables of the results."""

import json
import re
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from commands import ROOT, main_of, refusal

from calm_transformers.experiments import plan
from calm_transformers.experiments.__main__ import main
from calm_transformers.experiments.plan import FOLDER, Plan, Run
from calm_transformers.experiments.tables import format_tables, plot_curves
from calm_transformers.experiments.temperature_fidelity import METRICS

FILE = Path(__file__).parent / "fixtures" / "language.yaml"
DOCS = ROOT / "docs"
NAMES = [
    *("language", "autoencoders/k4", "autoencoders/k4/noise", "models/ar-seed1", "models/calm-seed1"),
    *("models/begun-seed1", "models/ar-seed1/score", "models/calm-seed1/score", "models/begun-seed1/score"),
    *("models/calm-seed1/replacements", "models/calm-seed1/distillation"),
    *("models/distilled-seed1", "models/distilled-seed1/score", "models/distilled-seed1/distillation"),
]


def option(run: Run, name: str) -> str:
    return run.args[run.args.index(f"--{name}") + 1]


def test_runs_follow_their_dependencies_and_finish_a_seed_before_the_next(tmp_path):
    runs = Plan(FILE, tmp_path, None, None).runs
    assert set(runs) == {f"language/{name}" for name in NAMES}
    names = list(runs)
    for name, run in runs.items():
        dependencies = [other for other in runs if str(runs[other].result.parent) in run.args and other != name]
        places = [names.index(other) for other in dependencies if not runs[other].is_evaluation]
        assert max(places, default=-1) < names.index(name), name
    initialised = runs["language/models/begun-seed1"]
    assert option(initialised, "init_backbone") == str(tmp_path / "language/models/ar-seed1")
    assert option(initialised, "seed") == "1" and "--recipe" in initialised.args and "--seeds" not in initialised.args
    runs = Plan(FOLDER / "language.yaml", tmp_path, None, ["learn"]).runs
    seeds = [int(name[-7]) for name in runs if name.endswith("/score")]
    assert seeds == sorted(seeds) and seeds.count(1) == 6 and set(seeds) == {1, 2, 3}


def test_story_models_are_scored_on_the_same_text(tmp_path):
    for part in ("train", "validation"):
        (tmp_path / f"tinystories-{part}.jsonl.xz").touch()
    runs = Plan(FOLDER / "stories.yaml", tmp_path / "out", tmp_path, None).runs
    scores = {name: run for name, run in runs.items() if name.endswith("/score")}
    assert {option(run, "max_positions") for name, run in scores.items() if "/ar-" not in name} == {str(400 * 63)}
    assert option(scores["stories/models/ar-seed1/score"], "max_positions") == str(400 * 252)
    assert all("--append_eos" in run.args and "True" not in run.args for run in scores.values())
    assert runs["stories/tokenizer"].args[:2] == ["calm_transformers.training.train", "tokenizer"]


def test_an_unknown_recipe_field_raises_before_any_work(tmp_path, capsys):
    file = tmp_path / "language.yaml"
    file.write_text(FILE.read_text().replace("num_mlp_layers", "num_mlp_layer"))
    error = refusal(capsys, main, "--experiments", file, "--output", tmp_path / "out")
    assert "unknown field 'num_mlp_layer': did you mean num_mlp_layers" in error
    assert "give --corpus" in refusal(capsys, main, "--corpus", tmp_path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def fraction(value):
    return {"share": value, "share_interval": [value - 0.1, value + 0.1], "brierlm": {"value": 10 * value}}


@pytest.fixture
def commands(monkeypatch):
    """Replaces subprocess.run: a command writes a stub result, or fails if its path contains one of `failing`."""
    done = []
    noise = [{"sigma": sigma, "token_accuracy": 0.9} for sigma in (0, 0.3, 0.5, 1)]
    settings = [
        {"method": method, "temperature": T, "num_candidates": 200}
        | {metric: {"exact draws": [0.1, 0], "model": [T / 2, 0]} for metric in METRICS}
        for T in (1.0, 0.5)
        for method in ("one draw", "batch")
    ]
    result = {**fraction(0.8), "draws": 1000, "contexts": 16, "settings": settings, "nothing": fraction(0.8)}
    result |= {"posterior_sigma": 0.3, "kl": 40, "noise": noise}

    def run(args, **_):
        name = next(word for word in args if word.endswith(("output", "output_dir", "json")))
        path = Path(args[args.index(name) + 1], {"--output": "language.json"}.get(name, "trainer_state.json"))
        path = path.parent if name == "--json" else path
        if any(word in str(path) for word in run.failing):
            return subprocess.CompletedProcess(args, 1)
        done.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
        return subprocess.CompletedProcess(args, 0)

    run.failing, run.done = [], done
    monkeypatch.setattr(plan.subprocess, "run", run)
    monkeypatch.setattr(plan, "training_cost", lambda folder: {"tokens": 2e6, "flops": 1e9, "cpu_seconds": 7.0})
    return run


def test_commands_run_once_and_their_results_fill_the_tables(tmp_path, commands, capsys):
    """A failed command is reported, the others still run, and the next call repeats only the failed one."""
    args = ["--experiments", str(FILE), "--output", str(tmp_path)]
    assert main([*args, "--only", "replacements"]) == 0
    assert len(commands.done) == 6
    commands.failing.append("ar-seed1/score")
    assert main(args) == 1 and len(commands.done) == len(NAMES) - 1
    output = capsys.readouterr()
    assert "failed: see" in output.err and "failed: language/models/ar-seed1/score" in output.out
    assert "| AR | not run yet |" in (tmp_path / "experiments.md").read_text()
    commands.failing.clear()
    assert main(args) == 0 and len(commands.done) == len(NAMES)
    text = (tmp_path / "experiments.md").read_text()
    assert "| AR | 2.00 M | 1.0e+09 | 7 | 8.00 | 80.0% (70.0% to 90.0%, one model) | 6.05 |" in text
    assert "| calm-seed1 | 80.0% (70.0% to 90.0%) |  |  |  |" in text and "| k4 | 90.00% | 90.00% |" in text
    assert "| distilled, one draw | 0.500 | 0.250 |" in text and "| calm, 200 candidates |" in text
    assert "| distilled, 200 candidates |" not in text and (tmp_path / "temperature.png").exists()
    records = json.loads((tmp_path / "experiments.json").read_text())
    evaluations = ("noise", "score", "replacements", "distillation")
    assert set(records) == {f"language/{name}" for name in NAMES if name.endswith(evaluations)}


def test_the_tables_of_the_document_match_the_records(tmp_path):
    """The pages are edited by hand: rows of a removed head are added, the list of trained models is left out."""
    records = json.loads((DOCS / "experiments.json").read_text())
    text = "".join((DOCS / "results" / name).read_text() for name in ("experiments.md", "tables.md"))
    tables = format_tables([Plan(FOLDER / "language.yaml", tmp_path, None, None)], records)
    lines = [line for line in tables.splitlines() if re.match(r"\|(?!.*(models/|autoencoders/|parameters))", line)]
    assert len(lines) > 100 and [line for line in lines if line not in text] == []


def test_plot_curves(tmp_path):
    plan = Plan(FOLDER / "language.yaml", tmp_path, None, ["curves"])
    record = {**fraction(0.2), "cost": {"tokens": 1e6, "flops": 1e9, "cpu_seconds": 7.0}}
    plot_curves([plan], {"language/models/k4-seed1/score": record}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_whole_run(tmp_path, monkeypatch):
    """All commands in this process, but for the first: starting each takes ten seconds."""

    def run_here(command, stdout, stderr, env):
        with redirect_stdout(stdout), redirect_stderr(stderr):
            return subprocess.CompletedProcess(command, main_of(command[2])(command[3:]) or 0)

    def run(command, **options):
        monkeypatch.setattr(plan.subprocess, "run", run_here)
        return subprocess_run(command, **options)

    subprocess_run = subprocess.run
    monkeypatch.setattr(plan.subprocess, "run", run)
    assert main(["--output", str(tmp_path), "--experiments", str(FILE)]) == 0
    records = json.loads((tmp_path / "experiments.json").read_text())
    ar, calm, initialised = (records[f"language/models/{name}-seed1/score"] for name in ("ar", "calm", "begun"))
    assert [record["cost"]["tokens"] for record in (ar, initialised)] == [2 * 4 * 32, 2 * 2 * 4 * 32]
    assert initialised["cost"]["cpu_seconds"] > ar["cost"]["cpu_seconds"] > 0
    assert calm["positions"] == 63 and 0 < calm["best_brierlm"] < 100
    low, high = calm["share_interval"]
    text = (tmp_path / "experiments.md").read_text()
    assert f"{calm['share']:.1%} ({low:.1%} to {high:.1%}, one model) | 5.72 |" in text
    replaced = next(line for line in text.splitlines() if line.startswith("| calm-seed1 |"))
    assert replaced.count("%") == 9  # nothing, head, head and backbone
