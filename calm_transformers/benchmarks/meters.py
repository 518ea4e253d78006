"""Measurements for the benchmarks: time per method and peak memory."""

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
from unittest import mock

import torch
from torch import nn


@dataclass
class Meter:
    """A quantity read before and after a call; `difference(before, after)` is what the call took."""

    read: Callable[[], Any]
    difference: Callable[[Any, Any], float]

    @classmethod
    def clock(cls, device: torch.device) -> Meter:
        """Returns a meter of seconds. On a GPU it uses CUDA events, without host syncs; idle time counts too."""
        if device.type != "cuda":
            return cls(time.perf_counter, lambda before, after: after - before)

        def record_event():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        return cls(record_event, lambda before, after: before.elapsed_time(after) / 1000)


class MethodMeter:
    """Reads a meter before and after each call of given methods, while `measured` is active.

    Args:
        meter: to read.
        methods: part → (object, method name), or a list of these.
    """

    def __init__(self, meter: Meter, methods: Mapping[str, tuple[object, str] | list[tuple[object, str]]]):
        self.meter, self.methods = meter, methods
        self.readings = defaultdict(list)

    @contextmanager
    def measured(self):
        with ExitStack() as stack:
            for part, methods in self.methods.items():
                for owner, name in methods if isinstance(methods, list) else [methods]:
                    stack.enter_context(mock.patch.object(owner, name, self._metered(part, getattr(owner, name))))
            yield

    def _metered(self, part: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def call(*args, **kwargs):
            before = self.meter.read()
            result = method(*args, **kwargs)
            self.readings[part].append((before, self.meter.read()))
            return result

        return call

    def spent(self, part: str) -> list[float]:
        """Returns what each call of a part took, in order; synchronise a GPU first."""
        return [self.meter.difference(*reading) for reading in self.readings[part]]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


class PeakMemory:
    """Measures the peak memory of a `with` block beyond what was in use before: `extra` bytes, None if unknown.

    Uses PyTorch's allocations on a GPU, and on Linux the process's resident memory (VmHWM, which the block resets).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.extra: int | None = None

    def __enter__(self) -> PeakMemory:
        self.bytes_before = self._reset_peak()
        return self

    def __exit__(self, *_) -> None:
        if self.bytes_before is not None:
            is_cuda = self.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(self.device) if is_cuda else self._process_bytes("VmHWM")
            self.extra = peak - self.bytes_before

    def _reset_peak(self) -> int | None:
        """Resets the peak and returns the memory in use, None if unknown."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        try:
            # Otherwise freed memory that the allocator still holds would hide new allocations.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
            return self._process_bytes("VmRSS")
        except (OSError, AttributeError):
            return None

    @staticmethod
    def _process_bytes(field: str) -> int:
        return int(Path("/proc/self/status").read_text(encoding="utf-8").split(f"{field}:")[1].split()[0]) * 1024


def weight_bytes(module: nn.Module) -> int:
    """Returns the bytes of a module's parameters, counting tied ones once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
