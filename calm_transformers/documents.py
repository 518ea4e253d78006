"""Reads documents from files or a Hub dataset, as strings or token ids. The entry point is `load_documents`.

Files are .txt (one document each), .jsonl or .parquet (one document per row), plain or compressed as .xz, .zst or .gz,
local or at a URL that fsspec opens.
"""

import codecs
import glob
import io
import itertools
import json
import lzma
import os
import re
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from calm_transformers.command_line import InputError, require_package
from calm_transformers.progress import progress_bar, shows_bars

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".xz", ".zst", ".gz")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
CHARACTERS_PER_BATCH = 4_000_000  # tokenised in one call
MAX_ZSTD_WINDOW = 2**31  # bytes; as `zstd --long=31` writes, the maximum of the library


class BadLines:
    """Skips and counts lines without a document, or raises; `skip` is None if there is no option `skip_bad_lines`."""

    def __init__(self, skip: bool | None = None):
        self.skip, self.count, self.first = skip, 0, None

    def report(self, path, line: int, problem: str) -> None:
        """Counts the line if such lines are skipped, else raises `InputError`."""
        message = f"{path}, line {line}: {problem}"
        if not self.skip:
            hint = "" if self.skip is None else " (skip_bad_lines skips such lines and counts them)"
            raise InputError(f"{message}{hint}.")
        self.count += 1
        self.first = self.first or message

    def summary(self) -> str | None:
        return f"{self.count} bad line(s) skipped, the first: {self.first}" if self.count else None


def find_paths(path: str | Path) -> list[Path]:
    """Returns the file or folder of that name, or else all that match it as a glob pattern, sorted.

    A URL (s3://, gs://, hf://, https://, …) gives paths of universal_pathlib, which fsspec opens.
    """
    if "://" in str(path):
        require_package("upath", "train", str(path))
        from upath import UPath

        url: Any = UPath(path)
        if url.exists():
            return [url]
        root, _, pattern = str(path).partition("*")
        folder: Any = UPath(root.rpartition("/")[0])
        return sorted(folder.glob(f"{root.rpartition('/')[2]}*{pattern}")) if "*" in str(path) else []
    if os.path.lexists(path):
        return [Path(path)]
    before, *rest = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", str(path), maxsplit=1)
    if not rest:
        return sorted(map(Path, glob.glob(str(path))))
    folders = [folder for root in glob.glob(before or ".") for folder, _ in _walk(root)]
    matches = [match for folder in folders for match in find_paths(os.path.join(glob.escape(folder), rest[0]))]
    return sorted(match for match in matches if not (match.is_symlink() and match.is_dir()))


