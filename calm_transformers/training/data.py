"""Turns documents into a token file on disk, and that into shuffled blocks and batches of whole patches.

The entry point is `build_datasets`. Axes: B batch, L tokens of a block, P patches (L = P·K), K tokens per patch.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from calm_transformers.command_line import InputError
from calm_transformers.documents import DataOptions, DocumentEnding, load_documents, tokenize_documents
from calm_transformers.model.modeling_calm import target_patches
from calm_transformers.training.tokenizer import filler_token_id

CACHE_FORMAT = 2  # part of the cache key; since 2 special tokens spelled out in a document are plain text
# Options that don't change the tokens, or only through the source that `load_documents` returns.
OPTIONS_NOT_IN_KEY = {
    *("train_files", "validation_files", "dataset", "dataset_config", "dataset_split", "validation_split"),
    *("streaming", "validation_blocks", "block_size", "random_phase", "left_fill", "cache_dir"),
}


@dataclass(frozen=True)
class RunLength:
    """The length of a training run: `max_steps` if above 0, else `epochs` of the data.

    `batch_size` is the number of blocks per step, over all processes and accumulated batches.
    """

    batch_size: int
    epochs: float = 1
    max_steps: int = -1

    def num_steps(self, blocks_per_epoch: int) -> int:
        """Returns the number of steps; the last batch is filled up from the next epoch."""
        if self.max_steps > 0:
            return self.max_steps
        return -int(-self.epochs * blocks_per_epoch // self.batch_size)


@dataclass(frozen=True)
class TrainingDatasets:
    """Training blocks for all `num_steps`, and validation blocks in file order."""

    train: "PackedBlocks | StreamedBlocks"
    num_steps: int
    validation: "PackedBlocks | None"


def build_datasets(
    options: DataOptions, tokenizer, patch_size: int, length: RunLength, seed: int, cache: Path, evaluates: bool
) -> TrainingDatasets:
    """Tokenises the data, or finds its tokens in the folder `cache`, and returns the datasets for Trainer."""
    block_options = {
        "block_size": options.block_size,
        "patch_size": patch_size,
        "left_fill": options.left_fill,
        "filler_token_id": filler_token_id(tokenizer),
    }
    check_block_options(**block_options)
    if options.streaming and length.max_steps <= 0:
        raise InputError("streaming needs max_steps: a stream has no length.")
    if options.validation_blocks is not None and options.validation_blocks < 1:
        raise InputError(f"validation_blocks={options.validation_blocks}: must be at least 1.")
    validation = None
    if evaluates:
        tokens = load_token_file(options, "validation", tokenizer, patch_size, cache)
        num_blocks = blocks_per_epoch(len(tokens.tokens), options.block_size)
        num_blocks = min(num_blocks, options.validation_blocks or num_blocks)
        validation = PackedBlocks(tokens, options.block_size, patch_size, num_blocks)
    order = {"seed": seed, "random_phase": options.random_phase}
    if options.streaming:
        tokenize = partial(tokenize_documents, tokenizer=tokenizer, ending=document_ending(options, patch_size))
        train = StreamedBlocks(load_documents(options, "train")[0], tokenize, **block_options, **order)
        return TrainingDatasets(train, length.max_steps, validation)
    tokens = load_token_file(options, "train", tokenizer, patch_size, cache)
    num_steps = length.num_steps(blocks_per_epoch(len(tokens.tokens), options.block_size, options.random_phase))
    train = PackedBlocks(tokens, **block_options, **order, num_blocks=num_steps * length.batch_size)
    return TrainingDatasets(train, num_steps, validation)


# tokens


def token_cache_dir(options: DataOptions) -> Path:
    return Path(options.cache_dir or Path(HF_HOME) / "calm" / "tokens")


@dataclass
class TokenFile:
    """All documents' tokens in one memory-mapped array, and the start index of each document."""

    tokens: np.ndarray
    document_starts: np.ndarray


