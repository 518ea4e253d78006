"""From files to blocks: every readable format, honest errors, and an order that shards and resumes without loss."""

import codecs
import dataclasses
import gzip
import itertools
import json
import lzma
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from accelerate.data_loader import IterableDatasetShard, skip_first_batches
from tiny import BOS, EOS, PAD, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from calm_transformers.command_line import InputError
from calm_transformers.documents import (
    BadLines,
    DataOptions,
    Separation,
    documents,
    expand_paths,
    read_documents,
    read_hub_dataset,
    tokenize_documents,
)
from calm_transformers.evaluation.blocks import pack_blocks
from calm_transformers.training import data as data_module
from calm_transformers.training.data import (
    Length,
    PackedBlocks,
    PatchCollator,
    StreamedBlocks,
    TokenFile,
    blocks_per_epoch,
    cached_tokens,
    data_sets,
    token_file,
)
from calm_transformers.training.tokenizer import train_bpe

TEXTS = ["One.\nTwo.", "Ünï çødé", "three"]
COMPRESS = {".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.compress}


def jsonl(texts, key="text") -> bytes:
    return b"".join(json.dumps({key: text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def parquet(texts) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), sink)
    return sink.getvalue().to_pybytes()


def zstd_frame(content: bytes, window_log: int) -> bytes:
    """A frame of one raw block whose header wants a window of 2^window_log bytes, as `zstd --long` writes."""
    block = (1 | len(content) << 3).to_bytes(3, "little") + content
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block


def read(*paths, **options) -> list[str]:
    return list(read_documents(expand_paths([str(p) for p in paths]), **options))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.parquet.zst"])
def test_every_format_and_compression_gives_the_same_documents(tmp_path, name):
    content = parquet(TEXTS) if ".parquet" in name else jsonl(TEXTS)
    (tmp_path / name).write_bytes(COMPRESS.get(Path(name).suffix, bytes)(content))
    assert read(tmp_path / name) == TEXTS
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))  # one document
    assert read(tmp_path / "b.txt.gz", tmp_path / name) == [TEXTS[0], *TEXTS]


def test_folders_and_patterns_are_read_in_a_fixed_order(tmp_path):
    for name in ("c.jsonl", "a.jsonl", "sub/b.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jsonl([name]))
    (tmp_path / "data" / "notes.md").write_text("no data")
    assert read(tmp_path / "data") == ["a.jsonl", "c.jsonl", "sub/b.jsonl"]
    assert read(tmp_path / "data" / "*.jsonl") == ["a.jsonl", "c.jsonl"]


@pytest.mark.parametrize(
    "line, why",
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"body": "x", "n": 1}', 'no string under the key "text"; it has body, n'),
        (b'{"text": 3}', 'no string under the key "text"'),
        (b'["text"]', 'no string under the key "text"'),
        (b'{"text": "caf\xe9"}', r"not UTF-8 \(.*\); convert it to UTF-8"),
        (rb'{"text": "x\ud800"}', "no text: character 2 is half of a surrogate pair"),
        (b"[" * 100_000 + b"]" * 100_000, "JSON that is nested too deeply"),
    ],
)
def test_a_bad_line_stops_with_file_and_line_or_is_skipped_and_counted(tmp_path, line, why):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(["first"]) + b"\n" + line + b"\n" + jsonl(["last"]))
    with pytest.raises(InputError, match=rf"data\.jsonl, line 3: {why}"):
        read(path)
    bad_lines = BadLines(skip=True)
    assert read(path, bad_lines=bad_lines) == ["first", "last"]
    assert bad_lines.summary().startswith("1 bad line(s) skipped") and "line 3" in bad_lines.summary()


@pytest.mark.parametrize("compression", [".xz", ".gz", ".zst"])
def test_a_file_that_is_cut_short_is_an_error_even_when_lines_are_skipped(tmp_path, compression):
    path = tmp_path / f"data.jsonl{compression}"
    whole = COMPRESS[compression](jsonl([str(n) * 50 for n in np.random.default_rng(0).integers(10**9, size=500)]))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"data\.jsonl.*after line \d+: the file is damaged"):
        read(path, bad_lines=BadLines(skip=True))


def test_a_huge_number_beside_the_text_does_no_harm(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a", "n": ' + "1" * 5000 + "}")
    assert read(tmp_path / "data.jsonl") == ["a"]


