"""From files to blocks: every readable format, clear errors, and an order that shards and resumes exactly."""

import argparse
import codecs
import gzip
import itertools
import json
import lzma
import os
import shutil
import subprocess
import sys
from functools import partial

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from tiny import BOS, EOS, PAD, tiny_tokenizer
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from calm_transformers import documents
from calm_transformers.command_line import InputError
from calm_transformers.documents import DataOptions, DocumentEnding, load_documents, tokenize_documents
from calm_transformers.evaluation import blocks
from calm_transformers.evaluation.blocks import pack_blocks
from calm_transformers.training import data
from calm_transformers.training.data import PackedBlocks, PatchCollator, RunLength, Tokens, TokenShard, write_shard
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
    return list(documents.read_documents(documents.expand_paths([str(p) for p in paths]), **options))


LINES = jsonl(TEXTS)
READABLE = {
    **{f"a.jsonl{suffix}": COMPRESS.get(suffix, bytes)(LINES) for suffix in ("", *COMPRESS)},
    "a.parquet": parquet(TEXTS),
    "a.parquet.zst": zstandard.compress(parquet(TEXTS)),
    "dictionary.parquet": parquet(pyarrow.array(TEXTS).dictionary_encode()),
    "signature.jsonl": codecs.BOM_UTF8 + LINES,
    "huge_number.jsonl": LINES.replace(b"}", b', "n": ' + b"1" * 5000 + b"}"),
    "frames.jsonl.zst": zstandard.compress(LINES[:10]) + zstandard.compress(LINES[10:40]) + zstd_frame(LINES[40:], 31),
}


def test_files_at_a_url_are_read_like_local_ones():
    files = fsspec.filesystem("memory")
    for name, content in READABLE.items():
        files.pipe(f"/corpus/{name}", content)
    files.pipe("/corpus/.hidden.txt", b"no")
    for name in READABLE:
        assert read(f"memory://corpus/{name}") == TEXTS
    assert len(read("memory://corpus")) == len(READABLE) * len(TEXTS)
    assert read("memory://corpus/a.jsonl*") == 4 * TEXTS
    with pytest.raises(InputError, match="memory://corpus/none.txt: no such file"):
        read("memory://corpus/none.txt")
    options = DataOptions(["memory://corpus/a.jsonl"])
    assert load_documents(options, "train")[1] == [["memory://corpus/a.jsonl", len(LINES), 0]]


TABLE = parquet([str(n) * 50 for n in np.random.default_rng(0).integers(10**9, size=500)])


