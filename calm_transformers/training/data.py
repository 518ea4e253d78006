"""Documents → tokens, in one array on disk → batches of whole patches: how many, blocks in an order, the collator.

Begin at `data_sets`. Axes: B batch, L tokens of a block, P patches (L = P·K), K tokens per patch.
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
from calm_transformers.documents import DataOptions, Separation, documents, tokenize_documents
from calm_transformers.model.modeling_calm import target_patches
from calm_transformers.training.tokenizer import filler_token_id

# Of the key of a cache: 2, since documents that spell a special token are text.
CACHE_FORMAT = 2
# Options on which tokens don't depend, or only by what `documents` says of where they come from.
NOT_IN_TOKENS = {
    *("train_files", "validation_files", "dataset", "dataset_config", "dataset_split", "validation_split"),
    *("streaming", "validation_blocks", "block_size", "random_phase", "left_fill", "cache_dir"),
}


@dataclass(frozen=True)
class Length:
    """How long a training is to be: `epochs` of the data, or `max_steps` where it is above 0.

    A step has `batch_size` blocks, those of all processes and all accumulated batches together.
    """

    batch_size: int
    epochs: float = 1
    max_steps: int = -1

    def num_steps(self, blocks_per_epoch: int) -> int:
        """Steps of the whole training, which ends with a whole batch."""
        if self.max_steps > 0:
            return self.max_steps
        return -int(-self.epochs * blocks_per_epoch // self.batch_size)


@dataclass(frozen=True)
class DataSets:
    """What Trainer gets: blocks for the whole training, its steps, and held-out blocks in the order of the files."""

    train: "PackedBlocks | StreamedBlocks"
    num_steps: int
    validation: "PackedBlocks | None"


def data_sets(
    options: DataOptions, tokenizer, patch_size: int, length: Length, seed: int, cache: Path, evaluates: bool
) -> DataSets:
    """Documents → tokens, in files of the folder `cache` → number of steps → blocks."""
    cut = {
        "block_size": options.block_size,
        "patch_size": patch_size,
        "left_fill": options.left_fill,
        "filler_token_id": filler_token_id(tokenizer),
    }
    check_cut(**cut)
    if options.streaming and length.max_steps <= 0:
        raise InputError("streaming needs max_steps: a stream has no length.")
    if options.validation_blocks is not None and options.validation_blocks < 1:
        raise InputError(f"validation_blocks={options.validation_blocks}: must be at least 1.")
    held_out = None
    if evaluates:
        tokens = token_file(options, "validation", tokenizer, patch_size, cache)
        num_blocks = blocks_per_epoch(len(tokens.tokens), options.block_size)
        num_blocks = min(num_blocks, options.validation_blocks or num_blocks)
        held_out = PackedBlocks(tokens, options.block_size, patch_size, num_blocks)
    order = {"seed": seed, "random_phase": options.random_phase}
    if options.streaming:
        tokenize = partial(tokenize_documents, tokenizer=tokenizer, separation=separation_of(options, patch_size))
        train = StreamedBlocks(documents(options, "train")[0], tokenize, **cut, **order)
        return DataSets(train, length.max_steps, held_out)
    tokens = token_file(options, "train", tokenizer, patch_size, cache)
    num_steps = length.num_steps(blocks_per_epoch(len(tokens.tokens), options.block_size, options.random_phase))
    train = PackedBlocks(tokens, **cut, **order, num_blocks=num_steps * length.batch_size)
    return DataSets(train, num_steps, held_out)


# tokens


def cache_of(options: DataOptions) -> Path:
    """The folder of token files."""
    return Path(options.cache_dir or Path(HF_HOME) / "calm" / "tokens")


@dataclass
class TokenFile:
    """All documents' tokens in one array on disk, and where each document begins."""

    tokens: np.ndarray
    document_starts: np.ndarray