def test_a_signature_of_utf_8_is_no_text_and_text_in_another_encoding_is_named_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + jsonl(["one\ntwo"]))
    assert read(tmp_path / "a.jsonl") == ["one\ntwo"]
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "one\ncafé".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt, line 2: not UTF-8 .*; convert it to UTF-8"):
        read(tmp_path / "a.txt")


def test_a_zst_file_of_several_frames_and_with_a_large_window_is_read(tmp_path):
    first = jsonl(TEXTS)
    frames = zstandard.compress(first[:10]) + zstandard.compress(first[10:]) + zstd_frame(jsonl(TEXTS), 31)
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert read(tmp_path / "a.jsonl.zst") == 2 * TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.parquet.zst"])
def test_a_git_lfs_pointer_is_no_text(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 345\n")
    with pytest.raises(InputError, match=rf"{name}: is a Git LFS pointer .*; run git lfs pull"):
        read(tmp_path / name)


def test_hidden_files_of_a_folder_and_folders_called_like_files_are_not_read(tmp_path):
    data = tmp_path / ".hidden" / "data"  # what is named itself is read
    for name in ("a.jsonl", ".b.jsonl", ".ipynb_checkpoints/c.jsonl", "d.jsonl/.e/f.jsonl"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(jsonl([name]))
    assert read(data) == ["a.jsonl"]
    assert read(data / ".b.jsonl") == [".b.jsonl"]
    with pytest.raises(InputError, match=r"d\.jsonl: the folder holds no file"):
        read(data / "d.jsonl")


def test_a_path_that_is_there_is_no_pattern(tmp_path):
    for name in ("a[1].jsonl", "a1.jsonl"):
        (tmp_path / name).write_bytes(jsonl([name]))
    assert read(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]
    assert read(tmp_path / "a[12].jsonl") == ["a1.jsonl"]


def test_paths_that_hold_no_text_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "dead.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="nowhere.jsonl: no such file"):
        expand_paths("nowhere.jsonl")
    with pytest.raises(InputError, match=r"dead\.jsonl: No such file"):
        expand_paths(tmp_path)
    with pytest.raises(InputError, match="empty: the folder holds no file"):
        expand_paths([str(tmp_path / "empty")])
    with pytest.raises(InputError, match=r"data\.csv: unknown format; readable are \.txt"):
        expand_paths([str(tmp_path / "data.csv")])


def test_another_text_column_is_read_and_a_missing_one_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, key="body"))
    (tmp_path / "b.parquet").write_bytes(parquet(TEXTS))
    assert read(tmp_path / "a.jsonl", text_column="body") == TEXTS
    with pytest.raises(InputError, match='no column "body"; it has text, n'):
        read(tmp_path / "b.parquet", text_column="body")


