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
from collections.abc import Iterable, Iterator
from pathlib import Path

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


def _open(path: Path):
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path))
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames. The library's own reader takes a cut file for whole."""

    def __init__(self, path: Path):
        need("zstandard", "train", str(path))
        import zstandard

        self.file = open(path, "rb")
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
    files: Iterable[Path], text_column: str = "text", bad_lines: BadLines | None = None
) -> Iterator[str]:
    """Documents of the files, in order.

    Args:
        files: as `expand_paths` gives them.
        text_column: field of a .jsonl line, or column of a .parquet file, that holds the text.
        bad_lines: counts what is skipped; `None` stops at the first bad line.

    Raises:
        DataError: a bad line when they are not skipped; a damaged file, or one without the column, always.
    """
    bad_lines = bad_lines or BadLines()
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for path in files:
        suffix = _format(path)
        assert suffix is not None, f"{path}: expand_paths gives files of a known format only"
        yield from readers[suffix](path, text_column, bad_lines)


def _lines(path: Path) -> Iterator[bytes]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):  # noqa: B007 - the number stands in the error
                yield line
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: the file is damaged or cut short ({error}).") from error


def _read_txt(path, text_column, bad_lines):
    lines = []
    for number, line in enumerate(_lines(path), 1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad_lines.report(path, number, f"not UTF-8 ({error.reason} at byte {error.start})")
    yield "".join(lines)


def _read_jsonl(path, text_column, bad_lines):
    for number, line in enumerate(_lines(path), 1):
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


def _read_parquet(path, text_column, bad_lines):
    need("pyarrow", "train", path)
    import pyarrow
    import pyarrow.parquet

    source = str(path) if path.suffix == ".parquet" else io.BytesIO(b"".join(_lines(path)))
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
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError, ValueError, DatasetNotFoundError) as error:
        raise DataError(f"{name}: neither a file here nor a Hub dataset within reach ({error}).") from error


def documents(options: DataOptions, part: str) -> tuple[Iterator[str], list]:
    """Documents of the "train" or "validation" part, and where they come from (JSON, for the key of the token cache).

    What was skipped is said on stderr when all are read.

    Raises:
        DataError: no data named, or as `expand_paths` and `open_hub_dataset`; while reading, as `read_documents`.
    """
    paths = options.train_files if part == "train" else options.validation_files
    bad_lines = BadLines(options.skip_bad_lines)
    if paths:
        files = expand_paths(paths)
        source = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        texts = read_documents(files, options.text_column, bad_lines)
    elif options.dataset:
        split = options.dataset_split if part == "train" else options.validation_split
        stream = options.streaming and part == "train"
        dataset = open_hub_dataset(options.dataset, options.dataset_config, split, stream, "train")
        source = [options.dataset, options.dataset_config, split, getattr(dataset, "_fingerprint", None)]
        texts = read_hub_dataset(dataset, options.text_column, bad_lines)
    elif part == "train":
        raise DataError("no data: give --train_files files or folders, or --dataset a Hub data set.")
    else:
        raise DataError("no held-out data: give --validation_files, or --eval_strategy no.")
    return _limited(texts, options.max_documents, bad_lines), source


def _limited(texts: Iterator[str], limit: int | None, bad_lines: BadLines) -> Iterator[str]:
    yield from itertools.islice(texts, limit)
    if bad_lines.count:
        print(f"warning: {bad_lines.summary()}", file=sys.stderr)
