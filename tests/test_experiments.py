"""`python -m calm.experiments`: the plan resolves, what is finished is skipped, what was cut short goes on, the tables
say what was measured."""

import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import write_corpus

from calm.command_line import InputError
from calm.experiments.__main__ import main
from calm.experiments.curves import GROUP, curves, draw
from calm.experiments.plan import FOLDER, Plan
from calm.experiments.report import NOT_ASKED, TEMPLATE, Measured, comparison, direction, document, studies
from calm.experiments.results import Results, digest, totals
from calm.experiments.stages import command, is_finished, read_score, result_file, run

FILE = Path(__file__).parent / "fixtures" / "experiments.yaml"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for part in ("train", "validation"):
        text = write_corpus(folder / "text.jsonl", seed=len(part)).read_bytes()
        (folder / f"books-{part}.jsonl.xz").write_bytes(lzma.compress(text))
    return folder


def plan_in(corpus, output, max_steps=4, file=FILE) -> Plan:
    return Plan(file, output / file.stem, corpus, max_steps)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The group "loss": begun, killed with all its processes at a training's first checkpoint, and run to its end.

    Slow: ten processes, each of which imports transformers.
    """
    output = tmp_path_factory.mktemp("runs")
    words = ["--corpus", corpus, "--output", output, "--experiments", FILE, "--max_steps", 4, "--only", "loss"]
    words = [str(word) for word in words]
    command = [sys.executable, "-m", "calm.experiments", *words]
    killed = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (output / "experiments" / "models" / "calm" / "checkpoint-2" / "trainer_state.json").exists():
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    assert main(words) == 0
    return output


# the plan


def test_stages_come_after_what_they_need_and_once(corpus, tmp_path):
    plan = plan_in(corpus, tmp_path)
    stages = plan.of_groups(None)
    names = [stage.name for stage in stages]
    assert len(names) == len(set(names)) == 15
    assert all(names.index(need) < names.index(stage.name) for stage in stages for need in stage.needs)
    assert {"models/calm-k2-seed1", "models/calm-k2-seed2", "autoencoders/k2/noise"} <= set(names)
    assert "models/ar" not in [stage.name for stage in plan.of_groups(["loss"])]


def test_every_model_is_scored_on_the_same_text(corpus, tmp_path):
    stages = plan_in(corpus, tmp_path).stages
    positions = {
        name: stages[f"models/{name}/score"].options["max_positions"] for name in ("ar", "calm", "calm-k2-seed1")
    }
    assert positions == {"ar": 4 * 28, "calm": 4 * 7, "calm-k2-seed1": 4 * 14}


def test_a_second_phase_counts_what_came_before(corpus, tmp_path):
    plan = plan_in(corpus, tmp_path)
    second = plan.stages["models/second-phase"]
    assert [phase.name for phase in plan.phases(second)] == ["models/calm", "models/second-phase"]
    config = plan.config(second)
    assert (config.hidden_size, config.beta, config.vocab_size, config.latent_size) == (32, 1.5, 300, 8)


def test_a_model_begun_with_a_llama_costs_what_the_same_from_nothing_costs(corpus, tmp_path):
    plan = plan_in(corpus, tmp_path, max_steps=None, file=FOLDER / "stories.yaml")
    begun, plain = plan.stages["models/begun-flow-seed1"], plan.stages["models/flow-quarter-seed1"]
    assert [phase.name for phase in plan.phases(begun)] == ["models/ar-seed1", "models/begun-flow-seed1"]
    assert plan.cost(begun) == plan.cost(plain)
    assert plan.config(begun).hidden_size == 128


def test_documents_end_in_the_scores_where_they_end_in_the_training(corpus, tmp_path):
    plan = plan_in(corpus, tmp_path, max_steps=None, file=FOLDER / "stories.yaml")
    assert plan.stages["models/ar-seed1"].resolved().data.append_eos
    words = command(plan, plan.stages["models/ar-seed1/score"])
    assert "--append_eos" in words and "None" not in words


def test_the_commands_are_the_training_commands(corpus, tmp_path):
    plan = plan_in(corpus, tmp_path)
    words = command(plan, plan.stages["models/calm"])
    assert words[1:5] == ["-m", "calm.training.train_calm", "--recipe", str(FOLDER / "recipes" / "stories-calm.yaml")]
    assert words[words.index("--autoencoder") + 1] == str(tmp_path / "experiments" / "autoencoders" / "k4")
    assert words[words.index("--max_steps") + 1] == "4"


@pytest.mark.parametrize("name", ["language", "stories"])
def test_the_real_files_are_plans(corpus, tmp_path, name):
    """Every recipe and configuration in them is accepted, and every table has its place in the document."""
    plan = plan_in(corpus, tmp_path, max_steps=None, file=FOLDER / f"{name}.yaml")
    assert all(plan.cost(s).trainable > 0 for s in plan.stages.values() if s.kind in ("autoencoder", "calm", "ar"))
    assert all(f"{{{group}}}" in TEMPLATE.read_text() for group in plan.groups)
    written = document([plan], Results([plan]))
    assert "{" not in written and written.count(NOT_ASKED) > 0  # of the other plan


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("model: ar,", "model: art,", InputError, "models: there is no 'art', only ar, calm"),
        ("autoencoder: k4", "autoencoder: k8", InputError, "autoencoders: there is no 'k8', only k4, k2"),
        ("beta: 1.5", "betta: 1.5", InputError, "unknown field 'betta': did you mean beta"),
    ],
)
def test_a_wrong_name_is_refused_before_any_work(corpus, tmp_path, old, new, error, message):
    file = tmp_path / "experiments.yaml"
    file.write_text(FILE.read_text().replace(old, new))
    with pytest.raises(error, match=message):
        plan_in(corpus, tmp_path, file=file)


def test_whole_comparisons_come_before_the_next_seed(corpus, tmp_path):
    file = tmp_path / "experiments.yaml"
    file.write_text(
        FILE.read_text()
        .replace("second-phase: {", "second-phase: {seeds: [1, 2], ")
        .replace("calm: &calm {", "calm: &calm {seeds: [1, 2], ")
    )
    names = [stage.name for stage in plan_in(corpus, tmp_path, file=file).of_groups(["loss"]) if stage.kind == "score"]
    models = [name.split("/")[1] for name in names]
    assert models == ["calm-seed1", "second-phase-seed1", "calm-seed2", "second-phase-seed2"]


def test_an_unknown_group_is_refused(corpus, tmp_path, capsys):
    arguments = ["--corpus", str(corpus), "--output", str(tmp_path / "x"), "--experiments", str(FILE)]
    assert main([*arguments, "--only", "head"]) == 2
    assert "no group 'head': the groups are lengths, loss" in capsys.readouterr().err


def test_a_missing_corpus_is_an_error(tmp_path, capsys):
    arguments = ["--corpus", str(tmp_path), "--output", str(tmp_path / "x"), "--experiments", str(FILE)]
    assert main(arguments) == 2
    assert "books-train.jsonl.xz: no such file. Give --corpus" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(arguments[2:]) == 2
    assert "experiments.yaml is about text files: give --corpus" in capsys.readouterr().err


def test_dry_run_prints_sizes_and_starts_nothing(corpus, tmp_path, capsys):
    assert (
        main(["--corpus", str(corpus), "--output", str(tmp_path / "x"), "--experiments", str(FILE), "--dry_run"]) == 0
    )
    printed = capsys.readouterr().out
    assert "| models/calm-k2-seed2 | 0.0" in printed and "15/15 " in printed
    assert not (tmp_path / "x").exists()


# running


def test_a_killed_run_goes_on_where_it_was(finished):
    models = finished / "experiments" / "models"
    log = (models / "calm.log").read_text()
    assert log.count("from the start") == 1 and log.count("resuming from checkpoint-") == 1
    state = json.loads((models / "calm" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    assert (finished / "experiments.md").read_text().startswith("# ")
    measured = ["autoencoders/k4/noise", "models/calm/score", "models/second-phase/score"]
    assert list(json.loads((finished / "experiments.json").read_text())) == [
        f"experiments/{name}" for name in measured
    ]


def test_what_is_finished_is_skipped(finished, corpus, capsys):
    plan = plan_in(corpus, finished)
    times = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "lock"}
    assert run(plan, plan.of_groups(["loss"]), threads=1) == []
    assert capsys.readouterr().out.count("finished before") == 7
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "lock"} == times
    assert not list(finished.rglob("*.unfinished"))


def test_a_score_of_another_text_is_made_again(finished, corpus):
    plan = plan_in(corpus, finished)
    stage = plan.stages["models/calm/score"]
    assert is_finished(plan, stage)
    plan.evaluation = {**plan.evaluation, "block_size": 16}
    assert not is_finished(plan, stage)
    plan.evaluation = {**plan.evaluation, "block_size": 32}
    stage.options["max_positions"] += 1
    assert not is_finished(plan, stage)


def test_another_recipe_is_not_taken_for_this_one(finished, corpus):
    with pytest.raises(
        InputError, match=r"autoencoders/k4 was trained by another recipe"
    ):
        plan = plan_in(corpus, finished, max_steps=5)
        run(plan, plan.of_groups(["loss"]), threads=1)


def test_two_runs_do_not_share_a_folder(finished, corpus):
    import fcntl

    plan = plan_in(corpus, finished)
    with (plan.output / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run works there"):
            run(plan, [], threads=1)


def test_a_failure_is_named_and_what_needs_it_left_out(corpus, tmp_path, capsys, monkeypatch):
    plan = plan_in(corpus, tmp_path)
    stages = plan.of_groups(["loss"])
    monkeypatch.setattr("calm.experiments.stages.command", lambda *_: [sys.executable, "-c", "raise SystemExit(2)"])
    failed = run(plan, stages, threads=1)
    assert failed == [stage.name for stage in stages]
    output = capsys.readouterr()
    assert "failed with exit code 2, see" in output.err
    assert "models/second-phase/score: left out, for models/second-phase failed" in output.out


# the document


def test_the_table_holds_the_scores(finished, corpus):
    plan = plan_in(corpus, finished)
    score = read_score(result_file(plan, plan.stages["models/calm/score"]))["brierlm"]
    first, second = comparison(plan, plan.tables[1], Results([plan])).splitlines()[2:]
    assert f"| {score['value']:.2f} | ({score['low']:.2f} to {score['high']:.2f}) |" in first
    assert first.startswith("| β = 1 | 0.00 M |") and first.endswith("| 4.70 |  |")
    assert second.startswith("| then β = 1.5 | 0.00 M |") and "| 4.46 | " in second
    alone, both = (totals(plan, plan.stages[f"models/{name}"]) for name in ("calm", "second-phase"))
    assert (alone["tokens"], both["tokens"]) == (4 * 4 * 32, 2 * 4 * 4 * 32)
    assert both["cpu_seconds"] > alone["cpu_seconds"] > 0


def test_what_was_not_run_is_said(finished, corpus):
    plan = plan_in(corpus, finished)
    lines = comparison(plan, plan.tables[0], Results([plan])).splitlines()[2:]
    assert lines[0].startswith("| AR | not run yet |") and lines[0].endswith("| 6.05 |  |")
    assert lines[2].startswith("| K = 2 | not run yet |")
    assert lines[3].startswith("| K = 3 | not asked for |")


def test_of_the_sharpening_studies_those_not_run_are_named(tmp_path):
    plan = Plan(FOLDER / "language.yaml", tmp_path, None)
    results = Results([plan])
    assert studies(plan, results)["sharpening"].split("\n\n")[0] == "k4-seed1: not run yet."
    name = "language/models/flow-seed1/sharpening"
    results.records[name] = json.loads((FOLDER.parent / "docs" / "experiments.json").read_text())[name]
    text = studies(plan, results)["sharpening"]
    assert "| true law, recorded | flow-seed1 |" in text
    assert text.endswith("k4-seed1: not run yet.\n\ntargets-seed1: not run yet.")


def test_seeds_are_averaged(finished, corpus):
    plan = plan_in(corpus, finished)
    results = Results([plan])
    for seed, value in ((1, 2.0), (2, 4.0)):
        record = {"brierlm": {"value": value, "low": value - 1, "high": value + 1}}
        cost = {"tokens": seed * 1e6, "flops": 1e9, "cpu_seconds": 7.0}
        results.records[f"experiments/models/calm-k2-seed{seed}/score"] = record | {"cost": cost}
    line = comparison(plan, plan.tables[0], results).splitlines()[4]
    assert line.startswith("| K = 2 | 1.50 M | 1.0e+09 | 7 | 3.00 | (2.00 to 4.00, 2 seeds) |")


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ([0.01, 0.02], "below: agrees"),
        ([0.31, 0.32], "above: against the paper"),
        ([0.05, 0.15], "within the intervals"),
    ],
)
def test_direction(interval, verdict):
    row, reference = (Measured(0.0, *bounds, 0.0, 1, {}) for bounds in (interval, [0.1, 0.3]))
    assert direction(row, reference, 5.72, 6.05) == verdict
    assert direction(row, None, 5.72, 6.05) == ""


def test_rows_of_one_label_are_a_curve(finished, corpus, tmp_path):
    """With several seeds the lowest and the highest are its error bars; the picture is written."""
    plan = plan_in(corpus, finished)
    results, table = Results([plan]), plan.tables[0]
    for row in table.rows:
        row.label = "one"
    for name, value, tokens in (("ar", 1.0, 2e6), ("calm", 3.0, 1e6), ("calm-k2-seed1", 2.0, 3e6)):
        record = {"brierlm": {"value": value, "low": value - 1, "high": value + 1}}
        record["cost"] = {"tokens": tokens, "flops": 1e9, "cpu_seconds": 7.0}
        results.records[f"experiments/models/{name}/score"] = record
    [(label, points)] = curves(plan, table, results).items()
    assert (label, [point.score for point in points]) == ("one", [3.0, 1.0, 2.0])
    table.group = GROUP
    draw([plan], results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [tmp_path / "curves.png"]


# the language


@pytest.fixture(scope="module")
def language_run(tmp_path_factory):
    """All of a tiny plan on a language, from nothing. Slow: a dozen processes, each of which imports transformers."""
    output = tmp_path_factory.mktemp("language")
    words = ["--experiments", str(FILE.with_name("language.yaml")), "--output", str(output), "--max_steps", "2"]
    assert main(words) == 0
    return output


def test_the_tables_on_a_language_need_no_corpus(language_run):
    plan = Plan(FILE.with_name("language.yaml"), language_run / "language", max_steps=2)
    results = Results([plan])
    assert results.missing(plan, plan.of_groups(None)) == []
    ar, calm, begun = comparison(plan, plan.tables[0], results).splitlines()[2:]
    record = results.get(plan, plan.stages["models/calm-seed1/score"])
    assert record is not None and record["positions"] == 63 and 0 < record["best_brierlm"] < 100
    low, high = record["share_interval"]
    assert f"| {record['share']:.1%} ({low:.1%} to {high:.1%}) | 5.72 | " in calm
    assert ar.startswith("| AR | 0.00 M |") and begun.startswith("| K = 4, begun with AR | 0.00 M |")
    costs = [results.records[f"language/models/{name}-seed1/score"]["cost"]["tokens"] for name in ("ar", "begun")]
    assert costs == [2 * 4 * 32, 2 * 2 * 4 * 32]
    [line] = studies(plan, results)["replacements"].splitlines()[2:]
    assert line.startswith("| calm-seed1 | ") and line.count("%") == 9  # as it is, head, head and backbone


def test_a_language_that_is_half_written_is_written_again(language_run):
    """Its tokenizer is there before language.json is."""
    plan = Plan(FILE.with_name("language.yaml"), language_run / "language", max_steps=2)
    marker = result_file(plan, plan.stages["language"])
    before = marker.read_bytes()
    marker.unlink()
    assert (marker.parent / "tokenizer_config.json").exists() and not is_finished(plan, plan.stages["language"])
    assert run(plan, [plan.stages["language"]]) == []
    assert marker.read_bytes() == before


# records


def test_records_stand_in_for_the_models(finished, corpus, tmp_path):
    """The document can be written, and nothing is trained again, where only the records are left."""
    before = plan_in(corpus, finished)
    written = document([before], Results([before]))
    elsewhere = plan_in(corpus, tmp_path)
    results = Results([elsewhere], reuse=finished / "experiments.json")
    assert document([elsewhere], results) == written
    assert results.missing(elsewhere, elsewhere.of_groups(["loss"])) == []
    assert Results([elsewhere]).missing(elsewhere, elsewhere.of_groups(["loss"])) == elsewhere.of_groups(["loss"])


def test_a_record_of_another_recipe_does_not_count(finished, corpus, tmp_path):
    changed = tmp_path / "experiments.yaml"
    changed.write_text(FILE.read_text().replace("beta: 1.5", "beta: 1.25"))
    plan = plan_in(corpus, tmp_path, file=changed)
    results = Results([plan], reuse=finished / "experiments.json")
    missing = [stage.name for stage in results.missing(plan, plan.of_groups(["loss"]))]
    assert "models/second-phase/score" in missing and "models/calm/score" not in missing
    same = plan_in(corpus, finished)
    name = "models/calm/score"
    assert digest(plan, plan.stages[name]) == digest(same, same.stages[name])