def test_a_file_that_the_system_does_not_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    files = expand_paths(tmp_path)

    def forbidden(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(InputError, match=r"a\.jsonl: Permission denied\.$"):
        list(read_documents(files))
    with pytest.raises(InputError, match=r"a\.jsonl: Permission denied\.$"):
        expand_paths(tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path):
    path, whole = tmp_path / "a.parquet", parquet([str(n) * 40 for n in range(3000)])
    for content in (whole[:-9], b"", whole[:40] + b"\xff" * 2000 + whole[2040:]):  # the last one opens
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.parquet, after row \d+: not a readable parquet file"):
            read(path)


def test_a_parquet_column_of_another_type_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(TEXTS))
    with pytest.raises(InputError, match=r'a\.parquet: the column "n" holds int64, not strings'):
        read(tmp_path / "a.parquet", text_column="n", bad_lines=BadLines(skip=True))
    words = pyarrow.array(["b", "a", None, "b"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet, line 3: no string in the column"):
        read(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", bad_lines=BadLines(skip=True)) == ["b", "a", "b"]


def test_a_parquet_text_that_is_not_utf_8_is_a_bad_line(tmp_path):
    offsets, content = (pyarrow.py_buffer(b) for b in (np.array([0, 1, 4], np.int32).tobytes(), b"a\xed\xa0\x80"))
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, content])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, line 2: not UTF-8"):
        read(tmp_path / "a.parquet")


def test_what_is_wrong_with_a_hub_data_set_is_said(tmp_path):
    def broken():
        yield {"text": "a"}
        raise RuntimeError("no route to host")

    with pytest.raises(InputError, match=r"dataset, after row \d: cannot be read \(.*no route"):
        list(read_hub_dataset(datasets.IterableDataset.from_generator(broken)))
    rows = datasets.Dataset.from_dict({"body": TEXTS, "n": [1, None, 3]})
    with pytest.raises(InputError, match='no column "text"; it has body, n'):
        list(read_hub_dataset(rows))
    with pytest.raises(InputError, match='dataset, line 1: no string in the column "n"'):
        list(read_hub_dataset(rows, "n"))
    halves = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": "\ud800"}]))
    with pytest.raises(InputError, match="dataset, line 2: no text: character 1 is half of a surrogate pair"):
        list(read_hub_dataset(halves))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(InputError, match="neither a file here nor a Hub dataset"):
        documents(DataOptions(dataset=str(tmp_path)), "train")
    with pytest.raises(InputError, match="no held-out data: give --validation_files or --validation_split"):
        documents(DataOptions(dataset=str(tmp_path)), "validation")


def test_files_without_text_are_named_with_what_was_skipped(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").write_bytes(b"[]\n")
    options = DataOptions(train_files=[str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], skip_bad_lines=True)
    with pytest.raises(InputError, match=r"a\.txt and 1 more: no text there \(1 bad line.*b\.jsonl, line 1"):
        list(documents(options, "train")[0])


def test_what_was_skipped_is_said_once(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS) + b"[]\n")
    texts, _ = documents(DataOptions(train_files=[str(tmp_path / "a.jsonl")], skip_bad_lines=True), "train")
    assert list(texts) == list(texts) == TEXTS
    assert capsys.readouterr().err.count("1 bad line(s) skipped") == 1


# tokens


@pytest.mark.parametrize("kind", ["characters", "trained"])
def test_a_document_that_spells_special_tokens_is_text(kind, capsys):
    if kind == "characters":
        tokenizer, special = tiny_tokenizer(), ["<s>", "</s>", "<pad>"]
    else:
        special = ["<|filler|>", "<|bos|>", "<|eos|>", "<|pad|>"]
        tokenizer = train_bpe([f"{token} and <|bos|><|eos|>" for token in special] * 9, 270)
    ids = tokenizer.convert_tokens_to_ids(special)
    texts = [f"{token}one {token} two{token}" for token in special]
    for text, found in zip(texts, tokenize_documents(texts, tokenizer, Separation()), strict=True):
        assert found[0] == tokenizer.bos_token_id and not set(found[1:].tolist()) & set(ids)
        assert tokenizer.decode(found[1:]) == text
    blocks_BL = pack_blocks(texts, tokenizer, 4)
    assert (blocks_BL == tokenizer.bos_token_id).sum() <= len(texts) and tokenizer.eos_token_id not in blocks_BL
    plain = ["one two", "  \tthree\n\n four "]
    as_ever = tokenizer(plain)["input_ids"]
    assert [ids.tolist() for ids in tokenize_documents(plain, tokenizer, Separation())] == as_ever
    assert tokenizer(special[1])["input_ids"] == [tokenizer.bos_token_id, ids[1]]  # in a prompt it is what it says
    assert capsys.readouterr().err == ""


def test_where_special_tokens_cannot_be_read_as_text_they_are_counted(capsys):
    """A Unigram vocabulary has them among its pieces."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "ab</s>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert len(list(tokenize_documents(["a</s>b</s>", "ab", "a?b"], tokenizer, Separation(append_eos=True)))) == 3
    assert capsys.readouterr().err.startswith("warning: 1 document(s) spell special tokens")


def test_documents_end_as_published():
    tokenizer = tiny_tokenizer()
    plain, ended, padded = (
        [ids.tolist() for ids in tokenize_documents(["ab", "", "abcd"], tokenizer, separation)]
        for separation in (Separation(), Separation(append_eos=True), Separation(True, True, patch_size=4))
    )
    a = tokenizer.convert_tokens_to_ids("a")
    assert plain == [
        [BOS, a, a + 1],
        [BOS, a, a + 1, a + 2, a + 3],
    ]  # the language model's: only what the tokenizer adds
    assert ended == [ids + [EOS] for ids in plain]
    assert padded == [[*ended[0]], [*ended[1], PAD, PAD]]  # the autoencoder's: EOS, then whole patches


def test_tokens_are_written_once_for_a_key_and_a_failure_leaves_nothing(tmp_path):
    def broken():
        yield np.arange(3, dtype=np.uint32)
        raise InputError("line 2")

    with pytest.raises(InputError, match="line 2"):
        cached_tokens(tmp_path, {"a": 1}, broken)
    assert list(tmp_path.iterdir()) == []
    documents = [np.arange(3, dtype=np.uint32), np.arange(5, dtype=np.uint32)]
    first = cached_tokens(tmp_path, {"a": 1}, lambda: iter(documents))
    assert first.tokens.tolist() == [0, 1, 2, 0, 1, 2, 3, 4] and first.document_starts.tolist() == [0, 3]
    again = cached_tokens(tmp_path, {"a": 1}, broken)
    assert again.tokens.tolist() == first.tokens.tolist()
    with pytest.raises(InputError, match="holds no text"):
        cached_tokens(tmp_path, {"a": 2}, lambda: iter([]))


def test_of_two_processes_that_write_the_same_cache_the_second_takes_the_first_s(tmp_path, monkeypatch):
    """Their process ids are the same: they may be on different machines."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    key, ids = {"a": 1}, np.arange(3, dtype=np.uint32)

    def while_another_process_writes_it():
        yield ids + 1
        cached_tokens(tmp_path, key, lambda: iter([ids]))

    second = cached_tokens(tmp_path, key, while_another_process_writes_it)
    assert second.tokens.tolist() == [0, 1, 2] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["tokens.bin", "document_bounds.npy"])
