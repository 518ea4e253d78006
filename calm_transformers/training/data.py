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
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from calm_transformers.command_line import InputError
from calm_transformers.documents import DataOptions, DocumentEnding, Documents, load_documents, tokenize_documents
from calm_transformers.model.modeling_calm import target_patches
from calm_transformers.training.tokenizer import filler_token_id

TOKENS_FORMAT = 3  # in the manifest; since 3 there are shards
MANIFEST, SHARD = "calm_tokens.json", "shard-{:05d}"  # in a folder of tokens
READING_OPTIONS = ("text_column", "max_documents", "skip_bad_lines")  # that tell which documents are read
STREAM_DOCUMENTS, STREAM_CHARACTERS = 4096, 2**26  # of a stream that are tokenised and shuffled at a time, at most
MAX_BYTES_IN_TRAINING = 2 * 10**9  # of text that a training of several processes tokenises


@dataclass(frozen=True)
class RunLength:
    """The length of a training run: `max_steps` if above 0, else `epochs` of the data.

    `batch_size` is the number of blocks per step, over all processes and accumulated batches; `rank` is that of this
    one of `num_ranks` processes.
    """

    batch_size: int
    epochs: float = 1
    max_steps: int = -1
    rank: int = 0
    num_ranks: int = 1

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
        tokens = load_tokens(options, "validation", tokenizer, patch_size, cache)
        num_blocks = blocks_per_epoch(len(tokens), options.block_size)
        num_blocks = min(num_blocks, options.validation_blocks or num_blocks)
        validation = PackedBlocks(tokens, options.block_size, patch_size, num_blocks)
    order_options = {"seed": seed, "random_phase": options.random_phase}
    if options.streaming:
        tokenize = partial(tokenize_documents, tokenizer=tokenizer, ending=document_ending(options, patch_size))
        documents, _ = load_documents(options, "train")
        ranks = {"rank": run_length.rank, "num_ranks": run_length.num_ranks}
        train = StreamedBlocks(documents, tokenize, **ranks, **block_options, **order_options)
        return TrainingDatasets(train, run_length.max_steps, validation)
    tokens = load_tokens(options, "train", tokenizer, patch_size, cache)
    per_epoch = blocks_per_epoch(len(tokens), options.block_size, options.random_phase)
    num_steps = run_length.num_steps(per_epoch)
    train = PackedBlocks(tokens, **block_options, **order_options, num_blocks=num_steps * run_length.batch_size)
    return TrainingDatasets(train, num_steps, validation)


# tokens


def token_cache_dir(options: DataOptions) -> Path:
    return Path(options.cache_dir or Path(HF_HOME) / "calm" / "tokens")


class TokenShard(NamedTuple):
    """Token ids of documents, one after the other, and the start of each, then the end; mostly memory-mapped."""

    ids: np.ndarray
    bounds: np.ndarray


class Tokens:
    """The tokens of all shards as one sequence. A slice of it is read from the shards that hold it."""

    def __init__(self, shards: list[TokenShard]):
        self.shards = shards
        self.offsets = np.cumsum([0, *(len(shard.ids) for shard in shards)])  # where shards start, and the end

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        overlaps = zip(self.shards, start - self.offsets[:-1], stop - self.offsets[:-1], strict=True)
        parts = [shard.ids[max(0, begin) : max(0, end)] for shard, begin, end in overlaps if begin < len(shard.ids)]
        return np.concatenate(parts)

    def next_document(self, index: int) -> int:
        """Returns where the first document starts that starts at `index` or later, or the end."""
        for shard, offset in zip(self.shards, self.offsets[:-1], strict=True):
            if index < offset + len(shard.ids):
                found = int(np.searchsorted(shard.bounds, index - offset))
                return int(offset + shard.bounds[found])
        return len(self)


