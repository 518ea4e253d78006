"""What a step dispatches and waits for is counted rightly, and stays within its budget."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from commands import refusal
from packaging.version import Version

from calm_transformers.benchmarks import operations
from calm_transformers.benchmarks.operations import OperationCounter, cases, count_all, update_budget
from calm_transformers.command_line import InputError

HEADS = ["energy", "token_chain"]
BUDGET_FILE = Path(__file__).parent / "operations_budget.json"


def counted(work):
    with OperationCounter() as counter:
        work()
    return counter.operations, counter.waits


def test_views_are_no_operations():
    x = torch.ones(4, 4)
    assert counted(lambda: x.view(16).unflatten(0, (2, 8)).T[:, 0]) == (0, 0)
    assert counted(lambda: x.add(1).mul_(2).view(16)) == (2, 0)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.unique(),
        lambda x: x.index_put_((x > 1,), torch.tensor(0)),
    ],
)
def test_what_the_host_must_know_is_a_wait(wait):
    assert counted(lambda: wait(torch.tensor([1, 2])))[1] == 1


def test_what_stays_on_the_device_is_none():
    index = torch.tensor([1, 0])
    assert counted(lambda: index[index].sum().add(torch.zeros(2)[index].amax())) == (6, 0)


@pytest.fixture(scope="module")
def rows():
    return {row["case"]: row for row in count_all("calm-m", "transformer-s", HEADS)}


def test_no_case_is_above_its_budget(rows):
    budget = json.loads(BUDGET_FILE.read_text())
    if Version(transformers.__version__) < Version("5.20"):  # upstream's rotations are one operation more there
        budget = {name: {**figures, "operations": figures["operations"] + 1} for name, figures in budget.items()}
    assert set(rows) == {case.name for case in cases(HEADS)}
    assert {name for name in rows if not name.startswith(operations.BASELINE)} <= set(budget)
    assert operations.check_budget(list(rows.values()), budget) == []


def test_the_budgets_of_a_gpu(rows):
    """T = 1, and T < 1 in one block, of CALM-M with the published head, against four tokens of Transformer-S."""
    one, adaptive = rows["energy, T = 1"], rows["energy, T = 0.5, adaptive"]
    assert one["operations"] <= 830 and one["waits"] <= 2
    assert adaptive["operations"] <= 860 and adaptive["waits"] <= 3
    assert adaptive["of_baseline"] <= 0.38
    assert rows["energy, T = 0.5, adaptive, two blocks"]["waits"] - adaptive["waits"] <= 2


def test_parts_and_baseline_belong_together(rows):
    baseline, step = rows["baseline, T = 1"], rows["energy, T = 1"]
    assert baseline["operations"] > baseline["backbone"] and baseline["of_baseline"] == 1
    assert step["backbone"] + step["choice"] <= step["operations"] < step["backbone"] + step["choice"] + 20
    assert step["head"] + step["decode"] < step["choice"]
    assert step["of_baseline"] == pytest.approx(step["operations"] / baseline["operations"], abs=1e-3)


def row(case, num_operations, waits):
    return {"case": case, "operations": num_operations, "waits": waits}


def test_a_budget_can_only_fall(tmp_path):
    path = tmp_path / "budget.json"
    update_budget([row("a", 100, 2), row("b", 50, 1)], path)
    update_budget([row("a", 90, 2)], path)
    assert json.loads(path.read_text()) == {"a": {"operations": 90, "waits": 2}, "b": {"operations": 50, "waits": 1}}
    before = path.read_text()
    with pytest.raises(InputError, match="a: 91 operations a step, the budget is 90"):
        update_budget([row("a", 91, 2), row("b", 40, 1)], path)
    with pytest.raises(InputError, match="b: 2 waits a step, the budget is 1"):
        update_budget([row("b", 50, 2)], path)
    assert path.read_text() == before


def test_the_command_prints_a_table_and_keeps_the_budget(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(operations, "cases", lambda heads: [*cases([])] + [next(c for c in cases(heads) if c.head)])
    operations.main(["--head", "energy", "--budget", str(tmp_path / "budget.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| case | operations |") and lines[-1].startswith("| energy, T = 1 | ")
    assert set(json.loads((tmp_path / "budget.json").read_text())) == {"energy, T = 1"}


@pytest.mark.parametrize("options", [["--shape", "transformer-s"], ["--baseline", "calm-m"], ["--head", "nothing"]])
def test_bad_options_are_refused(options, capsys):
    assert options[-1] in refusal(capsys, operations.main, *options)
