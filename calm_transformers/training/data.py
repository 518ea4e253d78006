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
    options: DataOptions, tokenizer, patch_size: int, run_length: RunLength, seed: int, cache: Path, evaluates: bool
) -> TrainingDatasets:
    """Tokenises the data, or finds its tokens in the folder `cache`, and returns the datasets for Trainer."""
    block_options = {
        "block_size": options.block_size,
        "patch_size": patch_size,
        "left_fill": options.left_fill,
        "filler_token_id": filler_token_id(tokenizer),
    }
    check_block_options(**block_options)
    if options.streaming and run_length.max_steps <= 0:
        raise InputError("streaming needs max_steps: a stream has no length.")
    if options.validation_blocks is not None and options.validation_blocks < 1:
        raise InputError(f"validation_blocks={options.validation_blocks}: must be at least 1.")
    validation = None
    if evaluates:
        token_file = load_token_file(options, "validation", tokenizer, patch_size, cache)
        num_blocks = blocks_per_epoch(len(token_file.tokens), options.block_size)
        num_blocks = min(num_blocks, options.validation_blocks or num_blocks)
        validation = PackedBlocks(token_file, options.block_size, patch_size, num_blocks)
    order_options = {"seed": seed, "random_phase": options.random_phase}
    if options.streaming:
        tokenize = partial(tokenize_documents, tokenizer=tokenizer, ending=document_ending(options, patch_size))
        documents, _ = load_documents(options, "train")
        train = StreamedBlocks(documents, tokenize, **block_options, **order_options)
        return TrainingDatasets(train, run_length.max_steps, validation)
    token_file = load_token_file(options, "train", tokenizer, patch_size, cache)
    per_epoch = blocks_per_epoch(len(token_file.tokens), options.block_size, options.random_phase)
    num_steps = run_length.num_steps(per_epoch)
    train = PackedBlocks(token_file, **block_options, **order_options, num_blocks=num_steps * run_length.batch_size)
    return TrainingDatasets(train, num_steps, validation)


# tokens


def token_cache_dir(options: DataOptions) -> Path:
    return Path(options.cache_dir or Path(HF_HOME) / "calm" / "tokens")


@dataclass
class TokenFile:
    """All documents' tokens in one array, often memory-mapped, and the start index of each document."""

    tokens: np.ndarray
    document_starts: np.ndarray


def _hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def cached_tokens(folder: Path, key: dict, tokenize: Callable[[], Iterable[np.ndarray]]) -> TokenFile:
    """Opens the token file for `key` (JSON); if it is missing or damaged, first writes what `tokenize()` yields.

    A token file is a sub-folder of `folder`, renamed into place when complete, so that a kill leaves no partial one.
    """
    target = folder / _hash(key)
    token_file = _open_tokens(target)
    if token_file is None:
        try:
            if target.exists():  # damaged
                shutil.rmtree(target)
            _write_tokens(target, key, tokenize)
        except OSError as error:
            raise InputError(f"{target}: the tokens cannot be written there ({error.strerror or error}).") from error
        token_file = _open_tokens(target)
    assert token_file is not None, f"{target}: another process removed it meanwhile"
    return token_file