def _hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read_manifest(folder: Path) -> dict | None:
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _open_shard(folder: Path, manifest: dict, index: int) -> TokenShard | None:
    """Opens a shard, or returns None if it is missing, damaged or of another manifest."""
    path = folder / SHARD.format(index)
    if _read_manifest(path) != manifest:
        return None
    try:
        bounds = np.load(path / "document_bounds.npy", mmap_mode="r")
        ids = np.memmap(path / "tokens.bin", dtype=manifest["dtype"], mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return TokenShard(ids, bounds) if len(bounds) and bounds[-1] == len(ids) else None


def write_shard(folder: Path, manifest: dict, index: int, tokenize: Callable[[], Iterable[np.ndarray]]) -> TokenShard:
    """Writes what `tokenize()` yields as a shard of a folder of tokens, unless it is there, and returns the shard.

    `manifest` (JSON) has `num_shards`, `dtype` and what the tokens depend on. A shard is renamed into place when
    complete, so that a kill leaves no partial one.
    """
    shard = _check_manifest(folder, manifest) and _open_shard(folder, manifest, index)
    if not shard:
        try:
            _write_shard(folder, manifest, index, tokenize)
        except OSError as error:
            raise InputError(f"{folder}: the tokens cannot be written there ({error.strerror or error}).") from error
        shard = _open_shard(folder, manifest, index)
    assert shard, f"{folder}: another process removed it meanwhile"
    return shard


def _check_manifest(folder: Path, manifest: dict) -> bool:
    """Returns whether the folder has this manifest, False if it has none; raises InputError if it has another one."""
    found = _read_manifest(folder)
    if found is not None and found != manifest:
        raise InputError(f"{folder} holds other tokens ({_difference(found, manifest)}): name another folder.")
    return found is not None


def _difference(found: dict, expected: dict) -> str:
    names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    return ", ".join(f"{name} {found.get(name)!r} in place of {expected.get(name)!r}" for name in names)


def _write_shard(folder: Path, manifest: dict, index: int, tokenize: Callable[[], Iterable[np.ndarray]]) -> None:
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    unfinished.mkdir(parents=True)
    try:
        bounds = array("q", [0])
        with open(unfinished / "tokens.bin", "wb") as file:
            for ids in tokenize():
                bounds.append(bounds[-1] + len(ids))
                file.write(ids.astype(manifest["dtype"]).tobytes())
        if not bounds[-1]:
            part = f" in shard {index} of {manifest['num_shards']}" if manifest["num_shards"] > 1 else ""
            raise InputError(f"the data holds no text{part}.")
        np.save(unfinished / "document_bounds.npy", np.frombuffer(bounds, np.int64))
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        if not _check_manifest(folder, manifest):  # again: another process may have started with another one
            shutil.copyfile(unfinished / MANIFEST, unfinished / "copy")
            os.replace(unfinished / "copy", folder / MANIFEST)
        if _open_shard(folder, manifest, index) is None:
            shutil.rmtree(folder / SHARD.format(index), ignore_errors=True)  # damaged
        try:
            os.replace(unfinished, folder / SHARD.format(index))
        except OSError:  # another process wrote the same tokens first
            if _open_shard(folder, manifest, index) is None:
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def document_ending(options: DataOptions, patch_size: int) -> DocumentEnding:
    # Without padding the tokens must not depend on the patch size.
    return DocumentEnding(options.append_eos, options.pad_to_patch, patch_size if options.pad_to_patch else 1)


def token_manifest(options: DataOptions, tokenizer, patch_size: int, num_shards: int = 1) -> dict:
    """Returns what a folder of tokens depends on, apart from the text."""
    ending = document_ending(options, patch_size)
    return {
        "format": TOKENS_FORMAT,
        "num_shards": num_shards,
        "dtype": "uint16" if len(tokenizer) <= 2**16 else "uint32",
        "tokenizer": _hash([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.pad_token_id]),
        **dataclasses.asdict(ending),
    }


def reading_manifest(options: DataOptions, source: list) -> dict:
    """Returns what tells which documents were read; `source` is that of `load_documents`."""
    return {"source": source, **{name: getattr(options, name) for name in READING_OPTIONS}}


def load_tokens(options: DataOptions, part: str, tokenizer, patch_size: int, cache: Path) -> Tokens:
    """Returns the tokens of the "train" or "validation" part of the data.

    They are read from a folder that `calm tokenize` wrote, where the part is one, or else from a folder in `cache`,
    which is written first if it isn't there.
    """
    manifest = token_manifest(options, tokenizer, patch_size)
    files = options.train_files if part == "train" else options.validation_files
    if options.max_documents is None and len(files) == 1 and (Path(files[0]) / MANIFEST).is_file():
        return _load_tokenized(Path(files[0]), manifest)
    texts, source = load_documents(options, part, f"Tokenising, {part}")
    manifest |= reading_manifest(options, source)
    folder = cache / _hash(manifest)
    if texts.unit == "B" and (texts.total or 0) > MAX_BYTES_IN_TRAINING and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if _open_shard(folder, manifest, 0) is None:  # one process would tokenise, and the others give up waiting
            raise InputError(
                f"{texts.source}: {(texts.total or 0) / 1e9:.0f} GB of text are too much to tokenise in a training: "
                f"run calm tokenize --output DIR first, then give --{part}_files DIR."
            )
    ending = document_ending(options, patch_size)
    shard = write_shard(folder, manifest, 0, lambda: tokenize_documents(texts, tokenizer, ending))
    return Tokens([shard])


def _load_tokenized(folder: Path, expected: dict) -> Tokens:
    """Opens the output of `calm tokenize`; raises InputError if shards are missing, or the tokens would be others."""
    manifest = _read_manifest(folder) or {}
    num_shards = manifest.get("num_shards", 1)
    expected = expected | {"num_shards": num_shards}
    if difference := _difference({name: manifest.get(name) for name in expected}, expected):  # any text
        raise InputError(f"{folder} holds tokens of other settings ({difference}): tokenise the text again.")
    shards = [_open_shard(folder, manifest, index) for index in range(num_shards)]
    if missing := [index for index, shard in enumerate(shards) if shard is None]:
        raise InputError(f"{folder}: {len(missing)} of {num_shards} shards are missing, the first is {missing[0]}.")
    return Tokens([shard for shard in shards if shard is not None])


# blocks


class TooFewTokens(InputError):
    """The data has no whole block."""


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
        raise TooFewTokens(
            f"the data has {num_tokens} tokens, too few for one block of block_size={block_size}"
            f"{' and a random phase' if random_phase else ''}."
        )
    return num_blocks


class PackedBlocks(Dataset):
    """Map-style dataset of blocks of `block_size` tokens; item i is a pure function of the seed and i.

    Every epoch visits each block once, in its own random order. Sharding and resuming are therefore only a choice of
    indices: the processes' batches are interleaved, and a resumed run continues with the next index.

    Args:
        tokens: of all documents.
        block_size: L, a multiple of K. The tokens after the last whole block of an epoch are not seen in it.
        patch_size: K.
        num_blocks: length of the dataset, over all epochs; `None` is one epoch.
        seed: seed of order, phases and fillers. `None`: file order, no random phase and no fillers.
        random_phase: start each epoch at a random one of the first L tokens.
        left_fill, filler_token_id: see `DataOptions`.
    """

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        patch_size: int = 1,
        num_blocks: int | None = None,
        seed: int | None = None,
        random_phase: bool = False,
        left_fill: float = 0.0,
        filler_token_id: int | None = None,
    ):
        self.tokens, self.block_size, self.patch_size = tokens, block_size, patch_size
        self.seed, self.left_fill, self.filler_token_id = seed, left_fill, filler_token_id
        self.random_phase = random_phase and seed is not None
        self.blocks_per_epoch = blocks_per_epoch(len(tokens), block_size, self.random_phase)
        self.num_blocks = self.blocks_per_epoch if num_blocks is None else num_blocks
        self._epoch: int | None = None  # of _order and _phase
        self._order, self._phase = np.arange(0), 0

    def __len__(self) -> int:
        return self.num_blocks

    def summary(self) -> str:
        return f"{len(self.tokens):,} tokens, {self.num_blocks / self.blocks_per_epoch:.2f} epochs"

    def _start_epoch(self, seed: int, epoch: int) -> None:
        """Draws the order of the epoch's blocks and its phase, the number of tokens skipped at its start."""
        rng = np.random.default_rng([seed, epoch])
        self._order = np.arange(self.blocks_per_epoch, dtype=np.uint32)
        rng.shuffle(self._order)
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
        ids[num_fillers:] = self.tokens[start : start + self.block_size - num_fillers]
        return {"input_ids": torch.from_numpy(ids), "num_fillers": num_fillers, "block_id": int(index)}

    def _choose_left_fill(self, start: int, rng: np.random.Generator) -> tuple[int, int]:
        """Returns where a block's text starts, and the number of filler tokens in front.

        With probability `left_fill` the block looks like a short prompt: 0 … K − 1 fillers, then a document's start.
        """
        if rng.random() >= self.left_fill:
            return start, 0
        document_start = self.tokens.next_document(start)
        if document_start + self.block_size <= len(self.tokens):
            start = document_start
        return start, int(rng.integers(self.patch_size))


