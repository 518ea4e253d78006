"""Documents from files or a Hub dataset: an iterator of strings, or of their token ids. Begin at `documents`.

Files are .txt (one document each), .jsonl or .parquet (one document a row), plain or compressed as .xz, .zst or .gz.
"""

import codecs
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch.utils.data import get_worker_info
from tqdm import tqdm

from calm_transformers.command_line import InputError, require_package
from calm_transformers.progress import progress_bar, shows_bars

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".xz", ".zst", ".gz")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
CHARACTERS_PER_BATCH = 4_000_000  # that are tokenised together
MAX_ZSTD_WINDOW = 2**31  # bytes; what `zstd --long=31` writes, and the most that the library reads


class BadLines:
    """What to do with a line that holds no document: skip and count it, or stop there (`None`: there's no option)."""

    def __init__(self, skip: bool | None = None):
        self.skip, self.count, self.first = skip, 0, None

    def report(self, path, line: int, why: str) -> None:
        message = f"{path}, line {line}: {why}"
        if not self.skip:
            hint = "" if self.skip is None else " (skip_bad_lines skips such lines and counts them)"
            raise InputError(f"{message}{hint}.")
        self.count += 1
        self.first = self.first or message

    def summary(self) -> str | None:
        return f"{self.count} bad line(s) skipped, the first: {self.first}" if self.count else None


def find_paths(path: str | Path) -> list[Path]:
    """The file or folder of that name, or else those that match it as a glob pattern, in a fixed order."""
    return [Path(p) for p in ([path] if os.path.lexists(path) else sorted(glob.glob(str(path), recursive=True)))]


def expand_paths(paths: str | Iterable[str]) -> list[Path]:
    """Files, folders (searched for every readable format) and glob patterns → files, in a fixed order.

    Hidden files and folders within a folder are left out.
    """
    files = []
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        found = find_paths(path)
        if not found:
            raise InputError(f"{path}: no such file or folder.")
        for entry in found:
            inside = _files_of(entry) if entry.is_dir() else [entry]
            if not inside:
                raise InputError(f"{entry}: the folder holds no file of a readable format ({_readable()}).")
            files += inside
    for file in files:
        if _format(file) is None:
            raise InputError(f"{file}: unknown format; readable are {_readable()}.")
        try:
            with open(file, "rb") as opened:
                is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}.") from error
        if is_pointer:
            raise InputError(f"{file}: is a Git LFS pointer in place of the text; run git lfs pull.")
    return files


def _files_of(folder: Path) -> list[Path]:
    files = [f for f in sorted(folder.rglob("*")) if _format(f) and not f.is_dir()]
    return [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]


def _readable() -> str:
    return f"{', '.join(FORMATS)}, each also with {', '.join(COMPRESSIONS)}"


def _format(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in FORMATS else None


def _decompressed(path: Path, file: BinaryIO) -> Iterable[bytes]:
    """The lines of an open file."""
    if path.suffix == ".zst":
        return _split(_zst_chunks(path, file))
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix)
    return file if opener is None else opener(file)


def _zst_chunks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame, for the library's own reader takes a cut file for whole."""
    require_package("zstandard", "train", str(path))
    import zstandard

    decompressor, frame, rest = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW), None, b""
    while chunk := rest or file.read(1 << 16):
        frame = frame or decompressor.decompressobj()
        yield frame.decompress(chunk)
        rest = frame.unused_data
        if frame.eof:
            frame = None
    if frame is not None:
        raise EOFError("the last frame is not complete")


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for chunk in chunks:
        *lines, last = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*pending, line, b"\n"])
            pending = []
        pending.append(last)
    if any(pending):
        yield b"".join(pending)


def read_documents(
    files: Iterable[Path], text_column: str = "text", bad_lines: BadLines | None = None, bar: tqdm | None = None
) -> Iterator[str]:
    """Documents of the files that `expand_paths` gives, in order; the bar counts their bytes as they are."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for path in files:
        yield from readers[str(_format(path))](path, text_column, bad_lines or BadLines(), bar)


def _lines(path: Path, bar: tqdm | None) -> Iterator[bytes]:
    number = seen = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_decompressed(path, file), 1):
                if bar is not None:
                    bar.update(file.tell() - seen)
                    seen = file.tell()
                yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except InputError:
        raise
    except Exception as error:  # each decompressor has its own
        if isinstance(error, OSError) and error.errno:  # of the operating system
            raise InputError(f"{path}: {error.strerror}.") from error
        raise InputError(f"{path}, after line {number}: the file is damaged or cut short ({error}).") from error


def _why(error: Exception) -> str:
    """What is wrong with a line, in words, for what its decoding, `json` and `_document` raise."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return f"no text: character {error.start + 1} is half of a surrogate pair"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply"
    return str(error)