def _hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def cached_tokens(folder: Path, key: dict, write: Callable[[], Iterable[np.ndarray]]) -> TokenFile:
    """Opens the token file for `key` (JSON); if it is missing or damaged, first writes the documents of `write()`.

    A token file is a sub-folder of `folder`, renamed into place when complete, so that a kill leaves no partial one.
    """
    target = folder / _hash(key)
    found = _open_tokens(target)
    if found is None:
        try:
            if target.exists():  # damaged
                shutil.rmtree(target)
            _write_tokens(target, key, write)
        except OSError as error:
            raise InputError(f"{target}: the tokens cannot be written there ({error.strerror or error}).") from error
        found = _open_tokens(target)
    assert found is not None, f"{target}: another process removed it meanwhile"
    return found


def _open_tokens(target: Path) -> TokenFile | None:
    """Opens the token file in a folder, or returns None if it is missing or incomplete."""
    try:
        bounds = np.load(target / "document_bounds.npy")
        tokens = np.memmap(target / "tokens.bin", dtype=np.uint32, mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return TokenFile(tokens, bounds[:-1]) if len(bounds) and bounds[-1] == len(tokens) else None


def _write_tokens(target: Path, key: dict, write: Callable[[], Iterable[np.ndarray]]) -> None:
    unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    unfinished.mkdir(parents=True)
    try:
        bounds = [0]
        with open(unfinished / "tokens.bin", "wb") as file:
            for ids in write():
                bounds.append(bounds[-1] + len(ids))
                file.write(ids.tobytes())
        if not bounds[-1]:
            raise InputError("the data holds no text.")
        np.save(unfinished / "document_bounds.npy", np.asarray(bounds, dtype=np.int64))
        (unfinished / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
        try:
            os.replace(unfinished, target)
        except OSError:  # another process wrote the same tokens first
            if _open_tokens(target) is None:
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def document_ending(options: DataOptions, patch_size: int) -> DocumentEnding:
    return DocumentEnding(options.append_eos, options.pad_to_patch, patch_size if options.pad_to_patch else 1)


def load_token_file(options: DataOptions, part: str, tokenizer, patch_size: int, folder: Path) -> TokenFile:
    """Returns the tokens of the "train" or "validation" part of the data, from the cache `folder` if possible."""
    ending = document_ending(options, patch_size)
    texts, source = load_documents(options, part, f"Tokenising, {part}")
    fields = {f.name for f in dataclasses.fields(options)} - OPTIONS_NOT_IN_KEY
    key = {
        "format": CACHE_FORMAT,
        "source": source,
        "options": {name: getattr(options, name) for name in fields},
        "patch_size": ending.patch_size,
        "tokenizer": _hash([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.pad_token_id]),
    }
    return cached_tokens(folder, key, lambda: tokenize_documents(texts, tokenizer, ending))


# blocks


def check_block_options(block_size: int, patch_size: int, left_fill: float, filler_token_id: int | None) -> None:
    """Raises `InputError` for invalid arguments of `PackedBlocks`."""
    if block_size < 1:
        raise InputError(f"block_size={block_size}: must be at least 1.")
    if block_size % patch_size:
        raise InputError(f"block_size={block_size} is not divisible by patch_size={patch_size}.")
    if not 0 <= left_fill <= 1:
        raise InputError(f"left_fill={left_fill}: must lie in [0, 1], a fraction of the blocks.")
    if left_fill and filler_token_id is None:
        raise InputError("left_fill needs a filler token: train the tokenizer with one, or give it a pad token.")


def blocks_per_epoch(num_tokens: int, block_size: int, random_phase: bool = False) -> int:
    """Returns the number of whole blocks in an epoch; with `random_phase`, for any start among the first L tokens."""
    max_phase = block_size - 1 if random_phase else 0
    num_blocks = (num_tokens - max_phase) // block_size
    if num_blocks < 1:
        raise InputError(
            f"the data has {num_tokens} tokens, too few for one block of block_size={block_size}"
            f"{' and a random phase' if random_phase else ''}."
        )
    return num_blocks


class PackedBlocks(Dataset):
    """Map-style dataset of blocks of `block_size` tokens; item i is a pure function of the seed and i.

    Every epoch visits each block once, in its own random order. Sharding and resuming are therefore only a choice of
    indices: processes take turns, and a resumed run continues with the next index.

    Args:
        data: the tokens.
        block_size: L, a multiple of K. The tokens after the last whole block of an epoch are not seen in it.
        patch_size: K.
        num_blocks: length of the dataset, over all epochs; `None` is one epoch.
        seed: seed of order, phases and fillers. `None`: file order, no random phase and no fillers.
        random_phase: start each epoch at a random one of the first L tokens.
        left_fill, filler_token_id: see `DataOptions`.
    """

    def __init__(
        self,
        data: TokenFile,
        block_size: int,
        patch_size: int = 1,
        num_blocks: int | None = None,
        seed: int | None = None,
        random_phase: bool = False,
        left_fill: float = 0.0,
        filler_token_id: int | None = None,
    ):
        self.data, self.block_size, self.patch_size = data, block_size, patch_size
        self.seed, self.left_fill, self.filler_token_id = seed, left_fill, filler_token_id
        self.random_phase = random_phase and seed is not None
        self.blocks_per_epoch = blocks_per_epoch(len(data.tokens), block_size, self.random_phase)
        self.num_blocks = self.blocks_per_epoch if num_blocks is None else num_blocks
        self._epoch: int | None = None  # of _order and _phase
        self._order, self._phase = np.arange(0), 0

    def __len__(self) -> int:
        return self.num_blocks

    def summary(self) -> str:
        return f"{len(self.data.tokens):,} tokens, {self.num_blocks / self.blocks_per_epoch:.2f} epochs"

    def _start_epoch(self, seed: int, epoch: int) -> None:
        rng = np.random.default_rng([seed, epoch])
        self._order = rng.permutation(self.blocks_per_epoch)
        self._phase = int(rng.integers(self.block_size)) if self.random_phase else 0
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict:
        """Returns `input_ids` (L,), the number of filler tokens in front, and the block's index."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(index)
        epoch, position = divmod(int(index), self.blocks_per_epoch)
        if self.seed is None:
            start, num_fillers = position * self.block_size, 0
        else:
            if epoch != self._epoch:
                self._start_epoch(self.seed, epoch)
            start = self._phase + int(self._order[position]) * self.block_size
            start, num_fillers = self._choose_left_fill(start, np.random.default_rng([self.seed, epoch, position]))
        ids = np.full(self.block_size, self.filler_token_id if num_fillers else 0, dtype=np.int64)
        ids[num_fillers:] = self.data.tokens[start : start + self.block_size - num_fillers]
        return {"input_ids": torch.from_numpy(ids), "num_fillers": num_fillers, "block_id": int(index)}

    def _choose_left_fill(self, start: int, rng: np.random.Generator) -> tuple[int, int]:
        """Returns the block's start, moved to the next document's with probability `left_fill`, and its fillers."""
        if rng.random() >= self.left_fill:
            return start, 0
        starts = self.data.document_starts
        document = int(np.searchsorted(starts, start))
        if document < len(starts) and starts[document] + self.block_size <= len(self.data.tokens):
            start = int(starts[document])
        return start, int(rng.integers(self.patch_size))


class StreamedBlocks(IterableDataset):
    """Endless iterable dataset of blocks: repeats the documents and tokenises them on the fly.

    Documents are collected into shards of `shard_tokens` tokens, or up to the end of the epoch, whose blocks are
    shuffled. The rest of a shard goes to the next one. A resumed run reads the stream again from its start.

    Each DataLoader worker reads all documents and tokenises every n-th of n workers. Workers rotate their documents
    each epoch, so that a worker with few tokens doesn't repeat its documents more often than others. The stream
    depends only on the seed and the number of workers; processes take turns on the same stream.

    With `random_phase` each epoch skips up to L − 1 tokens at its start. `fill_options` are `left_fill` and
    `filler_token_id` of `PackedBlocks`.
    """

    def __init__(
        self,
        documents: Iterable,  # read again in each epoch
        tokenize: Callable[[Iterable], Iterable[np.ndarray]],
        block_size: int,
        patch_size: int = 1,
        seed: int = 0,
        random_phase: bool = False,
        shard_tokens: int = 2**22,
        **fill_options,
    ):
        self.documents, self.tokenize = documents, tokenize
        self.block_size, self.patch_size, self.seed = block_size, patch_size, seed
        self.random_phase, self.fill_options = random_phase, fill_options
        self.shard_tokens = max(shard_tokens, block_size)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        block_id = index
        for shard in self._shards(index, num_workers):
            seed = int(np.random.default_rng([self.seed, block_id]).integers(2**31))
            for block in PackedBlocks(shard, self.block_size, self.patch_size, seed=seed, **self.fill_options):
                yield {**block, "block_id": block_id}
                block_id += num_workers

    def summary(self) -> str:
        return "a stream of tokens"

    def _shards(self, index: int, num_workers: int) -> Iterator[TokenFile]:
        pieces, starts, length = [], [], 0
        for ids in self._all_documents(index, num_workers):
            if ids is not None:
                pieces.append(ids)
                starts.append(length)
                length += len(ids)
            if length >= (self.block_size if ids is None else self.shard_tokens):
                tokens = np.concatenate(pieces)
                yield TokenFile(tokens, np.asarray(starts))
                used = length - length % self.block_size
                pieces, length = [tokens[used:]], length - used
                starts = [start - used for start in starts if start >= used]

    def _all_documents(self, index: int, num_workers: int) -> Iterator[np.ndarray | None]:
        """Yields the token ids of each of a worker's documents, and None at the end of each epoch."""
        num_empty = 0  # consecutive epochs without text; a worker gets every document within `num_workers` epochs
        for epoch in itertools.count():
            skip, is_empty = self._phase(epoch), True
            own = itertools.islice(self.documents, (index - epoch) % num_workers, None, num_workers)
            for ids in self.tokenize(own):
                yield ids[skip:]
                skip, is_empty = max(skip - len(ids), 0), is_empty and not len(ids)
            num_empty = num_empty + 1 if is_empty else 0
            if num_empty == num_workers:
                raise InputError("the data holds no text.")
            yield None

    def _phase(self, epoch: int) -> int:
        return int(np.random.default_rng([self.seed, epoch, 1]).integers(self.block_size)) if self.random_phase else 0


class PatchCollator:
    """Collates rows of ids into a batch that has labels for exactly the predicted tokens, which Trainer counts.

    Rows of unequal length are right-padded to whole patches; incomplete patches and filler tokens get no labels. Rows
    may have `labels` of their own, −100 for a prompt's tokens: then only fully labelled patches keep them.

    Args:
        patch_size: K.
        first_patch_is_given: label `target_patches` only, as no hidden state predicts the first patch (CALM, AR with
            K = 1). False for the autoencoder, which reconstructs every token.
        pad_token_id: needed only for rows of unequal length.
        end_token_id: repeated to complete the last patch of each row, and labelled. Without it, an incomplete last
            patch, with the row's EOS, gets no labels.
    """

    def __init__(
        self,
        patch_size: int,
        first_patch_is_given: bool = True,
        pad_token_id: int | None = None,
        end_token_id: int | None = None,
    ):
        self.patch_size, self.first_patch_is_given, self.pad_token_id = patch_size, first_patch_is_given, pad_token_id
        self.end_token_id = end_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if self.end_token_id is not None:
            rows = [self._complete_last_patch(row, self.end_token_id) for row in rows]
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths) + -max(lengths) % self.patch_size
        is_padded = min(lengths) < longest
        padding = self.pad_token_id if is_padded else 0
        if padding is None:
            raise InputError("rows of unequal length, or with an incomplete patch, need a pad token.")
        input_ids = torch.full((len(rows), longest), padding)
        labels = torch.full((len(rows), longest), -100)
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids = torch.as_tensor(row["input_ids"])
            input_ids[b, :length] = ids
            labelled = slice(row.get("num_fillers", 0), length - length % self.patch_size)
            labels[b, labelled] = torch.as_tensor(row.get("labels", ids))[labelled]
        if any("labels" in row for row in rows):
            patches = labels.unflatten(1, (-1, self.patch_size))
            patches.masked_fill_((patches == -100).any(-1, keepdim=True), -100)
        if self.first_patch_is_given:
            all_labels = labels
            labels = torch.full_like(all_labels, -100)
            target_patches(labels, self.patch_size).copy_(target_patches(all_labels, self.patch_size))
        batch = {"input_ids": input_ids, "labels": labels}
        if is_padded:
            batch["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        if all("block_id" in row for row in rows):
            batch["block_ids"] = torch.tensor([row["block_id"] for row in rows])
        return batch

    def _complete_last_patch(self, row: dict, end_token_id: int) -> dict:
        end = [end_token_id] * (-len(row["input_ids"]) % self.patch_size)
        return {**row, **{name: [*row[name], *end] for name in ("input_ids", "labels") if name in row}}
