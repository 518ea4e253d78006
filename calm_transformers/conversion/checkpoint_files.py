"""Reads the weights of published repositories and writes safetensors files, with one tensor in memory at a time."""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from calm_transformers.command_line import InputError, first_line
from calm_transformers.loading import is_missing_folder
from calm_transformers.progress import progress_bar

SAFETENSORS_TAGS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_TAGS}

REMAP_BYTES = 2**26  # bytes read before a file is mapped anew, which frees the pages read


class WeightsFile:
    """A memory-mapped .safetensors or .bin file, whose tensors are read one by one."""

    def __init__(self, path: Path):
        self.path = path
        self._map()
        if path.suffix == ".bin":  # safetensors has no checksums
            verify_checksums(path)
        for name, tensor in self._mapped.items():
            if tensor.dtype not in SAFETENSORS_TAGS:
                raise InputError(f"{path}: tensor {name} has dtype {tensor.dtype}, not one of {', '.join(DTYPES)}.")

    def _map(self) -> None:
        self._mapped, self._bytes_read = mmap_tensors(self.path), 0

    def stored_tensors(self) -> list["StoredTensor"]:
        """Returns a reference to each tensor of the file."""
        return [StoredTensor(self, name, tuple(t.shape), t.dtype) for name, t in self._mapped.items()]

    def read(self, name: str) -> torch.Tensor:
        if self._bytes_read > REMAP_BYTES:
            self._map()
        self._bytes_read += self._mapped[name].nbytes
        return self._mapped[name]


class StoredTensor(NamedTuple):
    """A reference to a tensor in a file, or to a range of its columns, that is read on demand."""

    file: WeightsFile
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    columns: slice = slice(None)

    def __str__(self):
        return f"tensor {self.name} {self.shape} in {self.file.path}"

    def read(self) -> torch.Tensor:
        return self.file.read(self.name)[..., self.columns]

    def split_columns(self, num_parts: int) -> list["StoredTensor"]:
        """Splits the last axis into `num_parts` equal ranges."""
        if num_parts == 1:
            return [self]
        width = self.shape[-1] // num_parts
        shape, starts = (*self.shape[:-1], width), range(0, num_parts * width, width)
        return [self._replace(shape=shape, columns=slice(start, start + width)) for start in starts]


def mmap_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Memory-maps a file and returns its tensors by name, without executing anything in a pickle."""
    try:
        if path.suffix == ".bin":
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            tensors = load_file(path)
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds pickled objects other than tensors and was not loaded.") from None
    except Exception as error:  # neither library has a common base class
        raise InputError(f"{path} cannot be read; is it complete? ({first_line(error)})") from None
    if not isinstance(tensors, dict):
        raise InputError(f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise InputError(f"{path}: {name} is not the name of a dense tensor.")
    return tensors


def verify_checksums(path: Path) -> None:
    """Checks the CRCs of a zip archive, which memory-mapping skips."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
            if member and archive.getinfo(member).CRC:  # 0 if torch.save computed none
                raise ValueError(f"bad checksum of {member}")
    except Exception as error:  # zipfile raises many types
        raise InputError(f"{path} is damaged, download it again: {first_line(error)}.") from None