def _document(text, missing: str) -> str:
    """The text; a ValueError where it is no string (`missing` says so), or one that is no Unicode text."""
    if not isinstance(text, str):
        raise ValueError(missing)
    text.encode()  # half of a surrogate pair is UTF-8 for no tokenizer
    return text


def _read_txt(path, text_column, bad_lines, bar):
    lines = []
    for number, line in enumerate(_lines(path, bar), 1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad_lines.report(path, number, _why(error))
    yield "".join(lines)


def _read_jsonl(path, text_column, bad_lines, bar):
    for number, line in enumerate(_lines(path, bar), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_int=float)  # Python refuses integers of 4301 digits
            has = f"; it has {', '.join(row)}" if isinstance(row, dict) and text_column not in row else ""
            text = row.get(text_column) if isinstance(row, dict) else None
            yield _document(text, f'no string under the key "{text_column}"{has}')
        except (ValueError, RecursionError) as error:
            bad_lines.report(path, number, _why(error))


def _no_column(where, text_column: str, columns: Iterable[str]) -> InputError:
    has = ", ".join(columns)
    return InputError(f'{where}: no column "{text_column}"; it has {has} (text_column names the right one).')


def _read_parquet(path, text_column, bad_lines, bar):
    require_package("pyarrow", "train", path)
    import pyarrow
    import pyarrow.parquet

    is_plain = path.suffix == ".parquet"
    source = str(path) if is_plain else io.BytesIO(b"".join(_lines(path, bar)))
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(source)
        columns = table.schema_arrow.names
        if text_column not in columns:
            raise _no_column(path, text_column, columns)
        kind = table.schema_arrow.types[columns.index(text_column)]
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if str(kind) not in ("string", "large_string", "string_view"):
            raise InputError(f'{path}: the column "{text_column}" holds {kind}, not strings.')
        for batch in table.iter_batches(columns=[text_column], batch_size=1024):
            for value in batch.column(0):
                number += 1
                try:
                    yield _document(value.as_py(), f'no string in the column "{text_column}"')
                except ValueError as error:
                    bad_lines.report(path, number, _why(error))
            if bar is not None and is_plain:
                bar.update(path.stat().st_size * batch.num_rows / table.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}, after row {number}: not a readable parquet file ({error}).") from error


def read_hub_dataset(
    dataset, text_column: str = "text", bad_lines: BadLines | None = None, bar: tqdm | None = None
) -> Iterator[str]:
    """Documents of a `datasets.Dataset` or `IterableDataset`, in order, and all of them in each worker of a
    DataLoader: `iter` doesn't divide them, as a loop over rows would.
    """
    bad_lines, number = bad_lines or BadLines(), 0
    try:
        for batch in dataset.iter(batch_size=256):
            if text_column not in batch:
                raise _no_column("dataset", text_column, batch)
            for text in batch[text_column]:
                number += 1
                if bar is not None:
                    bar.update()
                try:
                    yield _document(text, f'no string in the column "{text_column}"')
                except ValueError as error:
                    bad_lines.report("dataset", number, _why(error))
    except InputError:
        raise
    except Exception as error:  # of whatever package reads files of this kind, or the network
        raise InputError(f"dataset, after row {number}: cannot be read ({error}).") from error


def open_hub_dataset(name: str, config: str | None, split: str | None, streaming: bool, extra: str):
    """A split of a Hub data set, or of a folder that holds one."""
    require_package("datasets", extra, "a Hub data set")
    import datasets

    if not shows_bars():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # of the network, the Hub's client, or whatever package reads files of this kind
        raise InputError(f"{name}: neither a file here nor a Hub dataset within reach ({error}).") from error


@dataclass
class DataOptions:
    """Where the text comes from and how it is cut.

    Args:
        train_files, validation_files: files, folders or glob patterns (see documents.py).
        dataset, dataset_config, dataset_split, validation_split: a Hub dataset in place of files.
        streaming: read the Hub dataset while training instead of downloading and caching it first.
        text_column: key or column of the text.
        max_documents: only the first so many.
        skip_bad_lines: skip and count lines that hold no document, instead of stopping there.
        validation_blocks: evaluate on only the first so many blocks.
        block_size: tokens a block, a multiple of the patch size.
        append_eos, pad_to_patch: what follows each document; the tokenizer puts BOS in front.
        random_phase: cut each epoch at other places, so that every phase of the patches is seen.
        left_fill: share of blocks that look like a short prompt: a document's beginning behind 0 … K − 1 fillers.
        cache_dir: of the token files; calm/tokens in the cache of Hugging Face by default.
    """

    train_files: list[str] = field(default_factory=list)
    validation_files: list[str] = field(default_factory=list)
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    validation_split: str | None = None
    streaming: bool = False
    text_column: str = "text"
    max_documents: int | None = None
    skip_bad_lines: bool = False
    validation_blocks: int | None = None
    block_size: int = 1024
    append_eos: bool = False
    pad_to_patch: bool = False
    random_phase: bool = False
    left_fill: float = 0.0
    cache_dir: str | None = None


@dataclass
class Documents:
    """Documents of one part of the data, read anew by each loop over them.

    What was skipped is said on stderr when all are read, once.

    Args:
        read: (bad_lines, bar) → the documents.
        where: they come from, for messages.
        limit, skip_bad_lines: as `DataOptions` has them.
        what, unit, total: of a bar that shows how many are read.
    """

    read: Callable[..., Iterator[str]]
    where: str
    limit: int | None = None
    skip_bad_lines: bool = False
    what: str | None = None
    unit: str = "B"
    total: int | None = None
    is_reported: bool = False

    def __iter__(self) -> Iterator[str]:
        bad_lines, is_empty = BadLines(self.skip_bad_lines), True
        with progress_bar(None, self.what, self.unit, self.total) if self.what else nullcontext() as bar:
            for text in itertools.islice(self.read(bad_lines=bad_lines, bar=bar), self.limit):
                is_empty = is_empty and not text
                yield text
        if is_empty:
            raise InputError(f"{self.where}: no text there{f' ({bad_lines.summary()})' if bad_lines.count else ''}.")
        worker = get_worker_info()
        if bad_lines.count and not self.is_reported and (worker is None or worker.id == 0):
            self.is_reported = True
            print(f"warning: {bad_lines.summary()}", file=sys.stderr)


def documents(options: DataOptions, part: str, what: str | None = None) -> tuple[Documents, list]:
    """Documents of the "train" or "validation" part, and where they come from (JSON, for the key of the token cache).

    `what` is done with them, for a bar that shows how many are read.
    """
    paths, limit = options.train_files if part == "train" else options.validation_files, options.max_documents
    split = options.dataset_split if part == "train" else options.validation_split
    if limit is not None and limit < 1:
        raise InputError(f"max_documents={limit}: must be at least 1.")
    if paths:
        files = expand_paths(paths)
        source = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        read = partial(read_documents, files, options.text_column)
        where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        unit, total = "B", None if limit else size_of(files)
    elif options.dataset and split:
        stream = options.streaming and part == "train"
        dataset = open_hub_dataset(options.dataset, options.dataset_config, split, stream, "train")
        source = [options.dataset, options.dataset_config, split, getattr(dataset, "_fingerprint", None)]
        read, where = partial(read_hub_dataset, dataset, options.text_column), options.dataset
        unit, total = "document", limit or (len(dataset) if isinstance(dataset, Sized) else None)
    elif part == "train":
        raise InputError("no data: give --train_files files or folders, or --dataset a Hub data set.")
    else:
        raise InputError("no held-out data: give --validation_files or --validation_split, or --eval_strategy no.")
    return Documents(read, where, limit, options.skip_bad_lines, what, unit, total), source


def size_of(files: Iterable[Path]) -> int:
    """In bytes, compressed as they are."""
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Separation:
    """What stands between two documents. A BOS comes from the tokenizer itself.

    Published: CALM none of these; autoencoder both (`append_eos`, then padding to a whole patch).
    """

    append_eos: bool = False
    pad_to_patch: bool = False
    patch_size: int = 1


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Of about `CHARACTERS_PER_BATCH` characters; empty documents are left out."""
    batch, size = [], 0
    for document in filter(None, documents):
        batch.append(document)
        size += len(document)
        if size >= CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize_documents(documents: Iterable[str], tokenizer, separation: Separation) -> Iterator[np.ndarray]:
    """Token ids of each document, ends as `separation` says; empty documents are left out.

    Special tokens come from the tokenizer and the separation alone: a document that spells one is text there as
    elsewhere. Documents with which the tokenizer can't do that are counted on stderr.
    """
    if separation.append_eos and tokenizer.eos_token_id is None:
        raise InputError("append_eos needs a tokenizer with an EOS token.")
    if separation.pad_to_patch and tokenizer.pad_token_id is None:
        raise InputError("pad_to_patch needs a tokenizer with a pad token.")
    special = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special and i != tokenizer.unk_token_id]
    num_added, num_spelled = tokenizer.num_special_tokens_to_add(), 0

    for batch in _batches(documents):
        encoded = tokenizer(batch, return_attention_mask=False, split_special_tokens=True, verbose=False)
        for ids in encoded["input_ids"]:
            num_spelled += int(np.isin(ids, special).sum()) > num_added
            if separation.append_eos:
                ids.append(tokenizer.eos_token_id)
            if separation.pad_to_patch:
                ids += [tokenizer.pad_token_id] * (-len(ids) % separation.patch_size)
            yield np.asarray(ids, dtype=np.uint32)
    if num_spelled:
        what = "spell special tokens, which this tokenizer doesn't read as text"
        print(f"warning: {num_spelled} document(s) {what}", file=sys.stderr)