@pytest.mark.parametrize("size", [None, 0, 5])
def test_a_damaged_cache_is_written_again(tmp_path, name, size):
    ids = np.arange(3, dtype=np.uint32)
    cached_tokens(tmp_path, {}, lambda: iter([ids]))
    (folder,) = tmp_path.iterdir()
    if size is None:
        (folder / name).unlink()
    else:
        os.truncate(folder / name, size)
    again = cached_tokens(tmp_path, {}, lambda: iter([ids, ids]))
    assert again.tokens.tolist() == [0, 1, 2] * 2 and again.document_starts.tolist() == [0, 3]
    assert cached_tokens(tmp_path, {}, lambda: iter([])).tokens.tolist() == [0, 1, 2] * 2


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "tokens").touch()
    with pytest.raises(InputError, match=r"tokens/\w+: the tokens cannot be written there \("):
        cached_tokens(tmp_path / "tokens", {}, lambda: iter([np.arange(3, dtype=np.uint32)]))


def test_the_key_of_a_cache_has_every_option_that_changes_tokens(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}", "body": "{name * 2}"}}\n[]\n{{"text": "c"}}\n')
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        (tmp_path / "hub" / f"{split}.jsonl").write_text(f'{{"text": "{split}"}}\n')
    files = DataOptions([str(tmp_path / "a.jsonl")], skip_bad_lines=True)
    hub = DataOptions(dataset=str(tmp_path / "hub"), cache_dir=str(tmp_path))
    changed = {
        "train_files": [str(tmp_path / "b.jsonl")],
        "validation_files": [str(tmp_path / "b.jsonl")],
        "dataset": str(tmp_path),
        "dataset_config": "default",
        "dataset_split": "test",
        "validation_split": "test",
        "text_column": "body",
        "max_documents": 1,
        "skip_bad_lines": False,
        "cache_dir": "elsewhere",
    }
    keys = []
    monkeypatch.setattr(data_module, "cached_tokens", lambda folder, key, write: keys.append(key) or write())

    def key_and_tokens(options):
        try:
            tokens = [ids.tolist() for ids in token_file(options, "train", tiny_tokenizer(), 4, tmp_path)]
        except InputError as error:
            tokens = str(error)
        return keys.pop(), tokens

    for field in dataclasses.fields(DataOptions):
        options = hub if field.name.startswith("dataset") else files
        value = getattr(options, field.name)
        new = changed[field.name] if field.name in changed else not value if type(value) is bool else (value or 0) + 1
        before, after = (key_and_tokens(o) for o in (options, dataclasses.replace(options, **{field.name: new})))
        assert before[1] == after[1] or before[0] != after[0], field.name
        is_known = field.name in data_module.NOT_IN_TOKENS
        assert is_known or before[0] != after[0], f"{field.name}: a new option is in the key"
    other_end = tiny_tokenizer()
    other_end.eos_token = "a"
    ends = dataclasses.replace(files, append_eos=True)
    token_file(ends, "train", tiny_tokenizer(), 4, tmp_path)
    token_file(ends, "train", other_end, 4, tmp_path)
    assert keys[0] != keys[1]


