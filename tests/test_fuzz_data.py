"""Random folders of text: the documents that were written, or an error that names file and line, or lines counted."""

import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from calm_transformers.command_line import InputError
from calm_transformers.documents import DataOptions, load_documents

pytestmark = pytest.mark.fuzz

zst = zstandard.ZstdCompressor(write_checksum=True).compress
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}
BAD_LINES = {  # of .jsonl, and why
    b'{"text": "cut': "not JSON",
    b'{"text": "a"} {}': "not JSON",
    b'{"body": "x", "n": 1}': 'no string under the key "text"; it has body, n',
    rb'{"\ud800": 1, "a\nb": 2}': "no string under the key",
    b'{"' + b"k" * 9000 + b'": 1}': "no string under the key",
    b'{"text": 3}': 'no string under the key "text"',
    b'["text"]': 'no string under the key "text"',
    b"1" * 9000: 'no string under the key "text"',
    b'{"text": "caf\xe9"}': "not UTF-8 .*; convert it to UTF-8",
    "{}".encode("utf-16"): "not UTF-8",
    rb'{"text": "x\ud800"}': "not valid Unicode: character 2 is a lone surrogate",
    b"[" * 100_000 + b"]" * 100_000: "JSON that is nested too deeply",
}
EXTRA = ({}, {"n": "huge"}, {"meta": {"a": [None, {"text": 5}]}}, {"s": "\ud800"}, {"x": float("nan")})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 345\n"

names = st.text("ab[]*?{}!-~$%. é\udcff", min_size=1, max_size=5).map(lambda name: name + "-")
texts = st.text(max_size=8) | st.sampled_from(["", "a\r\nb", "\x85\u2028\x1c", "</s><s>", "é" * 70_000])
rows = st.lists(st.tuples(texts, st.sampled_from(EXTRA), st.booleans()), max_size=4)
whys = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(sorted(BAD_LINES))), max_size=1)


class File:
    """A file's `name` and `content`, its `documents`, and its bad lines as {number: why}."""

    def __init__(self, draw, name, form, suffix):
        self.name, self.documents, self.bad, chosen = name + form + suffix, [], {}, draw(rows)
        if form == ".jsonl":
            lines = [
                json.dumps({"text": t, **extra}, ensure_ascii="s" in extra or a).encode() for t, extra, a in chosen
            ]
            self.documents = [text for text, *_ in chosen]
            lines = [line.replace(b'"huge"', b"1" * 5000) for line in lines]
            for at in draw(st.lists(st.integers(0, 4), max_size=1)):
                lines.insert(at, b" \t")
            for at, line in draw(whys):
                lines.insert(at, line)
                self.bad[lines.index(line) + 1] = BAD_LINES[line]
            end = draw(st.sampled_from([b"\n", b"\r\n"]))
            content = (
                draw(st.sampled_from([b"", codecs.BOM_UTF8])) + end.join(lines) + draw(st.sampled_from([b"", end]))
            )
        elif form == ".txt":
            lines = ["".join(text for text, *_ in chosen).encode(), *draw(st.lists(st.just(b"\na\xe9"), max_size=1))]
            content = b"".join(lines).removeprefix(codecs.BOM_UTF8)
            self.bad = {content.count(b"\n") + 1: "not UTF-8"} if len(lines) > 1 else {}
            self.documents = [lines[0].decode().removeprefix("\ufeff") + ("\n" if self.bad else "")]
        else:
            cells = [text.encode() for text, *_ in chosen]
            for at, cell in draw(
                st.lists(st.tuples(st.integers(0, 4), st.sampled_from([None, b"\xed\xa0\x80"])), max_size=1)
            ):
                cells.insert(at, cell)
                self.bad[cells.index(cell) + 1] = "no string in the column" if cell is None else "not UTF-8"
            self.documents = [text for text, *_ in chosen]
            buffers = pyarrow.array(cells, pyarrow.binary()).buffers()
            sink = pyarrow.BufferOutputStream()
            column = pyarrow.Array.from_buffers(pyarrow.string(), len(cells), buffers)
            pyarrow.parquet.write_table(pyarrow.table({"text": column}), sink)
            content = sink.getvalue().to_pybytes()
        cut = draw(st.integers(0, len(content)))
        frames = [content[:cut], content[cut:]] if suffix and draw(st.booleans()) else [content]
        frames = [COMPRESS[suffix](frame) for frame in frames]
        self.content = b"".join(frames)
        self.damage = draw(st.sampled_from([None, None, None, "cut", "flip", "LFS pointer"]))
        at = draw(st.sampled_from([0, len(frames[0]) + 1, 10**9]) | st.integers(0, len(self.content)))
        at = max(min(at, len(self.content) - 1), 0)
        if self.damage == "cut" and (form == ".parquet" or suffix) and at != len(frames[0]):
            self.content = self.content[:at]
        elif self.damage == "flip" and suffix:
            self.content = self.content[:at] + bytes([self.content[at] ^ 1 << at % 8]) + self.content[at + 1 :]
        elif self.damage == "LFS pointer":
            self.content = POINTER
        else:
            self.damage = None