def test_an_unreadable_file_is_an_error_even_if_lines_are_skipped(tmp_path):
    for name, content, column, message in (
        ("a.csv", b"a,b", "text", r"a\.csv: unknown format; readable are \.txt"),
        ("a.txt.gz", bytes(9), "text", r"a\.txt\.gz, after line 0: the file is damaged .* \(it holds no com"),
        ("a.parquet", TABLE[:40] + b"\xff" * 2000 + TABLE[2040:], "text", "not a readable"),  # it opens
        ("a.parquet", TABLE, "body", r'a\.parquet: no column "body"; it has text, n \('),
        ("a.parquet", TABLE, "n", r'a\.parquet: the column "n" holds int64, not strings'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read(tmp_path / name, text_column=column, bad_lines=documents.BadLines(skip=True))


def test_missing_paths_are_named(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    for name, why in {"nowhere": "no such file", "d.jsonl": "the folder holds no file"}.items():
        with pytest.raises(InputError, match=f"{name}.*: {why}"):
            documents.expand_paths(str(tmp_path / name))


def test_errors_of_a_hub_dataset_are_named(tmp_path):
    def broken():
        yield {"text": "a"}
        raise RuntimeError("no route to host")

    def stream(rows):
        return datasets.IterableDataset.from_generator(rows)

    rows = datasets.Dataset.from_dict({"body": TEXTS, "n": [1, None, 3]})
    surrogate = stream(lambda: iter([{"text": "a"}, {"text": "\ud800"}]))
    for dataset, column, message in [
        (stream(broken), "text", r"dataset, after row \d: cannot be read \(.*no route"),
        (rows, "text", 'no column "text"; it has body, n'),
        (rows, "n", 'dataset, line 1: no string in the column "n"'),
        (surrogate, "text", "dataset, line 2: not valid Unicode: character 1"),
    ]:
        with pytest.raises(InputError, match=message):
            list(documents.read_hub_dataset(dataset, column))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text"')
    for part, message in (("train", "neither a local file nor a reachable Hub"), ("validation", "no validation data")):
        with pytest.raises(InputError, match=message):
            load_documents(DataOptions(dataset=str(tmp_path)), part)


def test_skipped_lines_are_reported_once_also_if_no_text_is_left(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(LINES + b"[]\n")
    texts, _ = load_documents(DataOptions(train_files=[str(tmp_path / "a.jsonl")], skip_bad_lines=True), "train")
    assert list(texts) == list(texts) == TEXTS
    assert capsys.readouterr().err.count("1 bad line(s) skipped") == 1
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").write_bytes(b"[]\n")
    options = DataOptions(train_files=[str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], skip_bad_lines=True)
    with pytest.raises(InputError, match=r"a\.txt and 1 more: no text there \(1 bad line.*b\.jsonl, line 1"):
        list(load_documents(options, "train")[0])


# tokens


def test_a_document_that_spells_special_tokens_is_text(capsys):
    special = ["<|filler|>", "<|bos|>", "<|eos|>", "<|pad|>"]
    tokenizer = train_bpe([f"{token} and <|bos|><|eos|>" for token in special] * 9, 270)
    texts = [f"{token}one {token} two{token}" for token in special]
    for text, found in zip(texts, tokenize_documents(texts, tokenizer, DocumentEnding()), strict=True):
        assert found[0] == tokenizer.bos_token_id and min(found[1:]) > 3 and tokenizer.decode(found[1:]) == text
    blocks_BL = pack_blocks(texts, tokenizer, 4)
    assert (blocks_BL == tokenizer.bos_token_id).sum() <= len(texts) and tokenizer.eos_token_id not in blocks_BL
    plain = ["one two", "  \tthree\n\n four "]
    expected = tokenizer(plain)["input_ids"]
    assert [ids.tolist() for ids in tokenize_documents(plain, tokenizer, DocumentEnding())] == expected
    assert tokenizer(special[2])["input_ids"] == [tokenizer.bos_token_id, 2]  # in a prompt it is the special token
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name, joined", [("Salesforce/wikitext", True), ("some/texts", False)])
def test_the_lines_of_wikitext_are_joined_to_articles(name, joined, monkeypatch):
    """Rows as on the Hub: a title has one equals sign, a section's two, and blank lines are empty rows."""
    articles = [["", " = A = B = \n", "", " = = Life = = \n", "", " a text\n"], [" = Second = \n", "", " = 2\n"]]
    rows = datasets.Dataset.from_dict({"text": [line for article in articles for line in article]})
    monkeypatch.setattr(blocks, "open_hub_dataset", lambda *_, **__: rows)
    options = argparse.Namespace(data=name, subset=None, split="test", text_column="text")
    expected = ["".join(line or " \n" for line in article) for article in articles] if joined else rows["text"]
    assert list(blocks.open_documents(options)) == list(expected)


def test_documents_whose_special_tokens_cannot_be_text_are_counted(capsys):
    """A Unigram vocabulary has them among its pieces."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "ab</s>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert len(list(tokenize_documents(["a</s>b</s>", "ab", "a?b"], tokenizer, DocumentEnding(append_eos=True)))) == 3
    assert capsys.readouterr().err.startswith("warning: 1 document(s) spell special tokens")


def test_documents_end_as_published():
    """As for the language model, with EOS, and as for the autoencoder: EOS, then padding to a whole patch."""
    a = tiny_tokenizer().convert_tokens_to_ids("a")
    for ending, *ends in (((), [], []), ((True,), [EOS], [EOS]), ((True, True, 4), [EOS], [EOS, PAD, PAD])):
        ending = DocumentEnding(*ending)
        found = [ids.tolist() for ids in tokenize_documents(["ab", "", "abcd"], tiny_tokenizer(), ending)]
        assert found == [[BOS, a, a + 1, *ends[0]], [BOS, a, a + 1, a + 2, a + 3, *ends[1]]]


IDS = np.arange(3, dtype=np.uint32)


def one_shard(key="") -> dict:
    return {"key": key, "num_shards": 1, "dtype": "uint16"}


def written(folder, *ids) -> list[int]:
    return write_shard(folder, one_shard(), 0, lambda: iter(ids)).ids.tolist()


def test_tokens_are_written_once_and_a_failure_leaves_nothing(tmp_path):
    def broken():
        yield IDS
        raise InputError("line 2")

    folder = tmp_path / "tokens"
    for write, message in ((broken, "line 2"), (lambda: iter([]), "holds no text")):
        with pytest.raises(InputError, match=message):
            write_shard(folder, one_shard(), 0, write)
        assert list(tmp_path.iterdir()) == []
    first = write_shard(folder, one_shard(), 0, lambda: iter([IDS, IDS + 1]))
    assert first.ids.tolist() == [0, 1, 2, 1, 2, 3] and first.bounds.tolist() == [0, 3, 6]
    assert write_shard(folder, one_shard(), 0, broken).ids.tolist() == first.ids.tolist()
    with pytest.raises(InputError, match=r"tokens holds other tokens \(key '' in place of 'b'\): name another folder"):
        write_shard(folder, one_shard("b"), 0, broken)
    with pytest.raises(InputError, match=r"tokens\.bin/a: the tokens cannot be written there \("):
        written(next(tmp_path.rglob("tokens.bin")) / "a", IDS)


def test_two_processes_that_write_the_same_tokens_share_the_first_ones(tmp_path, monkeypatch):
    """Their process ids are the same: they may be on different machines."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    folder = tmp_path / "tokens"

    def write_while_another_process_does():
        yield IDS + 1
        written(folder, IDS)

    second = write_shard(folder, one_shard(), 0, write_while_another_process_does)
    assert second.ids.tolist() == [0, 1, 2] and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["tokens.bin", "document_bounds.npy"])
@pytest.mark.parametrize("size", [None, 0, 5])
def test_damaged_tokens_are_written_again(tmp_path, name, size):
    folder = tmp_path / "tokens"
    written(folder, IDS)
    (file,) = folder.rglob(name)
    file.unlink() if size is None else os.truncate(file, size)
    assert written(folder, IDS, IDS) == written(folder) == [0, 1, 2] * 2


def test_shards_are_one_sequence():
    shards = [np.arange(0, 7), np.arange(7, 8), np.arange(8, 20)]
    bounds = [[0, 3, 7], [0, 1], [0, 5, 12]]
    tokens = Tokens([TokenShard(ids, np.array(each)) for ids, each in zip(shards, bounds, strict=True)])
    assert len(tokens) == 20
    slices = [(i, j) for i in range(20) for j in range(i + 1, 21)]
    assert all(tokens[i:j].tolist() == list(range(i, j)) for i, j in slices)
    assert [tokens.next_document(i) for i in range(20)] == [0, *3 * [3], *4 * [7], 8, *5 * [13], *6 * [20]]


OPEN_SCRIPT = """
import resource, sys, time
from pathlib import Path
import calm_transformers.training.data as data
from calm_transformers.training.data import PackedBlocks
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
tokens = data._load_tokenized(Path(sys.argv[1]), {"dtype": "uint16"})
blocks = PackedBlocks(tokens, 2048, 4, seed=1, random_phase=True, left_fill=0.5, filler_token_id=0)
rows = [blocks[i] for i in range(0, len(blocks), len(blocks) // 100)]
seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(tokens), seconds, grown / 1024)
"""


@pytest.mark.slow
def test_a_billion_tokens_open_in_seconds_and_100_mb(tmp_path):
    """Synthetic ones, in four shards whose files have holes; documents of 512 tokens."""
    (tmp_path / "calm_tokens.json").write_text(json.dumps({"dtype": "uint16", "num_shards": 4}))
    for shard in range(4):
        folder = tmp_path / f"shard-{shard:05d}"
        folder.mkdir()
        shutil.copy(tmp_path / "calm_tokens.json", folder)
        with open(folder / "tokens.bin", "wb") as file:
            file.truncate(2 * 25 * 10**7)
        np.save(folder / "document_bounds.npy", np.append(np.arange(0, 25 * 10**7, 512), 25 * 10**7))
    found = subprocess.run([sys.executable, "-c", OPEN_SCRIPT, tmp_path], capture_output=True, text=True, check=True)
    tokens, seconds, megabytes = map(float, found.stdout.split())
    assert tokens == 10**9 and seconds < 5 and megabytes < 100  # 0.2 s on a quiet machine


def test_the_cache_keeps_the_tokens_of_different_options_apart(tmp_path):
    (tmp_path / "hub").mkdir()
    for name in ("a", "b", "hub/train", "hub/test"):
        lines = "".join(json.dumps({"text": text, "body": name * 2}) + "\n" for text in (name, "c"))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    other_end = tiny_tokenizer()
    other_end.eos_token = "a"
    files, hub = {"train_files": [str(tmp_path / "a.jsonl")]}, {"dataset": str(tmp_path / "hub")}
    changes = [{"train_files": [str(tmp_path / "b.jsonl")]}, {"text_column": "body"}, {"max_documents": 1}]
    changes += [{"append_eos": True}, {"append_eos": True, "pad_to_patch": True}, {}]
    choices = [*(files | change for change in changes), hub, hub | {"dataset_split": "test"}]
    seen = set()
    calls = [*((each, tiny_tokenizer()) for each in choices), (choices[3], other_end)]
    for i, (fields, tokenizer) in enumerate(calls):
        arguments = DataOptions(**fields, cache_dir=str(tmp_path)), "train", tokenizer, 4
        folders = tmp_path / "shared", tmp_path / f"own{i}"
        shared, own = (data.load_tokens(*arguments, folder)[:].tolist() for folder in folders)
        assert shared == own, fields
        seen.add(tuple(own))
    assert len(seen) == len(choices) + 1


# blocks

FILLED = {"patch_size": 4, "filler_token_id": 1000}


def numbers(length: int = 103, document: int = 10) -> Tokens:
    return Tokens([TokenShard(np.arange(length, dtype=np.uint32), np.append(np.arange(0, length, document), length))])


def starts(blocks) -> list[int]:
    return [int(block["input_ids"][0]) for block in blocks]


def test_an_epoch_has_every_block_once_and_the_next_another_order():
    blocks = PackedBlocks(numbers(), block_size=8, num_blocks=24, seed=1)
    assert all((block["input_ids"].diff() == 1).all() for block in blocks)
    first, second = starts(blocks)[:12], starts(blocks)[12:]
    assert sorted(first) == sorted(second) == list(range(0, 96, 8))
    assert first != second and first != sorted(first)


def test_random_phase_shifts_the_block_boundaries_of_each_epoch():
    blocks = PackedBlocks(numbers(), 8, num_blocks=24 * 12, seed=0, random_phase=True)
    assert {start % 8 for start in starts(blocks)} == set(range(8))
    first = starts(blocks)[: blocks.blocks_per_epoch]
    assert len(set(first)) == len(first) and len({start % 8 for start in first}) == 1


def test_left_fill_makes_short_prompts_of_every_length():
    blocks = PackedBlocks(numbers(), 8, num_blocks=300, seed=0, left_fill=1.0, **FILLED)
    for block in blocks:
        ids, num_fillers = block["input_ids"].tolist(), block["num_fillers"]
        assert ids[:num_fillers] == [1000] * num_fillers and 1000 not in ids[num_fillers:]
        assert ids[num_fillers] % 10 == 0 or ids[num_fillers] > 90  # starts with a document, except at the data's end
    assert {block["num_fillers"] for block in blocks} == {0, 1, 2, 3}
    some = PackedBlocks(numbers(), 8, num_blocks=1000, seed=0, left_fill=0.4, **FILLED)
    fraction = np.mean([block["num_fillers"] > 0 for block in some])
    assert abs(fraction - 0.4 * 3 / 4) < 0.06  # four standard deviations


def test_invalid_options_raise_before_the_data_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"not to be read")
    for fields, why in (
        ({"block_size": 0}, "block_size=0: must be at least 1"),
        ({"block_size": 10}, r"block_size=10 is not divisible by patch_size=4"),
        ({"left_fill": 1.5}, r"left_fill=1.5: must lie in \[0, 1\]"),
        ({"left_fill": float("nan")}, r"left_fill=nan: must lie in \[0, 1\]"),
        ({"left_fill": 0.5}, "left_fill needs a filler token"),
        ({"validation_blocks": 0}, "validation_blocks=0: must be at least 1"),
        ({"max_documents": 0}, "max_documents=0: must be at least 1"),
        ({"validation_files": ["b.jsonl"]}, r"b\.jsonl: no such file"),
    ):
        options, tokenizer = DataOptions([str(tmp_path / "a.jsonl")], **fields), tiny_tokenizer()
        tokenizer.pad_token = None
        evaluates = "validation_files" in fields
        with pytest.raises(InputError, match=why):
            data.build_datasets(options, tokenizer, 4, RunLength(1, max_steps=1), 0, tmp_path / "tokens", evaluates)
        assert not (tmp_path / "tokens").exists()


def test_steps_and_blocks_by_hand():
    """The last batch is filled up with blocks of the next epoch."""
    steps = {RunLength(3): 3, RunLength(4): 3, RunLength(100): 1, RunLength(4, epochs=2): 5}
    steps |= {RunLength(4, epochs=0.5): 2, RunLength(4, epochs=3, max_steps=7): 7}
    assert {length: length.num_steps(9) for length in steps} == steps
    assert data.blocks_per_epoch(24, 8) == data.blocks_per_epoch(31, 8) == 3
    assert data.blocks_per_epoch(24, 8, random_phase=True) == 2  # for any start among the first 8 tokens
    for is_random, end in ((False, r"\."), (True, " and a random phase")):
        with pytest.raises(InputError, match=f"7 tokens, too few for one block of block_size=8{end}"):
            data.blocks_per_epoch(7, 8, random_phase=is_random)
    with pytest.raises(InputError, match="block_size=0: must be at least 1"):
        pack_blocks(["abc"], tiny_tokenizer(), 0)


# collator


def test_labels_are_whole_patches_after_the_first_by_hand():
    none = [-100] * 4
    for row, end, ids, labels, mask in (
        (range(10, 20), None, [*range(10, 20), 0, 0], [*none, *range(14, 18), *none], [1] * 10 + [0] * 2),
        (range(20, 26), None, [*range(20, 26), 0, 0, *[0] * 4], 3 * none, [1] * 6 + [0] * 6),
        # a prompt of 6 tokens and a completion of 6: the patch across their boundary has no labels
        ([*[-100] * 6, *range(16, 22)], None, [*range(10, 22)], [*none, *none, *range(18, 22)], [1] * 12),
        (range(10, 16), 2, [*range(10, 16), 2, 2, *[0] * 4], [*none, 14, 15, 2, 2, *none], [1] * 8 + [0] * 4),
    ):
        own = {"input_ids": ids[: len(row)], "labels": list(row)} if -100 in row else {"input_ids": list(row)}
        batch = PatchCollator(4, pad_token_id=0, end_token_id=end)([own, {"input_ids": list(range(11))}])
        assert [batch[name][0].tolist() for name in ("input_ids", "labels", "attention_mask")] == [ids, labels, mask]


def test_the_autoencoder_reconstructs_all_but_the_fillers():
    blocks = PackedBlocks(numbers(), 8, num_blocks=4, seed=0, left_fill=1.0, **FILLED)
    batch = PatchCollator(4, skip_first_patch=False)([blocks[i] for i in range(4)])
    is_filler = batch["input_ids"] == 1000
    assert is_filler.any() and "attention_mask" not in batch
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(is_filler, -100))
    assert batch["block_ids"].tolist() == [0, 1, 2, 3]


# streams


def stream(lengths=(8, 28, 4, 12), limit=None, **options) -> data.StreamedBlocks:
    """Streams documents 0, 1, … of the given lengths, each from a file; each token encodes document and position."""
    ids = [1000 * d + np.arange(n, dtype=np.uint32) for d, n in enumerate(lengths)]
    files = [partial(lambda d, **_: iter([str(d)]), d) for d in range(len(ids))]
    texts = documents.Documents(files, "numbers", limit)
    return data.StreamedBlocks(texts, lambda texts: [ids[int(text)] for text in texts], block_size=4, **options)


def first_blocks(stream, number: int, num_workers: int = 0) -> list[tuple]:
    loader = DataLoader(stream, None, num_workers=num_workers)
    return [tuple(block["input_ids"].tolist()) for block in itertools.islice(loader, number)]


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("num_ranks, num_workers", [(1, 0), (1, 2), (2, 2), (4, 0)])
def test_processes_and_workers_share_the_documents(num_ranks, num_workers, limit):
    """Each share repeats its own; together they have every block."""
    seen = [first_blocks(stream(rank=r, num_ranks=num_ranks, limit=limit), 60, num_workers) for r in range(num_ranks)]
    shares = [set(blocks) for blocks in seen]
    starts = [1000 * d + i for d, n in enumerate((8, 28, 4, 12)) for i in range(0, n, 4)]
    assert set.union(*shares) == {tuple(range(start, start + 4)) for start in starts}
    assert sum(map(len, shares)) == len(starts)  # no block in two


def test_every_nth_document_of_too_few_files():
    texts = documents.Documents([lambda **_: map(str, range(7)), lambda **_: map(str, range(10, 12))], "numbers")
    shares = [[list(part()) for part in texts.share(index, 3)] for index in range(3)]
    assert shares == [[["0", "3", "6"], ["10"]], [["1", "4"], ["11"]], [["2", "5"], []]]


def test_a_stream_depends_on_the_seed_and_resumes_at_any_block(monkeypatch):
    monkeypatch.setattr(data, "STREAM_DOCUMENTS", 2)
    options = {"random_phase": True, "left_fill": 0.5, "filler_token_id": 9, "patch_size": 2, "limit": 9}
    whole, again, other = (first_blocks(stream((9, 12, 7, 30), seed=seed, **options), 60) for seed in (1, 1, 2))
    assert whole == again != other
    for number in range(1, 40):
        first, second = (stream((9, 12, 7, 30), seed=1, **options) for _ in range(2))
        first_blocks(first, number)
        second.load_state_dict(first.state_dict())
        assert first_blocks(second, 15) == whole[number : number + 15]


def test_short_files_of_a_stream_are_read_together():
    assert len(set(first_blocks(stream(50 * [6]), 75))) == 75  # blocks of 4


def test_a_share_without_a_block_is_an_error():
    with pytest.raises(InputError, match="numbers: no block in share 0 of 1 of its text"):
        first_blocks(stream((2, 1)), 1)