class Repository:
    """A published repository with its `config` and `tensors` (name → `StoredTensor`).

    Args:
        id_or_folder: Hub id or folder.
        content: expected content, for messages: "language model" or "autoencoder".
    """

    def __init__(self, id_or_folder: str, content: str):
        self.folder = fetch(id_or_folder, ["*.json", "*.jinja", "model*.safetensors"], content)
        self.is_on_hub = not Path(id_or_folder).is_dir()
        if self.is_on_hub and not any(self.folder.glob("*.safetensors")):
            self.folder = fetch(id_or_folder, ["*.json", "*.jinja", "pytorch_model*.bin"], content)
        self.name = id_or_folder if self.is_on_hub else self.folder.resolve().name
        self.config_path = self.folder / "config.json"
        if not self.config_path.is_file():
            raise InputError(f"{self.config_path} does not exist: name the repository that holds the {content}.")
        self.config = read_json(self.config_path)
        self.weights_path, files = find_weight_files(self.folder)
        self.tensors: dict[str, StoredTensor] = {}
        for stored in (stored for path in files for stored in WeightsFile(path).stored_tensors()):
            if stored.name in self.tensors:
                raise InputError(f"The {stored} is in {self.tensors[stored.name].file.path} too.")
            self.tensors[stored.name] = stored

    def matrix(self, name: str) -> StoredTensor:
        """Returns the stored tensor `name`, which must be a matrix."""
        if name not in self.tensors:
            raise InputError(f"{self.weights_path} lacks the tensor {name}.")
        if len(self.tensors[name].shape) != 2:
            raise InputError(f"{self.tensors[name]} should be a matrix.")
        return self.tensors[name]

    def count_layers(self, prefix: str) -> tuple[int, StoredTensor]:
        """Returns the number of layers `prefix.0.`, `prefix.1.`, …, and a tensor of the last one."""
        layers = {}
        for name, stored in self.tensors.items():
            if match := re.match(re.escape(prefix) + r"\.(\d+)\.", name):
                layers[int(match[1])] = stored
        if not layers:
            raise InputError(f"{self.weights_path} lacks the tensors {prefix}.*.")
        return max(layers) + 1, layers[max(layers)]


def fetch(id_or_folder: str, patterns: list[str], content: str) -> Path:
    """Returns the folder itself, or the local snapshot of a Hub repository's matching files."""
    path = Path(id_or_folder)
    if path.is_dir():
        return path
    if path.exists() or is_missing_folder(id_or_folder):
        raise InputError(f"{id_or_folder} is not a folder: name the folder with the {content}, or a Hub id.")
    try:
        return Path(snapshot_download(id_or_folder, allow_patterns=patterns))
    except Exception as error:  # the client's exceptions differ between its versions
        raise InputError(
            f"{id_or_folder} is neither a folder nor a reachable Hub repository with the {content}: "
            f"{first_line(error)}"
        ) from None


def find_weight_files(folder: Path) -> tuple[Path, list[Path]]:
    """Finds the weights in a folder, safetensors before .bin; returns the index or single file, and all files."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{index} holds no weight_map.")
            shards = [folder / shard for shard in sorted(set(map(str, weight_map.values())))]
            for shard in shards:
                if shard.parent != folder:  # unresolved: files in the Hub's cache are links
                    raise InputError(f"{index} names {shard}, which is not in the same folder.")
                if not shard.is_file():
                    raise InputError(f"{shard} does not exist, but {index.name} names it.")
            return index, shards
        if (folder / name).is_file():
            return folder / name, [folder / name]
    raise InputError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor shards.")


def read_json(path: Path) -> dict:
    """Reads a JSON object from a file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no JSON object.")
    return fields


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, make_tensor: Callable[[str], torch.Tensor]
) -> None:
    """Writes a safetensors file tensor by tensor, where the library itself needs all tensors at once.

    Args:
        path: the file.
        shapes: name → shape.
        dtype: of all tensors.
        make_tensor: called once per name; returns a tensor of that shape and dtype.
    """
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_TAGS[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded_header = json.dumps(header).encode()
    encoded_header += b" " * (-len(encoded_header) % 8)  # aligns the values
    current = "its header"  # what is being written
    try:
        with open(path, "wb") as file, progress_bar(None, "Converting", "B", end) as bar:
            file.write(struct.pack("<Q", len(encoded_header)) + encoded_header)
            for current in shapes:
                tensor = make_tensor(current)
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                bar.update(tensor.nbytes)
    except OSError as error:
        raise InputError(f"{path} could not be written, at {current}: {error.strerror}.") from None