@st.composite
def folders(draw):
    """Files by path, of which some are links, and the names of other entries with what is wrong with them."""
    files = {}
    for i in range(draw(st.integers(1, 4))):
        folder = draw(st.lists(st.sampled_from(["sub", ".hidden", "d[1].txt", "*"]), max_size=2))
        form, suffix = (
            draw(st.sampled_from([".jsonl", ".jsonl", ".txt", ".parquet"])),
            draw(st.sampled_from(sorted(COMPRESS))),
        )
        path = "/".join([*folder, draw(names) + f"{i}"])
        files[path + form + suffix] = File(draw, path, form, suffix)
    links = {
        f"{draw(names)}link{Path(name).name}": name
        for name in draw(st.lists(st.sampled_from(sorted(files)), max_size=1))
    }
    other = draw(st.sampled_from([None] * 12 + ["No such file", "Too many levels", "not a regular file"]))
    return files, links, other


@given(folders(), st.sampled_from(["the folder", "its files", "*", "**"]), st.booleans())
def test_documents_or_a_named_line_or_a_count(folder, named, skip):
    files, links, other = folder
    with tempfile.TemporaryDirectory() as root:
        for name, file in files.items():
            (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / name).write_bytes(file.content)
        for name, target in links.items():
            (Path(root) / name).symlink_to(target)
        (Path(root) / "notes.md").write_text("no data")
        (Path(root) / "loop").symlink_to(root)
        if other == "not a regular file":
            os.mkfifo(Path(root) / "z.txt")
        elif other:
            (Path(root) / "z.txt").symlink_to("z.txt" if other == "Too many levels" else "gone")
        found = {name: files[links.get(name, name)] for name in (*files, *links)}
        if named != "its files":
            found = {name: file for name, file in found.items() if not re.search(r"(^|/)\.", name)}
        order = sorted(found, key=lambda name: Path(root) / name)
        paths = {"the folder": [root], "its files": [f"{root}/{name}" for name in order]}
        paths |= {"*": [f"{root}/**/*-*"], "**": [f"{root}/**"]}
        if other and named == "its files":
            paths[named].append(f"{root}/z.txt")
        found, other = [(name, found[name]) for name in order], other if named != "*" else None
        read, errors = [], io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                documents, _ = load_documents(DataOptions(paths[named], skip_bad_lines=skip), "train")
                read += documents
        except InputError as error:
            message = str(error).replace(root + "/", "")
            assert "\n" not in message and len(message) < 600, message
            if message.startswith("z.txt"):
                assert other and other in message
            elif "no such file or folder" in message or "the folder holds no file" in message:
                assert not found and not other
            elif "no text there" in message:
                assert not any(text for _, file in found for text in file.documents)
            else:
                at = next(i for i, (name, _) in enumerate(found) if message.startswith((f"{name}:", f"{name}, ")))
                name, file = found[at]
                assert file.damage or not skip and file.bad
                if file.damage == "LFS pointer":
                    assert "is a Git LFS pointer" in message
                elif not file.damage:
                    ((number, why),) = file.bad.items()
                    assert re.match(re.escape(f"{name}, line {number}: ") + why, message)
                    assert all(not other.bad and other.damage in (None, "flip") for _, other in found[:at])
        else:
            assert found and not other
            assert all(file.damage in (None, "flip") and (skip or not file.bad) for _, file in found)
            assert read == [text for _, file in found for text in file.documents]
            count = sum(len(file.bad) for _, file in found)
            assert (f"warning: {count} bad line(s) skipped, the first: " in errors.getvalue()) == bool(count)
