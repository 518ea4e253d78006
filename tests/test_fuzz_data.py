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
BAD_LINES = {  # line and why
    ".jsonl": [
        (b" \t", None),
        *((line, "not JSON") for line in (b'{"text": "cut', b'{"text": "a"} {}')),
        (b'{"body": "x", "n": 1}', 'no string under the key "text"; it has body, n'),
        *((line, "no string under the key") for line in (b'{"text": 3}', b'["text"]', b"1" * 9000)),
        *((b'{"%s": 1}' % name, "no string under the key") for name in (b"k" * 9000, rb"a\nb\ud800")),
        *((line, "not UTF-8 .*; convert it to UTF-8") for line in (b'{"text": "caf\xe9"}', "{}".encode("utf-16"))),
        (rb'{"text": "x\ud800"}', "not valid Unicode: character 2 is a lone surrogate"),
        (b"[" * 100_000 + b"]" * 100_000, "JSON that is nested too deeply"),
    ],
    ".txt": [(b"a\xe9\n", "not UTF-8")],
    ".parquet": [(None, "no string in the column"), (b"\xed\xa0\x80", "not UTF-8")],
}
MORE = ["", ', "n": ' + "1" * 5000, ', "meta": [{"text": 5}]', r', "s": "\ud800"', ', "x": NaN']
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 345\n"

names = st.text("ab[]*?{}!-~$%. é\udcff", min_size=1, max_size=5).map(lambda name: name + "-")
characters = st.characters(codec="utf-8", exclude_characters="\ufeff")
texts = st.text(characters, max_size=8) | st.sampled_from(["", "a\r\nb", "\x85\u2028\x1c", "</s><s>", "é" * 70_000])


class File:
    """A file's `content`, its `documents`, its bad lines as {number: why}, and its `damage`."""

    def __init__(self, draw, form, suffix):
        self.documents, self.bad = draw(st.lists(texts, max_size=4)), {}
        rows = [text.encode() + b"\n" * (form == ".txt") for text in self.documents]
        if form == ".jsonl":
            more, ascii_ = draw(st.sampled_from(MORE)), draw(st.booleans())
            rows = [f'{{"text": {json.dumps(text, ensure_ascii=ascii_)}{more}}}'.encode() for text in self.documents]
        for line, why in draw(st.lists(st.sampled_from(BAD_LINES[form]), max_size=1)):
            at = draw(st.integers(0, len(rows)))
            rows.insert(at, line)
            self.bad = {(b"".join(rows[:at]).count(b"\n") if form == ".txt" else at) + 1: why} if why else {}
        if form == ".parquet":
            buffers, sink = pyarrow.array(rows, pyarrow.binary()).buffers(), pyarrow.BufferOutputStream()
            column = pyarrow.Array.from_buffers(pyarrow.string(), len(rows), buffers)
            pyarrow.parquet.write_table(pyarrow.table({"text": column}), sink)
            content = sink.getvalue().to_pybytes()
        else:
            mark, end = draw(st.sampled_from([b"", codecs.BOM_UTF8])), draw(st.sampled_from([b"\n", b"\r\n", b""]))
            content = mark + (end or b"\n").join(rows) + end if form == ".jsonl" else mark + b"".join(rows)
        if form == ".txt":
            self.documents = ["".join(text + "\n" for text in self.documents)]
        cut, is_whole = draw(st.integers(0, len(content))), not suffix or draw(st.booleans())
        frames = [COMPRESS[suffix](part) for part in ([content] if is_whole else [content[:cut], content[cut:]])]
        self.content, kinds = b"".join(frames), [None, None, None, "cut", "flip", "LFS pointer"]
        self.damage = draw(st.sampled_from(kinds if suffix or form == ".parquet" else kinds[2:3] * 5 + kinds[-1:]))
        at = draw(st.sampled_from([0, len(frames[0]) + 1, 10**9]) | st.integers(0, len(self.content)))
        at = max(min(at, len(self.content) - 1), 0)
        if self.damage == "cut":
            self.content = self.content[: at - (at == len(frames[0]))]
        elif self.damage == "flip" and suffix:
            self.content = self.content[:at] + bytes([self.content[at] ^ 1 << at % 8]) + self.content[at + 1 :]
        elif self.damage:
            self.damage, self.content = "LFS pointer", POINTER


@st.composite
def folders(draw):
    """Files by path, links to some, and what is wrong with another entry."""
    files, parts = {}, st.lists(st.sampled_from(["sub", ".hidden", "d[1].txt", "*"]), max_size=2)
    for i in range(draw(st.integers(1, 4))):
        form, suffix = draw(st.sampled_from([".jsonl", *BAD_LINES])), draw(st.sampled_from(sorted(COMPRESS)))
        files["/".join([*draw(parts), f"{draw(names)}{i}{form}{suffix}"])] = File(draw, form, suffix)
    targets = draw(st.lists(st.sampled_from(sorted(files)), max_size=1))
    links = {f"{draw(names)}link{Path(name).name}": name for name in targets}
    other = draw(st.sampled_from([None] * 12 + ["No such file", "Too many levels", "not a regular file"]))
    return files, links, other


@given(folders(), st.sampled_from(["the folder", "its files", "*", "**"]), st.booleans())
def test_documents_or_a_named_line_or_a_count(folder, named, skip):
    files, links, other = folder
    with tempfile.TemporaryDirectory() as root:
        for name, file in files.items():
            (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / name).write_bytes(file.content)
        (Path(root) / "notes.md").write_text("no data")
        bad = {"Too many levels": {"z.txt": "z.txt"}, "No such file": {"z.txt": "gone"}}.get(other, {})
        for name, target in {**links, **bad, "loop": root}.items():
            (Path(root) / name).symlink_to(target)
        if other == "not a regular file":
            os.mkfifo(Path(root) / "z.txt")
        found = {name: files[links.get(name, name)] for name in sorted((*files, *links), key=Path)}
        paths = {"the folder": [root], "*": [f"{root}/**/*-*"], "**": [f"{root}/**"]}
        paths["its files"] = [f"{root}/{name}" for name in (*found, *["z.txt"] * bool(other))]
        shown = [(name, f) for name, f in found.items() if named == "its files" or not re.search(r"(^|/)\.", name)]
        found, other = shown, other if named != "*" else None
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
