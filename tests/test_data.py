"""From files to blocks: every readable format, honest errors, and an order that shards and resumes without loss."""

import gzip
import itertools
import json
import lzma
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from accelerate.data_loader import BatchSamplerShard
from tiny import BOS, EOS, PAD, tiny_tokenizer
from torch.utils.data import BatchSampler, SequentialSampler

from calm.training.data import PackedBlocks, PatchCollator, StreamedBlocks
from calm.training.documents import BadLines, DataError, expand_paths, read_documents
from calm.training.tokens import Separation, TokenFile, cached_tokens, tokenize_documents

TEXTS = ["One.\nTwo.", "Ünï çødé", "three"]
COMPRESS = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.compress}


def jsonl(texts, key="text") -> bytes:
    return b"".join(json.dumps({key: text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def parquet(texts) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), sink)
    return sink.getvalue().to_pybytes()


def read(*paths, **options) -> list[str]:
    return list(read_documents(expand_paths([str(p) for p in paths]), **options))


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind, content", [("jsonl", jsonl(TEXTS)), ("parquet", parquet(TEXTS))])
def test_every_format_and_compression_gives_the_same_documents(tmp_path, kind, content, compression):
    path = tmp_path / f"data.{kind}{compression}"
    path.write_bytes(COMPRESS[compression](content))
    assert read(path) == TEXTS


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    assert read(tmp_path / "a.txt", tmp_path / "b.txt.gz") == TEXTS[:2]


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
        (b'{"body": "x"}', 'no string under the key "text"'),
        (b'{"text": 3}', 'no string under the key "text"'),
        (b'["text"]', 'no string under the key "text"'),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_line_stops_with_file_and_line_or_is_skipped_and_counted(tmp_path, line, why):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(["first"]) + b"\n" + line + b"\n" + jsonl(["last"]))
    with pytest.raises(DataError, match=rf"data\.jsonl, line 3: {why}"):
        read(path)
    bad_lines = BadLines(skip=True)
    assert read(path, bad_lines=bad_lines) == ["first", "last"]
    assert bad_lines.summary().startswith("1 bad line(s) skipped") and "line 3" in bad_lines.summary()


@pytest.mark.parametrize("compression", [".xz", ".gz", ".zst"])
def test_a_file_that_is_cut_short_is_an_error_even_when_lines_are_skipped(tmp_path, compression):
    path = tmp_path / f"data.jsonl{compression}"
    whole = COMPRESS[compression](jsonl([str(n) * 50 for n in np.random.default_rng(0).integers(10**9, size=500)]))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"data\.jsonl.*after line \d+: the file is damaged"):
        read(path, bad_lines=BadLines(skip=True))


def test_paths_that_hold_no_text_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        expand_paths("nowhere.jsonl")
    with pytest.raises(DataError, match="empty: the folder holds no file"):
        expand_paths([str(tmp_path / "empty")])
    with pytest.raises(DataError, match=r"data\.csv: unknown format; readable are \.txt"):
        expand_paths([str(tmp_path / "data.csv")])


def test_another_text_column_is_read_and_a_missing_one_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, key="body"))
    (tmp_path / "b.parquet").write_bytes(parquet(TEXTS))
    assert read(tmp_path / "a.jsonl", text_column="body") == TEXTS
    with pytest.raises(DataError, match='no column "body"; it has text, n'):
        read(tmp_path / "b.parquet", text_column="body")


# tokens


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
        raise DataError("line 2")

    with pytest.raises(DataError, match="line 2"):
        cached_tokens(tmp_path, {"a": 1}, broken)
    assert list(tmp_path.iterdir()) == []
    documents = [np.arange(3, dtype=np.uint32), np.arange(5, dtype=np.uint32)]
    first = cached_tokens(tmp_path, {"a": 1}, lambda: iter(documents))
    assert first.tokens.tolist() == [0, 1, 2, 0, 1, 2, 3, 4] and first.document_starts.tolist() == [0, 3]
    again = cached_tokens(tmp_path, {"a": 1}, broken)
    assert again.tokens.tolist() == first.tokens.tolist()
    with pytest.raises(DataError, match="holds no text"):
        cached_tokens(tmp_path, {"a": 2}, lambda: iter([]))


def test_of_two_processes_that_write_the_same_cache_the_second_takes_the_first_s(tmp_path, monkeypatch):
    key, ids = {"a": 1}, np.arange(3, dtype=np.uint32)

    def while_another_process_writes_it():
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: -1)
            cached_tokens(tmp_path, key, lambda: iter([ids]))
        yield ids + 1

    second = cached_tokens(tmp_path, key, while_another_process_writes_it)
    assert second.tokens.tolist() == [0, 1, 2] and len(list(tmp_path.iterdir())) == 1


# blocks


def token_file(length: int = 103, document: int = 10) -> TokenFile:
    return TokenFile(np.arange(length, dtype=np.uint32), np.arange(0, length, document))


def starts(blocks) -> list[int]:
    return [int(block["input_ids"][0]) for block in blocks]


