"""Dispatched ops and host syncs of a step are counted correctly, and stay within their budget."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from commands import refusal
from packaging.version import Version

from calm_transformers.benchmarks import operations
from calm_transformers.benchmarks.operations import DispatchCounter, cases, count_all, update_budget
from calm_transformers.command_line import InputError

BUDGET_FILE = Path(__file__).parent / "operations_budget.json"
INDEX = torch.tensor([1, 0])


@pytest.mark.parametrize(
    "work, expected",
    [
        (lambda x: x.view(2, 1).T.unflatten(1, (2, 1))[:, 0], (0, 0)),  # views are not counted
        (lambda x: x.add(1).mul_(2).view(2, 1), (2, 0)),
        (lambda x: INDEX[INDEX].sum().add(torch.zeros(2)[INDEX].amax()), (6, 0)),
        *((sync, (None, 1)) for sync in (lambda x: x[0].item(), lambda x: bool(x.any()), lambda x: x.tolist())),
        *((sync, (None, 1)) for sync in (lambda x: x.cpu(), lambda x: x.numpy(), lambda x: x.nonzero())),
        *((sync, (None, 1)) for sync in (lambda x: x[x > 1], lambda x: x.masked_select(x > 1), torch.unique)),
        (lambda x: x.index_put_((x > 1,), torch.tensor(0)), (None, 1)),
    ],
)
def test_counts_of_dispatched_ops_and_host_syncs(work, expected):
    x = torch.tensor([1, 2])
    with DispatchCounter() as counter:
        work(x)
    assert counter.host_syncs == expected[1] and expected[0] in (None, counter.dispatched_ops)


@pytest.mark.parametrize("head", ["energy", pytest.param("token_chain", marks=pytest.mark.slow)])
def test_no_case_is_above_its_budget(head):
    rows = {row["case"]: row for row in count_all("calm-m", "transformer-s", [head])}
    budget = json.loads(BUDGET_FILE.read_text())
    if Version(transformers.__version__) < Version("5.20"):  # the rotary embedding dispatches one op more there
        budget = {name: {**figures, "operations": figures["operations"] + 1} for name, figures in budget.items()}
    assert set(rows) == {case.name for case in cases([head])}
    assert {name for name in rows if not name.startswith(operations.BASELINE)} <= set(budget)
    assert operations.check_budget(list(rows.values()), budget) == []
    baseline, step, adaptive = rows["baseline, T = 1"], rows[f"{head}, T = 1"], rows[f"{head}, T = 0.5, adaptive"]
    assert adaptive["of_baseline"] <= 0.38
    more_waits = rows[f"{head}, T = 0.5, adaptive, two blocks"]["waits"] - adaptive["waits"]
    assert more_waits <= (2 if head == "energy" else 4)
    assert baseline["operations"] > baseline["backbone"] and baseline["of_baseline"] == 1
    assert step["backbone"] + step["choice"] <= step["operations"] < step["backbone"] + step["choice"] + 20
    assert step["head"] + step["decode"] < step["choice"]
    assert step["of_baseline"] == pytest.approx(step["operations"] / baseline["operations"], abs=1e-3)


def row(case, dispatched_ops, host_syncs):
    return {"case": case, "operations": dispatched_ops, "waits": host_syncs}


def test_a_budget_is_only_lowered(tmp_path):
    path = tmp_path / "budget.json"
    update_budget([row("a", 100, 2), row("b", 50, 1)], path)
    update_budget([row("a", 90, 2)], path)
    assert json.loads(path.read_text()) == {"a": {"operations": 90, "waits": 2}, "b": {"operations": 50, "waits": 1}}
    before = path.read_text()
    for rows, message in (
        ([row("a", 91, 2), row("b", 40, 1)], "a: 91 dispatched ops per step, the budget is 90"),
        ([row("b", 50, 2)], "b: 2 host syncs per step, the budget is 1"),
    ):
        with pytest.raises(InputError, match=message):
            update_budget(rows, path)
        assert path.read_text() == before


def test_the_command_prints_a_table_and_updates_the_budget(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(operations, "cases", lambda heads: [*cases([])] + [next(c for c in cases(heads) if c.head)])
    operations.main(["--head", "energy", "--budget", str(tmp_path / "budget.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| case | dispatched ops |") and lines[-1].startswith("| energy, T = 1 | ")
    assert set(json.loads((tmp_path / "budget.json").read_text())) == {"energy, T = 1"}
    for options in (["--shape", "transformer-s"], ["--baseline", "calm-m"], ["--head", "nothing"]):
        assert options[-1] in refusal(capsys, operations.main, *options)