class StreamedBlocks(IterableDataset):
    """Endless iterable dataset of blocks: reads and tokenises the documents while training.

    Each DataLoader worker of each process has its own share of the documents. A window of `STREAM_DOCUMENTS` of them,
    or fewer long ones, is cut into blocks, which come in random order; the tokens after its last whole block are not
    seen. A stream's position is where its window begins, as a file and the documents read of it, and the block: a
    resumed run opens that file and tokenises one window again. With other numbers of processes or workers it is
    another stream.

    Args:
        documents, tokenize: the text, and what yields the token ids of each of some documents.
        rank, num_ranks: of this process, and the number of processes.
        block_options: of `PackedBlocks`, for the blocks of each window.
    """

    def __init__(
        self,
        documents: Documents,
        tokenize: Callable[[Iterable[str]], Iterable[np.ndarray]],
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        **block_options,
    ):
        self.documents, self.tokenize, self.seed = documents, tokenize, seed
        self.rank, self.num_ranks, self.block_options = rank, num_ranks, block_options
        self._next = 0, 0, 0, 0  # epoch; part, and the documents read of it, where the window begins; block

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        share = self.rank * num_workers + worker_id, self.num_ranks * num_workers
        parts, (epoch, part, num_read, block) = self.documents.share(*share), self._next
        while True:
            documents = self._documents(parts, part, num_read)
            while window := list(take_window(documents)):
                blocks = self._blocks([text for *_, text in window], [self.seed, share[0], epoch, part, num_read])
                for index in range(block, len(blocks)):
                    self._next = epoch, part, num_read, index + 1
                    row = blocks[index]
                    yield {name: row[name] for name in ("input_ids", "num_fillers")}
                (part, num_read, _), block = window[-1], 0
            if self._next == (0, 0, 0, 0):
                raise InputError(f"{self.documents.source}: no block in share {share[0]} of {share[1]} of its text.")
            epoch, part, num_read = epoch + 1, 0, 0

    @staticmethod
    def _documents(parts: Sequence[Callable], part: int, num_read: int) -> Iterator[tuple[int, int, str]]:
        """Yields the documents from a position on, with the position after each."""
        for number in range(part, len(parts)):
            first = num_read if number == part else 0
            for index, text in enumerate(itertools.islice(parts[number](), first, None), first):
                yield number, index + 1, text

    def _blocks(self, texts: list[str], seed: list[int]) -> "PackedBlocks | list":
        pieces = list(self.tokenize(texts))
        tokens = Tokens([TokenShard(np.concatenate(pieces or [np.zeros(0)]), np.cumsum([0, *map(len, pieces)]))])
        try:
            return PackedBlocks(tokens, seed=int(np.random.default_rng(seed).integers(2**31)), **self.block_options)
        except TooFewTokens:
            return []

    def state_dict(self) -> dict:
        return {"next": list(self._next)}

    def load_state_dict(self, state: dict) -> None:
        self._next = tuple(state["next"])

    def summary(self) -> str:
        return "a stream of tokens"


def take_window(documents: Iterator[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Yields the next `STREAM_DOCUMENTS` documents, or fewer if they have `STREAM_CHARACTERS` before."""
    num_characters = 0
    for document in itertools.islice(documents, STREAM_DOCUMENTS):
        yield document
        num_characters += len(document[-1])
        if num_characters >= STREAM_CHARACTERS:
            return


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