def _hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def cached_tokens(folder: Path, key: dict, write: Callable[[], Iterable[np.ndarray]]) -> TokenFile:
    """Opens the token file for `key` (JSON), written first if it is not there, or damaged; `write` gives documents.

    Each is a sub-folder of `folder` that appears only when complete, so a kill leaves no half one.
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
    """The token file of a folder, or None where it is not there or not whole."""
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
        except OSError:  # another process wrote the same tokens meanwhile, and was first
            if _open_tokens(target) is None:
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def separation_of(options: DataOptions, patch_size: int) -> Separation:
    return Separation(options.append_eos, options.pad_to_patch, patch_size if options.pad_to_patch else 1)


def token_file(options: DataOptions, part: str, tokenizer, patch_size: int, folder: Path) -> TokenFile:
    """Tokens of the "train" or "validation" part of the data, out of the cache where they are there."""
    separation = separation_of(options, patch_size)
    texts, source = documents(options, part, f"Tokenising, {part}")
    fields = {f.name for f in dataclasses.fields(options)} - NOT_IN_TOKENS
    key = {
        "format": CACHE_FORMAT,
        "source": source,
        "options": {name: getattr(options, name) for name in fields},
        "patch_size": separation.patch_size,
        "tokenizer": _hash([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.pad_token_id]),
    }
    return cached_tokens(folder, key, lambda: tokenize_documents(texts, tokenizer, separation))


# blocks


def check_cut(block_size: int, patch_size: int, left_fill: float, filler_token_id: int | None) -> None:
    """Raises `InputError` where tokens cannot be cut so; arguments as in `PackedBlocks`."""
    if block_size < 1:
        raise InputError(f"block_size={block_size}: must be at least 1.")
    if block_size % patch_size:
        raise InputError(f"block_size={block_size} is no multiple of patch_size={patch_size}.")
    if not 0 <= left_fill <= 1:
        raise InputError(f"left_fill={left_fill}: must lie in [0, 1], a share of the blocks.")
    if left_fill and filler_token_id is None:
        raise InputError("left_fill needs a filler token: train the tokenizer with one, or give it a pad token.")


def blocks_per_epoch(num_tokens: int, block_size: int, random_phase: bool = False) -> int:
    """Whole blocks in the tokens, wherever among its first L tokens an epoch begins."""
    spare = block_size - 1 if random_phase else 0
    number = (num_tokens - spare) // block_size
    if number < 1:
        raise InputError(
            f"the data has {num_tokens} tokens, too few for one block of block_size={block_size}"
            f"{' and a random phase' if random_phase else ''}."
        )
    return number


class PackedBlocks(Dataset):
    """Blocks of `block_size` tokens; the i-th is a pure function of the seed and i.

    Every epoch visits each block once, in an order of its own. Sharding over processes and resuming come down to which
    i is asked for: the processes take turns, and a resumed run goes on with the next i.

    Args:
        data: the tokens.
        block_size: L, a multiple of K. The tokens after the last whole block of an epoch are not seen in it.
        patch_size: K.
        num_blocks: length of the dataset, over all epochs; `None` is one epoch.
        seed: of the order, the phases and the fillings. `None`: in file order, and neither phase nor filling.
        random_phase, left_fill, filler_token_id: as `DataOptions` has them; an epoch begins at one of the first L
            tokens.
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
        self._epoch: int | None = None  # the one that order and phase are of
        self._order, self._phase = np.arange(0), 0

    def __len__(self) -> int:
        return self.num_blocks

    def summary(self) -> str:
        return f"{len(self.data.tokens):,} tokens, {self.num_blocks / self.blocks_per_epoch:.2f} epochs"

    def _enter_epoch(self, seed: int, epoch: int) -> None:
        rng = np.random.default_rng([seed, epoch])
        self._order = rng.permutation(self.blocks_per_epoch)
        self._phase = int(rng.integers(self.block_size)) if self.random_phase else 0
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict:
        """Ids (L,), the number of filler tokens in front, and the index of the block itself."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(index)
        epoch, position = divmod(int(index), self.blocks_per_epoch)
        if self.seed is None:
            start, filling = position * self.block_size, 0
        else:
            if epoch != self._epoch:
                self._enter_epoch(self.seed, epoch)
            start = self._phase + int(self._order[position]) * self.block_size
            start, filling = self._fill(start, np.random.default_rng([self.seed, epoch, position]))
        ids = np.full(self.block_size, self.filler_token_id if filling else 0, dtype=np.int64)
        ids[filling:] = self.data.tokens[start : start + self.block_size - filling]
        return {"input_ids": torch.from_numpy(ids), "filling": filling, "block_id": int(index)}

    def _fill(self, start: int, rng: np.random.Generator) -> tuple[int, int]:
        if rng.random() >= self.left_fill:
            return start, 0
        starts = self.data.document_starts
        document = int(np.searchsorted(starts, start))
        if document < len(starts) and starts[document] + self.block_size <= len(self.data.tokens):
            start = int(starts[document])
        return start, int(rng.integers(self.patch_size))


class StreamedBlocks(IterableDataset):
    """Blocks of an endless stream: the documents over and over, tokenised when their turn comes.

    Documents are taken together until they have `shard_tokens` tokens or the epoch ends. Within such a shard the
    blocks come in random order; what is left over at its end goes to the next one. A resumed run reads again up to
    where it was.

    Each worker of a DataLoader reads all documents, and tokenises its own: in an epoch every document is that of one
    worker, in the next one that of the next worker, so that none comes more often because its worker has little else.
    The stream depends on the seed and the number of workers alone; each process takes its share of the same stream.

    With `random_phase` each epoch leaves out up to L − 1 tokens at its start. `filling`: as in `PackedBlocks`.
    """

    def __init__(
        self,
        documents: Iterable,  # read anew in each epoch
        tokenize: Callable[[Iterable], Iterable[np.ndarray]],
        block_size: int,
        patch_size: int = 1,
        seed: int = 0,
        random_phase: bool = False,
        shard_tokens: int = 2**22,  # to shuffle among
        **filling,
    ):
        self.documents, self.tokenize = documents, tokenize
        self.block_size, self.patch_size, self.seed = block_size, patch_size, seed
        self.random_phase, self.shard_tokens, self.filling = random_phase, max(shard_tokens, block_size), filling

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        block_id = index
        for shard in self._shards(index, num_workers):
            seed = int(np.random.default_rng([self.seed, block_id]).integers(2**31))
            for block in PackedBlocks(shard, self.block_size, self.patch_size, seed=seed, **self.filling):
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
        """Token ids of each document of a worker, and None where an epoch ends."""
        num_empty = 0  # epochs on end; each document is this worker's once in as many as there are workers
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
    """Rows of ids → a batch whose labels count exactly the tokens that the loss predicts: Trainer divides by them.

    Rows of unequal length are padded on the right to whole patches; a patch that is not complete carries no label, nor
    does filling. A row may bring `labels` of its own, −100 where none is (a prompt, say): then a patch carries labels
    where all of it does.

    Args:
        patch_size: K.
        first_patch_is_given: only `target_patches` carry labels, as no hidden state predicts the first one (CALM, AR
            with K = 1). False for the autoencoder, which reconstructs every token.
        pad_token_id: needed only for rows of unequal length.
        end_token_id: completes the last patch of each row, and is learnt. Without it, a row's last tokens, the end
            among them, are no target where they are no whole patch.
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
            rows = [self._completed(row, self.end_token_id) for row in rows]
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths) + -max(lengths) % self.patch_size
        ragged = min(lengths) < longest
        padding = self.pad_token_id if ragged else 0
        if padding is None:
            raise InputError("rows of unequal length, or with a partial patch, need a pad token.")
        input_ids = torch.full((len(rows), longest), padding)
        labels = torch.full((len(rows), longest), -100)
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            whole = length - length % self.patch_size
            filling, ids = row.get("filling", 0), torch.as_tensor(row["input_ids"])
            input_ids[b, :length] = ids
            labels[b, filling:whole] = torch.as_tensor(row.get("labels", ids))[filling:whole]
        if any("labels" in row for row in rows):
            patches = labels.unflatten(1, (-1, self.patch_size))
            patches.masked_fill_((patches == -100).any(-1, keepdim=True), -100)
        if self.first_patch_is_given:
            every = labels
            labels = torch.full_like(every, -100)
            target_patches(labels, self.patch_size).copy_(target_patches(every, self.patch_size))
        batch = {"input_ids": input_ids, "labels": labels}
        if ragged:
            batch["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        if all("block_id" in row for row in rows):
            batch["block_ids"] = torch.tensor([row["block_id"] for row in rows])
        return batch

    def _completed(self, row: dict, end: int) -> dict:
        """The row, whole patches long."""
        missing = -len(row["input_ids"]) % self.patch_size
        ended = {name: [*row[name], *[end] * missing] for name in ("input_ids", "labels") if name in row}
        return {**row, **ended}
