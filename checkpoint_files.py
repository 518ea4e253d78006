"""Reads published repositories and writes new ones, for `convert_checkpoint.py` and `export_onnx.py`.

Values are read and written one tensor at a time, so that memory holds one tensor and not the model.
"""

import json
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from safetensors import safe_open

from calm.command_line import InputError
from calm.progress import progress_bar

SAFETENSORS_TAGS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_TAGS}

REMAP_BYTES = 2**26  # read through one mapping


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class WeightsFile:
    """A .safetensors or .bin file, mapped to memory, whose tensors are read one by one.

    What has been read of a mapping stays in memory until it is closed, so after some reading the file is mapped anew.

    Raises:
        InputError: the file is truncated or damaged, or holds anything but tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._map()
        if path.suffix == ".bin" and zipfile.is_zipfile(path):  # other formats have no checksums
            check_archive(path)

    def _map(self) -> None:
        self._bytes_read = 0
        if self.path.suffix == ".bin":
            self._pickled = load_pickle(self.path)
            return
        try:
            self._safe = safe_open(self.path, "pt")
        except Exception as error:  # SafetensorError and OSError have no narrower class in common
            raise InputError(f"{self.path} cannot be read, is it complete? ({first_line(error)})") from None

    def list(self) -> list["StoredTensor"]:
        """Its tensors, without their values.

        Raises:
            InputError: one is not of a floating-point type that models come in.
        """
        if self.path.suffix == ".bin":
            found = [(name, tensor.shape, tensor.dtype) for name, tensor in self._pickled.items()]
        else:
            dtypes = {tag: dtype for dtype, tag in SAFETENSORS_TAGS.items()}
            views = {name: self._safe.get_slice(name) for name in self._safe.keys()}
            found = [
                (n, view.get_shape(), dtypes.get(view.get_dtype(), view.get_dtype())) for n, view in views.items()
            ]
        stored = []
        for name, shape, dtype in found:
            if not isinstance(dtype, torch.dtype) or dtype not in SAFETENSORS_TAGS:
                raise InputError(f"{self.path}: tensor {name} is of type {dtype}, none of {', '.join(DTYPES)}.")
            stored.append(StoredTensor(self, name, tuple(shape), dtype))
        return stored

    def read(self, name: str) -> torch.Tensor:
        if self._bytes_read > REMAP_BYTES:
            self._map()
        tensor = self._pickled[name] if self.path.suffix == ".bin" else self._safe.get_tensor(name)
        self._bytes_read += tensor.nbytes
        return tensor


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    file: WeightsFile
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self):
        return f"tensor {self.name} {self.shape} in {self.file.path}"

    def read(self) -> torch.Tensor:
        return self.file.read(self.name)


def check_archive(path: Path) -> None:
    """Compares a zip archive with its checksums, which reading it mapped to memory doesn't.

    Raises:
        InputError: a member is not what was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    while member.CRC and file.read(2**20):  # 0 where torch.save was told to compute none
                        pass
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is damaged, fetch it anew: {error}.") from None


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch.save wrote, mapped to memory; nothing else in it is executed or created.

    Raises:
        InputError: the file is truncated, or holds anything but a dictionary of tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds pickled objects other than tensors and was not loaded.") from None
    except Exception as error:  # torch has no common class for what can be wrong with a file
        raise InputError(f"{path} cannot be read, is it complete? ({first_line(error)})") from None
    if not isinstance(tensors, dict):
        raise InputError(f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise InputError(f"{path}: {name} is not the name of a dense tensor.")
    return tensors


class Repository:
    """A published repository, a folder or on the Hub: its `config` and `tensors` (name → `StoredTensor`).

    Args:
        id_or_folder: its Hub id or folder.
        what: it should hold, for messages: "language model" or "autoencoder".

    Raises:
        InputError: a file is missing, unreadable or truncated.
    """

    def __init__(self, id_or_folder: str, what: str):
        self.folder = fetch(id_or_folder, ["*.json", "*.jinja", "model*.safetensors"], what)
        self.is_on_hub = not Path(id_or_folder).is_dir()
        if self.is_on_hub and not any(self.folder.glob("*.safetensors")):
            self.folder = fetch(id_or_folder, ["*.json", "*.jinja", "pytorch_model*.bin"], what)
        self.name = id_or_folder if self.is_on_hub else self.folder.resolve().name
        self.config_path = self.folder / "config.json"
        if not self.config_path.is_file():
            raise InputError(f"{self.config_path} does not exist: name the repository that holds the {what}.")
        self.config = read_json(self.config_path)
        self.weights, files = find_weights(self.folder)
        self.tensors: dict[str, StoredTensor] = {}
        for stored in (stored for path in files for stored in WeightsFile(path).list()):
            if stored.name in self.tensors:
                raise InputError(f"The {stored} is in {self.tensors[stored.name].file.path} too.")
            self.tensors[stored.name] = stored

    def matrix(self, name: str) -> StoredTensor:
        """The stored tensor of this name, which must be a matrix."""
        if name not in self.tensors:
            raise InputError(f"{self.weights} lacks the tensor {name}.")
        if len(self.tensors[name].shape) != 2:
            raise InputError(f"{self.tensors[name]} should be a matrix.")
        return self.tensors[name]

    def count_layers(self, prefix: str) -> tuple[int, StoredTensor]:
        """How many layers `prefix.0.`, `prefix.1.`, … there are, and a tensor of the last one."""
        layers = {}
        for name, stored in self.tensors.items():
            if match := re.match(re.escape(prefix) + r"\.(\d+)\.", name):
                layers[int(match[1])] = stored
        if not layers:
            raise InputError(f"{self.weights} lacks the tensors {prefix}.*.")
        return max(layers) + 1, layers[max(layers)]


def fetch(id_or_folder: str, patterns: list[str], what: str) -> Path:
    """The folder itself, or one into which the matching files of a Hub repository were downloaded.

    Args:
        id_or_folder: a folder, or a Hub id, which begins with no dot, tilde or slash.
        patterns: of the files.
        what: it should hold, for messages.

    Raises:
        InputError: there is neither.
    """
    path = Path(id_or_folder)
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or id_or_folder.startswith((".", "~")):
        raise InputError(f"{id_or_folder} is no folder: name the one that holds the {what}, or a Hub id.")
    try:
        return Path(snapshot_download(id_or_folder, allow_patterns=patterns))
    except Exception as error:  # the client's exceptions differ between its versions
        raise InputError(
            f"{id_or_folder} is no folder, and no Hub repository within reach, that holds the {what}: "
            f"{first_line(error)}"
        ) from None


def find_weights(folder: Path) -> tuple[Path, list[Path]]:
    """The weights of a repository, safetensors before .bin: the file that lists or is them, and the files they are in.

    Raises:
        InputError: there are none, a shard is missing, or one is named outside the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{index} holds no weight_map.")
            shards = [folder / shard for shard in sorted(set(map(str, weight_map.values())))]
            for shard in shards:
                if shard.parent != folder:  # by its name: a file of the Hub's cache is a link to another folder
                    raise InputError(f"{index} names {shard}, which is not in the same folder.")
                if not shard.is_file():
                    raise InputError(f"{shard} does not exist, but {index.name} names it.")
            return index, shards
        if (folder / name).is_file():
            return folder / name, [folder / name]
    raise InputError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor shards.")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes `output` at the end, and is removed where anything fails.

    A lock beside it, which a process loses when it ends, however it ends, tells a run in progress from the remains of
    one that was killed; those are removed.

    Args:
        output: new, or an empty folder.

    Raises:
        InputError: something is in the way, or another process is writing there.
        OSError: the disk is full or cannot be written to; it names a file or the folder.
    """
    output = output.absolute()
    partial, lock = (output.with_name(f".{output.name}.{end}") for end in ("partial", "lock"))
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is not a folder.")
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise InputError(f"{output} is being written by another process: wait for it, or name another.") from None
    try:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise InputError(f"{output} exists already and is not an empty folder.")
        if partial.exists():
            print(f"Removing {partial}, which a run that was stopped has left.", file=sys.stderr)
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        os.replace(partial, output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not error.filename:
            raise OSError(error.errno, error.strerror or str(error), str(output)) from error
        raise
    finally:
        with suppress(OSError):  # Windows removes no open file
            lock.unlink()
        held.release()


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        InputError: there is no such file, or something else is in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object.")
    return content


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, make: Callable[[str], torch.Tensor]
) -> None:
    """Writes tensors one after another, with a progress bar on a terminal.

    The format is the safetensors library's: length of the header, header, values; the library itself wants all tensors
    at once.

    Args:
        path: of the file.
        shapes: name → shape of what is to be written.
        dtype: of all tensors.
        make: name → the tensor, of that type and shape; called once for each name.

    Raises:
        InputError: the disk is full or fails.
    """
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_TAGS[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the values start aligned
    current = "its header"
    try:
        # Unbuffered, so that a full disk is met at the tensor it is full at.
        with open(path, "wb", buffering=0) as file, progress_bar(None, "Converting", "B", end) as bar:
            _write_all(file, struct.pack("<Q", len(encoded)) + encoded)
            for current in shapes:
                tensor = make(current)
                _write_all(file, tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
                bar.update(tensor.nbytes)
    except OSError as error:
        raise InputError(f"{path} could not be written, at {current}: {error.strerror}.") from None


def _write_all(file, data) -> None:
    view = memoryview(data)
    while view:  # a raw write may take only part of it: 2 GB at most, or what the disk still holds
        view = view[file.write(view) :]