# blocks


def numbers(length: int = 103, document: int = 10) -> TokenFile:
    return TokenFile(np.arange(length, dtype=np.uint32), np.arange(0, length, document))


def starts(blocks) -> list[int]:
    return [int(block["input_ids"][0]) for block in blocks]


def test_an_epoch_has_every_block_once_and_the_next_another_order():
    blocks = PackedBlocks(numbers(), block_size=8, num_blocks=24, seed=1)
    assert blocks.blocks_per_epoch == 12
    assert all((block["input_ids"].diff() == 1).all() for block in blocks)
    first, second = starts(blocks)[:12], starts(blocks)[12:]
    assert sorted(first) == sorted(second) == list(range(0, 96, 8))
    assert first != second and first != sorted(first)


def test_a_block_depends_on_the_seed_and_its_index_alone():
    def make(seed):
        options = {"random_phase": True, "left_fill": 0.5, "filler_token_id": 1000}
        return PackedBlocks(numbers(), 8, 4, num_blocks=30, seed=seed, **options)

    forwards, backwards = make(1), make(1)
    ids = {i: forwards[i]["input_ids"].tolist() for i in range(30)}
    assert {i: backwards[i]["input_ids"].tolist() for i in reversed(range(30))} == ids
    assert {i: make(2)[i]["input_ids"].tolist() for i in range(30)} != ids


def test_random_phase_cuts_each_epoch_at_other_places():
    blocks = PackedBlocks(numbers(), 8, num_blocks=24 * 12, seed=0, random_phase=True)
    phases = {start % 8 for start in starts(blocks)}
    assert phases == set(range(8))
    n = blocks.blocks_per_epoch
    assert len(set(starts(blocks)[:n])) == n and len({s % 8 for s in starts(blocks)[:n]}) == 1


def test_left_fill_makes_short_prompts_of_every_length():
    blocks = PackedBlocks(numbers(), 8, 4, num_blocks=300, seed=0, left_fill=1.0, filler_token_id=1000)
    for block in blocks:
        ids, filling = block["input_ids"].tolist(), block["filling"]
        assert ids[:filling] == [1000] * filling and 1000 not in ids[filling:]
        assert ids[filling] % 10 == 0 or ids[filling] > 90  # begins with a document, but at the very end of the data
    assert {block["filling"] for block in blocks} == {0, 1, 2, 3}
    some = PackedBlocks(numbers(), 8, 4, num_blocks=1000, seed=0, left_fill=0.4, filler_token_id=1000)
    share = np.mean([block["filling"] > 0 for block in some])
    assert abs(share - 0.4 * 3 / 4) < 0.06  # four standard deviations


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="103 tokens, too few for one block of block_size=104"):
        PackedBlocks(numbers(), 104, 4)
    with pytest.raises(InputError, match="needs a filler token"):
        PackedBlocks(numbers(), 8, 4, left_fill=0.5)


