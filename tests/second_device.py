"""A second device without a GPU: its tensors compute on the CPU, but are "emulated:0" and may not meet the CPU's.

A test under `@on_second_device` runs in a forked process, for PyTorch can't unregister a device. There:

- An op on tensors of both devices raises, unless it copies, indexes, or takes a number (a tensor without axes).
- A generator belongs to one device. The device's draws what the CPU's does: the same seeds give the same numbers.
- `waits` names what the host would wait for on a GPU: values and shapes that it reads, and copies that block.
"""

import functools
import multiprocessing
import os
import sys

import torch
from torch import Tensor, nn
from torch.utils import backend_registration

from calm_transformers.benchmarks.operations import DispatchCounter
from calm_transformers.model import modeling_calm_autoencoder

NAME, ATEN, PLAIN_GENERATOR = "emulated", torch.ops.aten, torch.Generator
RESIZING = (ATEN.arange.default, ATEN.arange.start, ATEN.arange.start_step, ATEN.eye.default, ATEN.eye.m)
INDEXING = (ATEN.index, ATEN.index_put, ATEN.index_put_)  # take the CPU's indices
device_generators: set[int] = set()  # their addresses
waits: list[str] = []
libraries: list = []  # to be kept


def on_second_device(test):
    """Lets a test run in a forked process that has the device; its traceback is on stderr."""

    @functools.wraps(test)
    def in_fork(*args, **kwargs):
        child = multiprocessing.get_context("fork").Process(target=lambda: (install(), test(*args, **kwargs)))
        child.start()
        child.join()
        assert child.exitcode == 0

    return in_fork


class EmulatedTensor(Tensor):
    """A tensor on the device; `raw` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        self = Tensor._make_wrapper_subclass(cls, raw.shape, device=torch.device(NAME, 0), **layout)
        self.raw = raw
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, *args, **(kwargs or {}))

    def __getitem__(self, index):
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index, values):
        super().__setitem__(_with_tensors(index), values)

    def tolist(self):
        return self.cpu().tolist()


def _with_tensors(index):
    """Returns an index with tensors in place of lists, which PyTorch can't index a subclass with."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, list | range) else part for part in parts)


class Generator(PLAIN_GENERATOR):
    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        (device_generators.add if torch.device(device).type == NAME else device_generators.discard)(self._cdata)
        return self

    device = property(lambda self: torch.device(NAME if self._cdata in device_generators else "cpu"))


def compute(op, *args, **kwargs):
    """Returns an op's result, computed on the CPU; raises RuntimeError for tensors or a generator of two devices."""
    of_device, of_cpu = {}, []

    def unwrap(x):
        if isinstance(x, EmulatedTensor):
            of_device[id(x.raw)] = x
            return x.raw
        if isinstance(x, list | tuple):
            return type(x)(map(unwrap, x))
        if isinstance(x, Tensor) and x.dim():
            of_cpu.append(x)
        if isinstance(x, PLAIN_GENERATOR) and x._cdata not in device_generators:
            raise RuntimeError(f"{op}: a CPU's generator on {NAME}")
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x

    def wrap(x):
        if isinstance(x, list | tuple):
            return type(x)(map(wrap, x))
        if not isinstance(x, Tensor):
            return x
        return of_device[id(x)] if id(x) in of_device else EmulatedTensor(x)  # the same object, after an op in place

    raw_args, raw_kwargs = unwrap(args), {name: unwrap(value) for name, value in kwargs.items()}
    is_on_device = [isinstance(x, EmulatedTensor) for x in args[:2]]
    copies = op is ATEN.copy_.default
    if of_device and of_cpu and not copies and not (op.overloadpacket in INDEXING and is_on_device[0]):
        raise RuntimeError(f"{op}: tensors of two devices")
    leaves = kwargs.get("device") == torch.device("cpu") or (copies and not is_on_device[0])
    blocks = copies and is_on_device[0] != is_on_device[1] and not (args[2:] or kwargs.get("non_blocking"))
    if blocks or (leaves and op is ATEN._to_copy.default) or DispatchCounter._is_host_sync(op, raw_args):
        frame = sys._getframe()
        while frame.f_code.co_filename == __file__ or f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame.f_code.co_name != "as_tensor":  # which doesn't block on CUDA
            waits.append(f"{op}, {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
    result = op(*raw_args, **raw_kwargs)
    assert all(x.shape == x.raw.shape for x in of_device.values()), f"{op} resized a tensor, which is not emulated"
    return result if leaves else wrap(result)


def install():
    """Registers the device in this process, for good."""
    backend = backend_registration._DummyBackendModule()
    backend.get_amp_supported_dtype = lambda: [torch.float32, torch.bfloat16]
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=backend)
    fallback, aten = (torch.library.Library(name, "IMPL", "PrivateUse1") for name in ("_", "aten"))
    fallback.fallback(compute)
    for op in RESIZING:
        aten.impl(op, functools.partial(compute, op))
    for name in ("tensor", "as_tensor"):  # the only ones that bypass the dispatcher
        setattr(torch, name, functools.partial(_make_and_copy, getattr(torch, name)))
    torch.Generator = Generator
    torch.autograd.set_multithreading_enabled(False)  # the engine's threads may have been started without the device
    # The weights are of another class, but neither quantised nor offloaded.
    modeling_calm_autoencoder.is_plain_linear = lambda layer: type(layer) is nn.Linear
    libraries.extend([fallback, aten])


def _make_and_copy(make, *args, device=None, **kwargs):
    tensor = make(*args, **kwargs)
    return tensor if device is None else tensor.to(device)
