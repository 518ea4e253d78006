"""What the benchmarks measure with: time by part, peak memory, and the rate of a large product."""

from __future__ import annotations

import ctypes
import functools
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from calm_transformers.model.kernels_calm import fast_products

LIMIT_REPETITIONS = 5  # the rate is the best of so many tries
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


@contextmanager
def wrapped(owner, name: str, wrapper: Callable):
    """Puts `wrapper(method)` in the place of a method of this one object, for a while."""
    before = vars(owner).get(name)
    setattr(owner, name, wrapper(getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


@dataclass
class Meter:
    """Something that is read before and after a call: `difference(before, after)` is the call's share."""

    read: Callable[[], Any]
    difference: Callable[[Any, Any], float]

    @classmethod
    def clock(cls, device: torch.device) -> Meter:
        """Seconds. On a GPU between events in its stream: nothing waits, and an idle GPU counts as time too."""
        if device.type != "cuda":
            return cls(time.perf_counter, lambda before, after: after - before)

        def event():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        return cls(event, lambda before, after: before.elapsed_time(after) / 1000)


class Parts:
    """Reads a meter around each call of some methods.

    Args:
        meter: what to read.
        methods: part → (object, name of its method), or a list of several.
    """

    def __init__(self, meter: Meter, methods: Mapping[str, tuple[object, str] | list[tuple[object, str]]]):
        self.meter, self.methods = meter, methods
        self.readings = defaultdict(list)

    @contextmanager
    def measured(self):
        with ExitStack() as stack:
            for part, found in self.methods.items():
                for owner, name in found if isinstance(found, list) else [found]:
                    stack.enter_context(wrapped(owner, name, functools.partial(self._around, part)))
            yield

    def _around(self, part: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def call(*args, **kwargs):
            before = self.meter.read()
            result = method(*args, **kwargs)
            self.readings[part].append((before, self.meter.read()))
            return result

        return call

    def calls(self, part: str) -> list[float]:
        """The reading of each call, in order. On a GPU only after it was synchronised."""
        return [self.meter.difference(*reading) for reading in self.readings[part]]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


class PeakMemory:
    """Bytes that a `with` block needed at most beyond what was in use before it; None where that can't be read.

    On a GPU PyTorch's allocations; on Linux the process's resident memory (VmHWM, which the block resets).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.extra: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.before = self._before()
        return self

    def __exit__(self, *_) -> None:
        if self.before is None:
            return
        is_cuda = self.device.type == "cuda"
        self.extra = (torch.cuda.max_memory_allocated(self.device) if is_cuda else self._status("VmHWM")) - self.before

    def _before(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        try:
            # Memory that was freed but not given back would otherwise hide what the block needs.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
            return self._status("VmRSS")
        except (OSError, AttributeError):
            return None

    @staticmethod
    def _status(field: str) -> int:
        return int(Path("/proc/self/status").read_text(encoding="utf-8").split(f"{field}:")[1].split()[0]) * 1024


def flop_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product, at best."""
    size, seconds = MATMUL_SIZE[device.type], []
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    with torch.no_grad(), fast_products(size, size):
        for _ in range(LIMIT_REPETITIONS):
            synchronise(device)
            start = time.perf_counter()
            F.linear(matrix, matrix)
            synchronise(device)
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the module's parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