def _walk(root: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Yields a folder and those in it that aren't hidden, with their files; follows links, to each folder once."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}.") from error

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if os.path.realpath(folder) in seen:
            subfolders.clear()
        else:
            seen.add(os.path.realpath(folder))
            yield folder, names


def expand_paths(paths: str | Iterable[str]) -> list[Path]:
    """Resolves files, folders and glob patterns to a list of files, in the order of `paths`, sorted within each.

    Skips hidden files in folders; refuses files that can't be opened, of other formats, or that are Git LFS pointers.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        matches = find_paths(path)
        if not matches:
            raise InputError(f"{path}: no such file or folder.")
        found: dict[Path, None] = {}  # a pattern may match a folder and its files
        for entry in matches:
            found |= dict.fromkeys(_list_files(entry) if entry.is_dir() else [entry])
        if not found:
            raise InputError(f"{matches[0]}: the folder holds no file of a readable format ({_readable_formats()}).")
        files += found
    for file in files:
        if _file_format(file) is None:
            raise InputError(f"{file}: unknown format; readable are {_readable_formats()}.")
        if os.path.exists(str(file)) and not os.path.isfile(str(file)):  # opening a named pipe would wait for a writer
            raise InputError(f"{file}: is not a regular file.")
        try:
            with file.open("rb") as opened:
                is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}.") from error
        if is_pointer:
            raise InputError(f"{file}: is a Git LFS pointer in place of the text; run git lfs pull.")
    return files


def _list_files(folder: Path) -> list[Path]:
    """Returns all files of readable formats in a folder, sorted, without hidden ones."""
    if type(folder) is type(Path()):
        files = [Path(root, name) for root, names in _walk(folder) for name in names]
    else:  # of universal_pathlib
        files = [file for file in folder.rglob("*") if not file.is_dir()]
    is_hidden = {f: any(part.startswith(".") for part in f.relative_to(folder).parts) for f in files}
    return sorted(f for f in files if _file_format(f) and not is_hidden[f])


def _readable_formats() -> str:
    return f"{', '.join(FORMATS)}, each also with {', '.join(COMPRESSIONS)}"


def _file_format(path: Path) -> str | None:
    """Returns one of FORMATS, or None."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in FORMATS else None


def _decompressed_lines(path: Path, file: BinaryIO) -> Iterable[bytes]:
    """Returns an iterable of the decompressed lines of an open file."""
    if path.suffix not in COMPRESSIONS:
        return file
    if path.suffix == ".zst":
        require_package("zstandard", "train", str(path))
        import zstandard

        zst = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
        return _split_lines(_decompressed_chunks(zst.decompressobj, file))
    xz, gz = lzma.LZMADecompressor, partial(zlib.decompressobj, wbits=16 + zlib.MAX_WBITS)
    return _split_lines(_decompressed_chunks(xz if path.suffix == ".xz" else gz, file))


def _decompressed_chunks(new_decompressor: Callable[[], Any], file: BinaryIO) -> Iterator[bytes]:
    """Decompresses frame by frame, since the libraries' own readers take some damaged or empty files for complete."""
    frame, rest, num_frames = None, b"", 0
    while chunk := rest or file.read(1 << 16):
        rest = b""
        if frame is None and not (chunk := chunk.lstrip(b"\0")):  # padding between frames
            continue
        frame = frame or new_decompressor()
        yield frame.decompress(chunk)
        if frame.eof:
            frame, rest, num_frames = None, frame.unused_data, num_frames + 1
    if frame is not None or not num_frames:
        raise EOFError("it holds no complete frame" if not num_frames else "the last frame is not complete")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the lines of text in chunks, with their newlines."""
    pending: list[bytes] = []
    for part in itertools.chain.from_iterable(map(io.BytesIO, chunks)):  # a line, or its part in a chunk
        pending.append(part)
        if part.endswith(b"\n"):
            yield b"".join(pending)
            pending = []
    if pending:
        yield b"".join(pending)


def read_documents(
    files: Iterable[Path], text_column: str = "text", bad_lines: BadLines | None = None, bar: tqdm | None = None
) -> Iterator[str]:
    """Yields the documents of the files from `expand_paths`, in order; `bar` counts compressed bytes."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for path in files:
        yield from readers[str(_file_format(path))](path, text_column, bad_lines or BadLines(), bar)


def _lines(path: Path, bar: tqdm | None) -> Iterator[bytes]:
    """Yields a file's decompressed lines, without a byte order mark."""
    number = bytes_read = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_decompressed_lines(path, file), 1):
                if bar is not None:
                    bar.update(file.tell() - bytes_read)
                    bytes_read = file.tell()
                yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except InputError:
        raise
    except Exception as error:  # each decompressor has its own
        if isinstance(error, OSError) and error.errno:  # from the operating system
            raise InputError(f"{path}: {error.strerror}.") from error
        raise InputError(f"{path}, after line {number}: the file is damaged or truncated ({error}).") from error


def _describe_error(error: Exception) -> str:
    """Returns a short description of an error from decoding a line, from `json` or from `_check_text`."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return f"not valid Unicode: character {error.start + 1} is a lone surrogate"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply"
    return str(error)


def _check_text(text, not_a_string: str) -> str:
    """Returns the text; a ValueError if it isn't valid Unicode or, with the message `not_a_string`, no string."""
    if not isinstance(text, str):
        raise ValueError(not_a_string)
    text.encode()  # raises for lone surrogates, which no tokenizer can encode
    return text


