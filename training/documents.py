"""Documents from files or a Hub dataset: an iterator of strings, and nothing about tokens. Begin at `documents`.

Files are .txt (one document each), .jsonl or .parquet (one document a row), plain or compressed as .xz, .zst or .gz.
"""

import glob
import gzip
import io
import itertools
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from calm.progress import progress_bar, shows_bars
from calm.training.extras import need
from calm.training.recipe import DataOptions

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".xz", ".zst", ".gz")


class DataError(ValueError):
    """Text that cannot be read; the message names file and line."""


class BadLines:
    """What to do with a line that holds no document: stop there, or skip it and count it.

    Args:
        skip: False raises `DataError` at the first bad line.
    """

    def __init__(self, skip: bool = False):
        self.skip, self.count, self.first = skip, 0, None

    def report(self, path, line: int, why: str) -> None:
        message = f"{path}, line {line}: {why}"
        if not self.skip:
            raise DataError(f"{message} (skip_bad_lines skips such lines and counts them).")
        self.count += 1
        self.first = self.first or message

    def summary(self) -> str | None:
        return f"{self.count} bad line(s) skipped, the first: {self.first}" if self.count else None


def expand_paths(paths: str | Iterable[str]) -> list[Path]:
    """Files, folders (searched for every readable format) and glob patterns → files, in a fixed order.

    Raises:
        DataError: a path that is not there, a folder without text, an unknown file format.
    """
    files = []
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))] or [Path(path)]
        for entry in found:
            if not entry.exists():
                raise DataError(f"{entry}: no such file or folder.")
            inside = [f for f in sorted(entry.rglob("*")) if _format(f)] if entry.is_dir() else [entry]
            if not inside:
                raise DataError(f"{entry}: the folder holds no file of a readable format ({_readable()}).")
            files += inside
    for file in files:
        if _format(file) is None:
            raise DataError(f"{file}: unknown format; readable are {_readable()}.")
    return files


def _readable() -> str:
    return f"{', '.join(FORMATS)}, each also with {', '.join(COMPRESSIONS)}"


