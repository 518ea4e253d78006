"""Small tables: real ones are kept, those of a trace are not; copies to other devices outlive their source."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from calm.diffusion_head_calm import diffusion_schedule
from calm.flow_head_calm import solver_times
from calm.tables_calm import numbers_up_to, to_device

CPU = torch.device("cpu")
TABLES = {
    "numbers": lambda size: numbers_up_to(size, CPU),
    "times": lambda size: solver_times(size, CPU),
    "schedule": lambda size: diffusion_schedule(size, CPU).log_betas,
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_trace_neither_gets_a_kept_table_nor_leaves_one(kind):
    make, sizes = TABLES[kind], (971, 972)
    kept = make(sizes[0])
    with FakeTensorMode():
        assert all(isinstance(make(size), FakeTensor) for size in sizes)
    assert type(make(sizes[1])) is torch.Tensor and make(sizes[0]) is kept


def test_a_table_of_inference_mode_is_used_in_training():
    with torch.inference_mode():
        numbers_up_to(973, CPU)
    (numbers_up_to(973, CPU) * torch.ones(973, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(("device", "waits_not"), [("cuda", True), ("mps", False), ("xpu", False), ("cpu", False)])
def test_only_cuda_copies_without_waiting(monkeypatch, device, waits_not):
    seen = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: seen.append(non_blocking))
    to_device([1, 2], torch.device(device))
    assert seen == [waits_not]