@pytest.mark.parametrize(
    "field, value, why",
    [
        ("block_size", 0, "must be at least 1"),
        ("block_size", 10, r"is no multiple of patch_size=4"),
        ("left_fill", 1.5, r"must lie in \[0, 1\]"),
        ("left_fill", float("nan"), r"must lie in \[0, 1\]"),
        ("validation_blocks", 0, "must be at least 1"),
        ("max_documents", 0, "must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_data_is_read(tmp_path, field, value, why):
    (tmp_path / "a.jsonl").write_bytes(b"not to be read")
    options = DataOptions([str(tmp_path / "a.jsonl")], **{field: value})
    with pytest.raises(InputError, match=rf"{field}={value}:? {why}"):
        data_sets(options, tiny_tokenizer(), 4, Length(1, max_steps=1), 0, tmp_path / "tokens", evaluates=False)
    assert not (tmp_path / "tokens").exists()


def test_blocks_of_no_tokens_are_refused():
    with pytest.raises(InputError, match="block_size=0: must be at least 1"):
        pack_blocks(["abc"], tiny_tokenizer(), 0)


def test_held_out_data_that_are_not_there_are_missed_before_the_training_data_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"not to be read")
    options = DataOptions([str(tmp_path / "a.jsonl")], [str(tmp_path / "b.jsonl")])
    with pytest.raises(InputError, match=r"b\.jsonl: no such file"):
        data_sets(options, tiny_tokenizer(), 4, Length(1), 0, tmp_path / "tokens", evaluates=True)


# steps


@pytest.mark.parametrize(
    "length, blocks, steps",
    [
        (Length(4), 8, 2),
        (Length(4), 9, 3),  # the last batch is a whole one, of the next epoch's blocks
        (Length(4, epochs=2), 9, 5),
        (Length(4, epochs=0.5), 9, 2),
        (Length(4, epochs=3, max_steps=7), 9, 7),
        (Length(100), 9, 1),
    ],
)
def test_steps_by_hand(length, blocks, steps):
    assert length.num_steps(blocks) == steps


def test_blocks_by_hand():
    assert blocks_per_epoch(24, 8) == 3
    assert blocks_per_epoch(31, 8) == 3
    assert blocks_per_epoch(24, 8, random_phase=True) == 2  # wherever among the first 8 tokens it begins
    with pytest.raises(InputError, match="14 tokens, too few for one block of block_size=8 and a random phase"):
        blocks_per_epoch(14, 8, random_phase=True)


# collator


def test_labels_count_what_the_loss_predicts():
    """Rows of every length mod K: Trainer divides by the labels that are counted, the model by its targets · K."""
    model = tiny_model()
    rows = [{"input_ids": torch.arange(2, 2 + length)} for length in (16, 15, 9, 8, 5, 4)]
    batch = PatchCollator(4, pad_token_id=0)(rows)
    counted = (batch["labels"] != -100).sum()
    assert counted == 4 * (3 + 2 + 1 + 1 + 0 + 0)
    losses = []
    for number in (None, counted):
        generator = torch.Generator().manual_seed(0)
        losses.append(model(**batch, num_items_in_batch=number, generator=generator).loss)
    torch.testing.assert_close(losses[0], losses[1])


def test_labels_leave_out_the_first_patch_and_partial_patches():
    rows = [{"input_ids": torch.arange(10, 20)}, {"input_ids": torch.arange(20, 26)}]
    batch = PatchCollator(4, pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[*range(10, 20), 0, 0], [*range(20, 26), *[0] * 6]]
    assert batch["labels"].tolist() == [[-100] * 4 + [14, 15, 16, 17] + [-100] * 4, [-100] * 12]
    assert batch["attention_mask"].tolist() == [[1] * 10 + [0] * 2, [1] * 6 + [0] * 6]


def test_the_autoencoder_reconstructs_all_but_the_filling():
    blocks = PackedBlocks(numbers(), 8, 4, num_blocks=4, seed=0, left_fill=1.0, filler_token_id=1000)
    batch = PatchCollator(4, first_patch_is_given=False)([blocks[i] for i in range(4)])
    is_filler = batch["input_ids"] == 1000
    assert is_filler.any() and "attention_mask" not in batch
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(is_filler, -100))
    assert batch["block_ids"].tolist() == [0, 1, 2, 3]


# streams


def stream(lengths=(7, 30, 5, 11), seed=0, **options) -> StreamedBlocks:
    """Documents 0, 1, … of the given lengths, over and over; their tokens say document and position."""
    documents = [1000 * d + np.arange(n, dtype=np.uint32) for d, n in enumerate(lengths)]
    return StreamedBlocks(documents, iter, block_size=4, seed=seed, **options)


def first_blocks(stream, number: int, num_workers: int, batch_size: int = 1) -> list[tuple]:
    loader = DataLoader(stream, batch_size, num_workers=num_workers, collate_fn=list)
    batches = itertools.islice(loader, number // batch_size)
    return [tuple(block["input_ids"].tolist()) for batch in batches for block in batch]


@pytest.mark.parametrize("num_documents, num_workers", [(12, 0), (12, 2), (1, 2)])
def test_workers_share_the_documents_of_an_epoch(num_documents, num_workers):
    documents = stream([4] * num_documents)
    if num_documents > num_workers:
        epoch = Counter(first_blocks(documents, num_documents, num_workers))
        assert len(epoch) == num_documents and set(epoch.values()) == {1}
    blocks = Counter(first_blocks(documents, num_documents * max(num_workers, 1), num_workers))
    assert len(blocks) == num_documents and set(blocks.values()) == {max(num_workers, 1)}


def test_workers_of_unequal_shares_see_all_documents_as_often():
    """Three documents: of two workers one has ten times the tokens of the other."""
    seen = Counter(ids[0] // 1000 for ids in first_blocks(stream([80, 8, 80]), 42 * 10, 2))
    assert [round(seen[d] / 20, 1) for d in range(3)] == [10, 1, 10]


def test_processes_share_a_stream_and_a_resumed_run_goes_on_with_the_next():
    num_workers = 2
    whole = first_blocks(stream(), 24, num_workers, batch_size=2)

    def of_process(rank):
        shard = IterableDatasetShard(stream(), batch_size=2, num_processes=2, process_index=rank)
        loader = DataLoader(shard, 2, num_workers=num_workers, collate_fn=lambda rows: [r["block_id"] for r in rows])
        return [block for batch in itertools.islice(loader, 6) for block in batch]

    shares = of_process(0), of_process(1)
    assert len({*shares[0], *shares[1]}) == 24
    loader = DataLoader(stream(), 2, num_workers=num_workers, collate_fn=list)
    resumed = itertools.islice(skip_first_batches(loader, 5), 7)
    assert [tuple(block["input_ids"].tolist()) for batch in resumed for block in batch] == whole[10:]


def test_workers_share_a_hub_data_set_whatever_its_files(tmp_path):
    """`datasets` itself gives whole files to workers, and none to some."""
    texts = [letter * 4 for letter in "abcdef"]
    for part in range(2):
        (tmp_path / f"train-{part}.jsonl").write_bytes(jsonl(texts[3 * part : 3 * part + 3]))
    options = DataOptions(dataset=str(tmp_path), streaming=True, block_size=5)
    parts = data_sets(options, tiny_tokenizer(), 1, Length(1, max_steps=9), 0, tmp_path, evaluates=False)
    seen = Counter(first_blocks(parts.train, 6, 2))
    assert len(seen) == 6 and {ids[0] for ids in seen} == {BOS}


def test_an_error_in_a_worker_is_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["abcd"]) + b"[]\n")
    options = DataOptions([str(tmp_path / "a.jsonl")], streaming=True, block_size=5)
    blocks = data_sets(options, tiny_tokenizer(), 1, Length(1, max_steps=9), 0, tmp_path, evaluates=False).train
    with pytest.raises(InputError, match=r"^\S+a\.jsonl, line 2: no string under the key \"text\" \([^)]*\)\.$"):
        first_blocks(blocks, 6, 2)


def test_a_stream_loses_and_repeats_nothing_within_an_epoch():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 30, size=50)]
    total = sum(lengths)
    blocks = list(itertools.islice(stream(lengths, shard_tokens=64), 3 * total // 4))
    seen = sorted(t for block in blocks[: total // 4] for t in block["input_ids"].tolist())
    everything = [1000 * d + i for d, n in enumerate(lengths) for i in range(n)]
    assert len(set(seen)) == len(seen) and len(set(everything) - set(seen)) < 4  # the next epoch has them
    assert [block["block_id"] for block in blocks] == list(range(len(blocks)))


def test_a_stream_depends_on_the_seed_alone():
    def first(seed):
        options = {"random_phase": True, "left_fill": 0.5, "filler_token_id": 9, "patch_size": 2}
        return [b["input_ids"].tolist() for b in itertools.islice(stream(seed=seed, shard_tokens=16, **options), 40)]

    assert first(1) == first(1) != first(2)


def test_a_stream_without_text_is_an_error():
    with pytest.raises(InputError, match="holds no text"):
        next(iter(StreamedBlocks([], iter, block_size=4)))
    with pytest.raises(InputError, match="holds no text"):
        first_blocks(stream([0, 0, 0]), 2, num_workers=2)


def test_a_rows_own_labels_count_where_a_whole_patch_has_them():
    """A prompt of 6 tokens and a completion of 7: the patch across their border is no target."""
    row = {"input_ids": list(range(10, 23)), "labels": [-100] * 6 + list(range(16, 23))}
    batch = PatchCollator(4, pad_token_id=0)([row])
    assert batch["input_ids"].tolist() == [[*range(10, 23), 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 8 + [18, 19, 20, 21] + [-100] * 4]


def test_an_end_token_completes_the_last_patch_and_is_learnt():
    rows = [{"input_ids": list(range(10, 16))}, {"input_ids": [30, 31, 32, 33], "labels": [30, 31, 32, 33]}]
    batch = PatchCollator(4, pad_token_id=0, end_token_id=2)(rows)
    assert batch["input_ids"].tolist() == [[*range(10, 16), 2, 2], [30, 31, 32, 33, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [14, 15, 2, 2], [-100] * 8]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 4 + [0] * 4]