def _format(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in FORMATS else None


@contextmanager
def _open(path: Path, bar: tqdm | None) -> Iterator[Iterable[bytes]]:
    with io.BufferedReader(_CountedFile(path, bar), buffer_size=1 << 16) as file:
        if path.suffix == ".xz":
            yield lzma.open(file)
        elif path.suffix == ".gz":
            yield gzip.open(file)
        elif path.suffix == ".zst":
            yield io.BufferedReader(_ZstdFile(path, file))
        else:
            yield file


class _CountedFile(io.FileIO):
    """A file whose bytes a bar counts as they are read."""

    def __init__(self, path: Path, bar: tqdm | None):
        super().__init__(path)
        self.bar = bar

    def readinto(self, buffer) -> int | None:
        count = super().readinto(buffer)
        if self.bar is not None:
            self.bar.update(count or 0)
        return count


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames. The library's own reader takes a cut file for whole."""

    def __init__(self, path: Path, file: BinaryIO):
        need("zstandard", "train", str(path))
        import zstandard

        self.file = file
        self.decompressor, self.error = zstandard.ZstdDecompressor(), zstandard.ZstdError
        self.frame, self.ready = None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            chunk = (self.frame.unused_data if self.frame and self.frame.eof else b"") or self.file.read(1 << 16)
            if not chunk:
                if self.frame and not self.frame.eof:
                    raise EOFError("the last frame is not complete")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.decompressor.decompressobj()
            try:
                self.ready = self.frame.decompress(chunk)
            except self.error as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def read_documents(
    files: Iterable[Path], text_column: str = "text", bad_lines: BadLines | None = None, bar: tqdm | None = None
) -> Iterator[str]:
    """Documents of the files, in order.

    Args:
        files: as `expand_paths` gives them.
        text_column: field of a .jsonl line, or column of a .parquet file, that holds the text.
        bad_lines: counts what is skipped; `None` stops at the first bad line.
        bar: advances by the files' bytes, compressed as they are.

    Raises:
        DataError: a bad line when they are not skipped; a damaged file, or one without the column, always.
    """
    bad_lines = bad_lines or BadLines()
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for path in files:
        suffix = _format(path)
        assert suffix is not None, f"{path}: expand_paths gives files of a known format only"
        yield from readers[suffix](path, text_column, bad_lines, bar)


def _lines(path: Path, bar: tqdm | None) -> Iterator[bytes]:
    number = 0
    try:
        with _open(path, bar) as file:
            for number, line in enumerate(file, 1):  # noqa: B007 - the number stands in the error
                yield line
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: the file is damaged or cut short ({error}).") from error


def _read_txt(path, text_column, bad_lines, bar):
    lines = []
    for number, line in enumerate(_lines(path, bar), 1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad_lines.report(path, number, f"not UTF-8 ({error.reason} at byte {error.start})")
    yield "".join(lines)


def _read_jsonl(path, text_column, bad_lines, bar):
    for number, line in enumerate(_lines(path, bar), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad_lines.report(path, number, f"not UTF-8 ({error.reason} at byte {error.start})")
            continue
        except json.JSONDecodeError as error:
            bad_lines.report(path, number, f"not JSON ({error.msg} at column {error.colno})")
            continue
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            bad_lines.report(path, number, f'no string under the key "{text_column}"')
            continue
        yield row[text_column]


def _read_parquet(path, text_column, bad_lines, bar):
    need("pyarrow", "train", path)
    import pyarrow
    import pyarrow.parquet

    is_plain = path.suffix == ".parquet"
    source = str(path) if is_plain else io.BytesIO(b"".join(_lines(path, bar)))
    try:
        table = pyarrow.parquet.ParquetFile(source)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file ({error}).") from error
    if text_column not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise DataError(f'{path}: no column "{text_column}"; it has {columns} (text_column names the right one).')
    number = 0
    for batch in table.iter_batches(columns=[text_column], batch_size=1024):
        for text in batch.column(0).to_pylist():
            number += 1
            if isinstance(text, str):
                yield text
            else:
                bad_lines.report(path, number, f'no string in the column "{text_column}"')
        if bar is not None and is_plain:
            bar.update(path.stat().st_size * batch.num_rows / table.metadata.num_rows)


def read_hub_dataset(dataset, text_column: str = "text", bad_lines: BadLines | None = None) -> Iterator[str]:
    """Documents of a `datasets.Dataset` or `IterableDataset`, in order; errors as in `read_documents`."""
    bad_lines = bad_lines or BadLines()
    for number, row in enumerate(dataset, 1):
        if isinstance(row.get(text_column), str):
            yield row[text_column]
        else:
            bad_lines.report("dataset", number, f'no string in the column "{text_column}"; it has {", ".join(row)}')


def open_hub_dataset(name: str, config: str | None, split: str | None, streaming: bool, extra: str):
    """A split of a Hub data set, or of a folder that holds one.

    Args:
        name: Hub id or folder.
        config: which of the data set's configurations; `None` where it has one.
        split: which of its splits.
        streaming: read while it is used, in place of downloading and caching it first.
        extra: of setup.cfg, which installs the package that this needs.

    Raises:
        DataError: there is none within reach.
    """
    need("datasets", extra, "a Hub data set")
    import datasets
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    if not shows_bars():
        datasets.disable_progress_bars()
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError, ValueError, DatasetNotFoundError) as error:
        raise DataError(f"{name}: neither a file here nor a Hub dataset within reach ({error}).") from error


def documents(options: DataOptions, part: str, what: str | None = None) -> tuple[Iterator[str], list]:
    """Documents of the "train" or "validation" part, and where they come from (JSON, for the key of the token cache).

    What was skipped is said on stderr when all are read.

    Args:
        options: where they are.
        part: which.
        what: is done with them, for a bar that shows how many are read; `None` for none.

    Raises:
        DataError: no data named, or as `expand_paths` and `open_hub_dataset`; while reading, as `read_documents`.
    """
    paths = options.train_files if part == "train" else options.validation_files
    bad_lines, limit = BadLines(options.skip_bad_lines), options.max_documents
    if paths:
        files = expand_paths(paths)
        source = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        read = partial(read_documents, files, options.text_column, bad_lines)
        unit, total = "B", size_of(files)
    elif options.dataset:
        split = options.dataset_split if part == "train" else options.validation_split
        stream = options.streaming and part == "train"
        dataset = open_hub_dataset(options.dataset, options.dataset_config, split, stream, "train")
        source = [options.dataset, options.dataset_config, split, getattr(dataset, "_fingerprint", None)]
        read = partial(read_hub_dataset, dataset, options.text_column, bad_lines)
        unit, total = "document", len(dataset) if isinstance(dataset, Sized) else None
    elif part == "train":
        raise DataError("no data: give --train_files files or folders, or --dataset a Hub data set.")
    else:
        raise DataError("no held-out data: give --validation_files, or --eval_strategy no.")
    if limit is not None:
        unit, total = "document", min(limit, total) if unit == "document" and total is not None else limit
    return _read(read, limit, bad_lines, what, unit, total), source


def size_of(files: Iterable[Path]) -> int:
    """In bytes, compressed as they are."""
    return sum(file.stat().st_size for file in files)


def _read(
    read: Callable[..., Iterator[str]],
    limit: int | None,
    bad_lines: BadLines,
    what: str | None,
    unit: str,
    total: int | None,
) -> Iterator[str]:
    with progress_bar(None, what, unit, total) if what else nullcontext() as bar:
        counts_bytes = bar is not None and unit == "B"
        for text in itertools.islice(read(bar=bar) if counts_bytes else read(), limit):
            yield text
            if bar is not None and not counts_bytes:
                bar.update()
    if bad_lines.count:
        print(f"warning: {bad_lines.summary()}", file=sys.stderr)