def _open_tokens(target: Path) -> TokenFile | None:
    """Opens the token file in a folder, or returns None if it is missing or incomplete."""
    try:
        bounds = np.load(target / "document_bounds.npy")
        tokens = np.memmap(target / "tokens.bin", dtype=np.uint32, mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return TokenFile(tokens, bounds[:-1]) if len(bounds) and bounds[-1] == len(tokens) else None


def _write_tokens(target: Path, key: dict, tokenize: Callable[[], Iterable[np.ndarray]]) -> None:
    unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    unfinished.mkdir(parents=True)
    try:
        bounds = [0]
        with open(unfinished / "tokens.bin", "wb") as file:
            for ids in tokenize():
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
    # Without padding the cache's key must not depend on the patch size.
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
    """Returns the number of whole blocks in an epoch; with `random_phase`, if L − 1 tokens are skipped."""
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
    indices: the processes' batches are interleaved, and a resumed run continues with the next index.

    Args:
        token_file: the tokens.
        block_size: L, a multiple of K. The tokens after the last whole block of an epoch are not seen in it.
        patch_size: K.
        num_blocks: length of the dataset, over all epochs; `None` is one epoch.
        seed: seed of order, phases and fillers. `None`: file order, no random phase and no fillers.
        random_phase: start each epoch at a random one of the first L tokens.
        left_fill, filler_token_id: see `DataOptions`.
    """

    def __init__(
        self,
        token_file: TokenFile,
        block_size: int,
        patch_size: int = 1,
        num_blocks: int | None = None,
        seed: int | None = None,
        random_phase: bool = False,
        left_fill: float = 0.0,
        filler_token_id: int | None = None,
    ):
        self.token_file, self.block_size, self.patch_size = token_file, block_size, patch_size
        self.seed, self.left_fill, self.filler_token_id = seed, left_fill, filler_token_id
        self.random_phase = random_phase and seed is not None
        self.blocks_per_epoch = blocks_per_epoch(len(token_file.tokens), block_size, self.random_phase)
        self.num_blocks = self.blocks_per_epoch if num_blocks is None else num_blocks
        self._epoch: int | None = None  # of _order and _phase
        self._order, self._phase = np.arange(0), 0

    def __len__(self) -> int:
        return self.num_blocks

    def summary(self) -> str:
        return f"{len(self.token_file.tokens):,} tokens, {self.num_blocks / self.blocks_per_epoch:.2f} epochs"

    def _start_epoch(self, seed: int, epoch: int) -> None:
        """Draws the order of the epoch's blocks and its phase, the number of tokens skipped at its start."""
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
        ids[num_fillers:] = self.token_file.tokens[start : start + self.block_size - num_fillers]
        return {"input_ids": torch.from_numpy(ids), "num_fillers": num_fillers, "block_id": int(index)}

    def _choose_left_fill(self, start: int, rng: np.random.Generator) -> tuple[int, int]:
        """Returns where a block's text starts, and the number of filler tokens in front.

        With probability `left_fill` the block looks like a short prompt: 0 … K − 1 fillers, then a document's start.
        """
        if rng.random() >= self.left_fill:
            return start, 0
        starts = self.token_file.document_starts
        document = int(np.searchsorted(starts, start))
        if document < len(starts) and starts[document] + self.block_size <= len(self.token_file.tokens):
            start = int(starts[document])
        return start, int(rng.integers(self.patch_size))


class StreamedBlocks(IterableDataset):
    """Endless iterable dataset of blocks: repeats the documents and tokenises them on the fly.

    Documents are collected into shards of `shard_tokens` tokens, or up to the end of the epoch, whose blocks are
    shuffled. The rest of a shard goes to the next one. A resumed run reads the stream again from its start.

    Each DataLoader worker reads all documents and tokenises every n-th of n workers. Workers rotate their documents
    each epoch, so that a worker with few tokens doesn't repeat its documents more often than others. The stream
    depends only on the seed and the number of workers; its batches are interleaved over the processes.

    With `random_phase` each epoch skips up to L − 1 tokens at its start. `fill_options` are `left_fill` and
    `filler_token_id` of `PackedBlocks`.
    """

    def __init__(
        self,
        documents: Iterable,  # iterated again in each epoch
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
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        block_id = worker_id
        for shard in self._shards(worker_id, num_workers):
            seed = int(np.random.default_rng([self.seed, block_id]).integers(2**31))
            for block in PackedBlocks(shard, self.block_size, self.patch_size, seed=seed, **self.fill_options):
                yield {**block, "block_id": block_id}
                block_id += num_workers

    def summary(self) -> str:
        return "a stream of tokens"

    def _shards(self, worker_id: int, num_workers: int) -> Iterator[TokenFile]:
        """Yields a worker's shards; what is left after the whole blocks of one begins the next."""
        pieces, starts, length = [], [], 0
        for ids in self._all_documents(worker_id, num_workers):
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

    def _all_documents(self, worker_id: int, num_workers: int) -> Iterator[np.ndarray | None]:
        """Yields the token ids of each of a worker's documents, and None at the end of each epoch."""
        num_empty_epochs = 0  # consecutive ones without text; a worker gets every document within `num_workers` epochs
        for epoch in itertools.count():
            num_to_skip, is_empty = self._phase(epoch), True
            documents = itertools.islice(self.documents, (worker_id - epoch) % num_workers, None, num_workers)
            for ids in self.tokenize(documents):
                yield ids[num_to_skip:]
                num_to_skip, is_empty = max(num_to_skip - len(ids), 0), is_empty and not len(ids)
            num_empty_epochs = num_empty_epochs + 1 if is_empty else 0
            if num_empty_epochs == num_workers:
                raise InputError("the data holds no text.")
            yield None

    def _phase(self, epoch: int) -> int:
        """Returns the number of tokens to skip at the start of an epoch."""
        return int(np.random.default_rng([self.seed, epoch, 1]).integers(self.block_size)) if self.random_phase else 0


class PatchCollator:
    """Collates rows of ids into a batch that has labels for exactly the predicted tokens, which Trainer counts.

    Rows of unequal length are right-padded to whole patches; incomplete patches and filler tokens get no labels. Rows
    may have `labels` of their own, −100 for a prompt's tokens: then only fully labelled patches keep them.

    Args:
        patch_size: K.
        skip_first_patch: give the first patch no labels, as no hidden state predicts it (CALM, AR with K = 1). False
            for the autoencoder, which reconstructs every token.
        pad_token_id: needed only for rows of unequal length.
        end_token_id: repeated to complete the last patch of each row, and labelled. Without it, an incomplete last
            patch, with the row's EOS, gets no labels.
    """

    def __init__(
        self,
        patch_size: int,
        skip_first_patch: bool = True,
        pad_token_id: int | None = None,
        end_token_id: int | None = None,
    ):
        self.patch_size, self.skip_first_patch = patch_size, skip_first_patch
        self.pad_token_id, self.end_token_id = pad_token_id, end_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if self.end_token_id is not None:
            rows = [self._complete_last_patch(row, self.end_token_id) for row in rows]
        lengths = [len(row["input_ids"]) for row in rows]
        padded_length = max(lengths) + -max(lengths) % self.patch_size  # a multiple of K
        is_padded = min(lengths) < padded_length
        padding = self.pad_token_id if is_padded else 0
        if padding is None:
            raise InputError("rows of unequal length, or with an incomplete patch, need a pad token.")
        input_ids = torch.full((len(rows), padded_length), padding)
        labels = torch.full((len(rows), padded_length), -100)
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids = torch.as_tensor(row["input_ids"])
            input_ids[b, :length] = ids
            labelled = slice(row.get("num_fillers", 0), length - length % self.patch_size)
            labels[b, labelled] = torch.as_tensor(row.get("labels", ids))[labelled]
        if any("labels" in row for row in rows):  # partly labelled patches lose their labels
            patches = labels.unflatten(1, (-1, self.patch_size))
            patches.masked_fill_((patches == -100).any(-1, keepdim=True), -100)
        if self.skip_first_patch:
            all_labels = labels
            labels = torch.full_like(all_labels, -100)
            target_patches(labels, self.patch_size).copy_(target_patches(all_labels, self.patch_size))
        batch = {"input_ids": input_ids, "labels": labels}
        if is_padded:
            batch["attention_mask"] = (torch.arange(padded_length) < torch.tensor(lengths)[:, None]).long()
        if all("block_id" in row for row in rows):
            batch["block_ids"] = torch.tensor([row["block_id"] for row in rows])
        return batch

    def _complete_last_patch(self, row: dict, end_token_id: int) -> dict:
        """Returns the row, whose ids and labels end with end tokens up to a multiple of K."""
        end = [end_token_id] * (-len(row["input_ids"]) % self.patch_size)
        return {**row, **{name: [*row[name], *end] for name in ("input_ids", "labels") if name in row}}