def _read_txt(path: Path, text_column: str, bad_lines: BadLines, bar: tqdm | None) -> Iterator[str]:
    lines = []
    for number, line in enumerate(_lines(path, bar), 1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad_lines.report(path, number, _describe_error(error))
    yield "".join(lines)


def _read_jsonl(path: Path, text_column: str, bad_lines: BadLines, bar: tqdm | None) -> Iterator[str]:
    for number, line in enumerate(_lines(path, bar), 1):
        if not line.strip():
            continue
        try:
            # As a float, since Python parses no integer of more than 4300 digits.
            row = json.loads(line.decode("utf-8"), parse_int=float)
            keys = f"; it has {_name_columns(row)}" if isinstance(row, dict) and text_column not in row else ""
            text = row.get(text_column) if isinstance(row, dict) else None
            yield _check_text(text, f'no string under the key "{text_column}"{keys}')
        except (ValueError, RecursionError) as error:
            bad_lines.report(path, number, _describe_error(error))


def _name_columns(columns: Iterable[str]) -> str:
    """Returns the names of columns, or the beginning of many or long ones, in one line."""
    return textwrap.shorten(", ".join(columns).encode(errors="backslashreplace").decode(), 200, placeholder=" …")


def _missing_column(source, text_column: str, columns: Iterable[str]) -> InputError:
    names = _name_columns(columns)
    return InputError(f'{source}: no column "{text_column}"; it has {names} (text_column names the right one).')


def _read_parquet(path: Path, text_column: str, bad_lines: BadLines, bar: tqdm | None) -> Iterator[str]:
    require_package("pyarrow", "train", str(path))
    import pyarrow
    import pyarrow.parquet

    is_plain = path.suffix == ".parquet"
    number = 0
    try:
        source = path.open("rb") if is_plain else io.BytesIO(b"".join(_lines(path, bar)))
        file = pyarrow.parquet.ParquetFile(source)
        columns = file.schema_arrow.names
        if text_column not in columns:
            raise _missing_column(path, text_column, columns)
        column_type = file.schema_arrow.types[columns.index(text_column)]
        column_type = column_type.value_type if pyarrow.types.is_dictionary(column_type) else column_type
        if str(column_type) not in ("string", "large_string", "string_view"):
            raise InputError(f'{path}: the column "{text_column}" holds {column_type}, not strings.')
        for batch in file.iter_batches(columns=[text_column], batch_size=1024):
            for value in batch.column(0):
                number += 1
                try:
                    yield _check_text(value.as_py(), f'no string in the column "{text_column}"')
                except ValueError as error:
                    bad_lines.report(path, number, _describe_error(error))
            if bar is not None and is_plain:
                bar.update(path.stat().st_size * batch.num_rows / file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}, after row {number}: not a readable parquet file ({error}).") from error


def read_hub_dataset(
    dataset, text_column: str = "text", bad_lines: BadLines | None = None, bar: tqdm | None = None
) -> Iterator[str]:
    """Yields the documents of a `datasets.Dataset` or `IterableDataset`, in order."""
    bad_lines, number = bad_lines or BadLines(), 0
    try:
        for batch in dataset.iter(batch_size=256):
            if text_column not in batch:
                raise _missing_column("dataset", text_column, batch)
            for text in batch[text_column]:
                number += 1
                if bar is not None:
                    bar.update()
                try:
                    yield _check_text(text, f'no string in the column "{text_column}"')
                except ValueError as error:
                    bad_lines.report("dataset", number, _describe_error(error))
    except InputError:
        raise
    except Exception as error:  # each file format and network client has its own
        raise InputError(f"dataset, after row {number}: cannot be read ({error}).") from error


def open_hub_dataset(name: str, config: str | None, split: str | None, streaming: bool, extra: str) -> Any:
    """Opens a split of a Hub dataset or local folder; `extra` is our pip extra that installs `datasets`."""
    require_package("datasets", extra, "a Hub dataset")
    import datasets

    if not shows_bars():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # each file format and network client has its own
        raise InputError(f"{name}: neither a local file nor a reachable Hub dataset ({error}).") from error


@dataclass
class DataOptions:
    """The `data` section of a recipe: the source of the text, and how it is cut into blocks.

    Args:
        train_files, validation_files: files, folders or glob patterns (see documents.py).
        dataset, dataset_config, dataset_split, validation_split: a Hub dataset in place of files.
        streaming: read and tokenise the text while training, without a cache.
        text_column: key or column of the text.
        max_documents: read only this number of documents.
        skip_bad_lines: skip and count lines that hold no document, instead of stopping there.
        validation_blocks: evaluate only on this number of blocks.
        block_size: tokens per block, divisible by the patch size.
        append_eos, pad_to_patch: how each document ends (see `DocumentEnding`).
        random_phase: shift the block boundaries in each epoch, so that patches start at every offset.
        left_fill: fraction of blocks that look like a short prompt: 0 … K − 1 filler tokens, then a document's start.
        cache_dir: folder of the token files; by default calm/tokens in the cache of Hugging Face.
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
    """A re-iterable sequence of documents. After the first full pass, it reports skipped lines on stderr.

    Args:
        readers: of each file in turn, (bad_lines, bar) → iterator of documents.
        source: name of the source, for messages.
        limit, skip_bad_lines: `max_documents` and `skip_bad_lines` of `DataOptions`.
        description, unit, total: of a progress bar; without `description` there is none.
        may_be_empty: no error if there is no text.
    """

    readers: list[Callable[..., Iterator[str]]]
    source: str
    limit: int | None = None
    skip_bad_lines: bool = False
    description: str | None = None
    unit: str = "B"
    total: int | None = None
    may_be_empty: bool = False
    is_reported: bool = False

    def share(self, index: int, count: int) -> Sequence[Callable[[], Iterator[str]]]:
        """Returns the parts of one of `count` shares: files or, where these are fewer, every n-th document of each."""
        parts = [replace(self, readers=[reader], description=None, may_be_empty=True) for reader in self.readers]
        if self.limit is not None:  # of all files together
            parts = [replace(self, description=None)]
        if len(parts) >= count:
            return [partial(iter, part) for part in parts[index::count]]
        return [partial(itertools.islice, part, index, None, count) for part in parts]

    def __iter__(self) -> Iterator[str]:
        bad_lines, is_empty = BadLines(self.skip_bad_lines), True
        with progress_bar(None, self.description, self.unit, self.total) if self.description else nullcontext() as bar:
            texts = itertools.chain.from_iterable(read(bad_lines=bad_lines, bar=bar) for read in self.readers)
            for text in itertools.islice(texts, self.limit):
                is_empty = is_empty and not text
                yield text
        if is_empty and not self.may_be_empty:
            raise InputError(f"{self.source}: no text there{f' ({bad_lines.summary()})' if bad_lines.count else ''}.")
        if bad_lines.count and not self.is_reported:
            self.is_reported = True
            print(f"warning: {bad_lines.summary()}", file=sys.stderr)


def load_documents(options: DataOptions, part: str, description: str | None = None) -> tuple[Documents, list]:
    """Returns the documents of the "train" or "validation" part, and their source as JSON for the token cache's key.

    With a `description`, reading them shows a progress bar.
    """
    paths = options.train_files if part == "train" else options.validation_files
    limit = options.max_documents
    split = options.dataset_split if part == "train" else options.validation_split
    if limit is not None and limit < 1:
        raise InputError(f"max_documents={limit}: must be at least 1.")
    if paths:
        files = expand_paths(paths)
        key = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        readers = [partial(read_documents, [file], options.text_column) for file in files]
        source = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        unit, total = "B", None if limit else total_bytes(files)
    elif options.dataset and split:
        streaming = options.streaming and part == "train"
        dataset = open_hub_dataset(options.dataset, options.dataset_config, split, streaming, extra="train")
        key = [options.dataset, options.dataset_config, split, getattr(dataset, "_fingerprint", None)]
        num_shards, source = getattr(dataset, "num_shards", 1) if streaming else 1, options.dataset
        shards = [dataset.shard(num_shards, index) for index in range(num_shards)] if num_shards > 1 else [dataset]
        readers = [partial(read_hub_dataset, shard, options.text_column) for shard in shards]
        unit, total = "document", limit or (len(dataset) if isinstance(dataset, Sized) else None)
    elif part == "train":
        raise InputError("no data: give --train_files files or folders, or --dataset a Hub dataset.")
    else:
        raise InputError("no validation data: give --validation_files or --validation_split, or --eval_strategy no.")
    return Documents(readers, source, limit, options.skip_bad_lines, description, unit, total), key


def total_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class DocumentEnding:
    """How each document ends; the tokenizer itself adds BOS at its start.

    Published: CALM with neither option; autoencoder with both (EOS, then padding to a whole patch).
    """

    append_eos: bool = False
    pad_to_patch: bool = False
    patch_size: int = 1


def _batch_documents(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yields lists of about `CHARACTERS_PER_BATCH` characters, without empty documents."""
    batch, num_characters = [], 0
    for document in filter(None, documents):
        batch.append(document)
        num_characters += len(document)
        if num_characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def tokenize_documents(documents: Iterable[str], tokenizer, ending: DocumentEnding) -> Iterator[np.ndarray]:
    """Yields the token ids of each document, ended as `ending` says; empty documents are skipped.

    Only the tokenizer and `ending` add special tokens: one that is spelled out in a document is tokenised as plain
    text. If the tokenizer can't do that, the number of such documents is reported on stderr.
    """
    if ending.append_eos and tokenizer.eos_token_id is None:
        raise InputError("append_eos needs a tokenizer with an EOS token.")
    if ending.pad_to_patch and tokenizer.pad_token_id is None:
        raise InputError("pad_to_patch needs a tokenizer with a pad token.")
    special_ids = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special and i != tokenizer.unk_token_id]
    num_added, num_spelling_special = tokenizer.num_special_tokens_to_add(), 0

    for batch in _batch_documents(documents):
        encoded = tokenizer(batch, return_attention_mask=False, split_special_tokens=True, verbose=False)
        for ids in encoded["input_ids"]:
            num_spelling_special += int(np.isin(ids, special_ids).sum()) > num_added
            if ending.append_eos:
                ids.append(tokenizer.eos_token_id)
            if ending.pad_to_patch:
                ids += [tokenizer.pad_token_id] * (-len(ids) % ending.patch_size)
            yield np.asarray(ids, dtype=np.uint32)
    if num_spelling_special:
        problem = "spell special tokens, which this tokenizer can't read as text"
        print(f"warning: {num_spelling_special} document(s) {problem}", file=sys.stderr)