def test_an_epoch_has_every_block_once_and_the_next_another_order():
    blocks = PackedBlocks(token_file(), block_size=8, num_blocks=24, seed=1)
    assert blocks.blocks_per_epoch == 12
    assert all((block["input_ids"].diff() == 1).all() for block in blocks)
    first, second = starts(blocks)[:12], starts(blocks)[12:]
    assert sorted(first) == sorted(second) == list(range(0, 96, 8))
    assert first != second and first != sorted(first)


def test_a_block_depends_on_the_seed_and_its_index_alone():
    def make(seed):
        options = {"random_phase": True, "left_fill": 0.5, "filler_token_id": 1000}
        return PackedBlocks(token_file(), 8, 4, num_blocks=30, seed=seed, **options)

    forwards, backwards = make(1), make(1)
    ids = {i: forwards[i]["input_ids"].tolist() for i in range(30)}
    assert {i: backwards[i]["input_ids"].tolist() for i in reversed(range(30))} == ids
    assert {i: make(2)[i]["input_ids"].tolist() for i in range(30)} != ids


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_the_blocks_and_a_resumed_run_goes_on_with_the_next(num_processes):
    blocks, seen = PackedBlocks(token_file(), 8, num_blocks=24, seed=1), []
    for rank in range(num_processes):
        batches = list(BatchSamplerShard(BatchSampler(SequentialSampler(blocks), 2, False), num_processes, rank))
        done = len(batches) // 2  # the run was killed here, after the checkpoint of this step
        seen += [i for batch in batches[:done] for i in batch] + [i for batch in batches[done:] for i in batch]
    assert sorted(seen) == list(range(24))


def test_random_phase_cuts_each_epoch_at_other_places():
    blocks = PackedBlocks(token_file(), 8, num_blocks=24 * 12, seed=0, random_phase=True)
    phases = {start % 8 for start in starts(blocks)}
    assert phases == set(range(8))
    n = blocks.blocks_per_epoch
    assert len(set(starts(blocks)[:n])) == n and len({s % 8 for s in starts(blocks)[:n]}) == 1


def test_left_fill_makes_short_prompts_of_every_length():
    blocks = PackedBlocks(token_file(), 8, 4, num_blocks=300, seed=0, left_fill=1.0, filler_token_id=1000)
    for block in blocks:
        ids, filling = block["input_ids"].tolist(), block["filling"]
        assert ids[:filling] == [1000] * filling and 1000 not in ids[filling:]
        assert ids[filling] % 10 == 0 or ids[filling] > 90  # begins with a document, but at the very end of the data
    assert {block["filling"] for block in blocks} == {0, 1, 2, 3}
    some = PackedBlocks(token_file(), 8, 4, num_blocks=1000, seed=0, left_fill=0.4, filler_token_id=1000)
    share = np.mean([block["filling"] > 0 for block in some])
    assert abs(share - 0.4 * 3 / 4) < 0.06  # four standard deviations


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="block_size=10 is no multiple of patch_size=4"):
        PackedBlocks(token_file(), 10, 4)
    with pytest.raises(DataError, match="103 tokens, too few for one block of block_size=104"):
        PackedBlocks(token_file(), 104, 4)
    with pytest.raises(DataError, match="needs a filler token"):
        PackedBlocks(token_file(), 8, 4, left_fill=0.5)


# collator


def test_labels_leave_out_the_first_patch_and_partial_patches():
    rows = [{"input_ids": torch.arange(10, 20)}, {"input_ids": torch.arange(20, 26)}]
    batch = PatchCollator(4, pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[*range(10, 20), 0, 0], [*range(20, 26), *[0] * 6]]
    assert batch["labels"].tolist() == [[-100] * 4 + [14, 15, 16, 17] + [-100] * 4, [-100] * 12]
    assert batch["attention_mask"].tolist() == [[1] * 10 + [0] * 2, [1] * 6 + [0] * 6]


def test_the_autoencoder_reconstructs_all_but_the_filling():
    blocks = PackedBlocks(token_file(), 8, 4, num_blocks=4, seed=0, left_fill=1.0, filler_token_id=1000)
    batch = PatchCollator(4, first_patch_is_given=False)([blocks[i] for i in range(4)])
    is_filler = batch["input_ids"] == 1000
    assert is_filler.any() and "attention_mask" not in batch
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(is_filler, -100))
    assert batch["block_ids"].tolist() == [0, 1, 2, 3]


# streams


def stream(lengths=(7, 30, 5, 11), seed=0, **options) -> StreamedBlocks:
    """Documents 0, 1, … of the given lengths, over and over; their tokens say document and position."""
    documents = [1000 * d + np.arange(n, dtype=np.uint32) for d, n in enumerate(lengths)]
    return StreamedBlocks(lambda epoch: iter(documents), block_size=4, seed=seed, **options)


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
    with pytest.raises(DataError, match="holds no text"):
        next(iter(StreamedBlocks(lambda epoch: iter([]), block_size=4)))


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
