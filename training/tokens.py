"""Documents to one array of tokens on disk, written once for what it depends on."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calm.command_line import InputError
from calm.training.documents import documents
from calm.training.recipe import DataOptions

# Documents are tokenised in batches of about this many characters.
CHARACTERS_PER_BATCH = 4_000_000
# Of the key of a cache: 2, since documents that spell a special token are text.
CACHE_FORMAT = 2
# Options on which tokens don't depend, or only by what `documents` says of where they come from.
NOT_IN_TOKENS = {
    *("train_files", "validation_files", "dataset", "dataset_config", "dataset_split", "validation_split"),
    *("streaming", "validation_blocks", "block_size", "random_phase", "left_fill", "cache_dir"),
}


@dataclass(frozen=True)
class Separation:
    """What stands between two documents. A BOS comes from the tokenizer itself.

    Published: CALM none of these; autoencoder both (`append_eos`, then padding to a whole patch).
    """

    append_eos: bool = False
    pad_to_patch: bool = False
    patch_size: int = 1


def tokenize_documents(documents: Iterable[str], tokenizer, separation: Separation) -> Iterator[np.ndarray]:
    """Token ids of each document, ends as `separation` says; empty documents are left out.

    Special tokens come from the tokenizer and the separation alone: a document that spells one is text there as
    elsewhere. Documents with which the tokenizer can't do that are counted on stderr.
    """
    if separation.append_eos and tokenizer.eos_token_id is None:
        raise InputError("append_eos needs a tokenizer with an EOS token.")
    if separation.pad_to_patch and tokenizer.pad_token_id is None:
        raise InputError("pad_to_patch needs a tokenizer with a pad token.")
    special = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special and i != tokenizer.unk_token_id]
    num_added, num_spelled = tokenizer.num_special_tokens_to_add(), 0

    def flush(batch):
        nonlocal num_spelled
        encoded = tokenizer(batch, return_attention_mask=False, split_special_tokens=True, verbose=False)
        for ids in encoded["input_ids"]:
            num_spelled += int(np.isin(ids, special).sum()) > num_added
            if separation.append_eos:
                ids.append(tokenizer.eos_token_id)
            if separation.pad_to_patch:
                ids += [tokenizer.pad_token_id] * (-len(ids) % separation.patch_size)
            yield np.asarray(ids, dtype=np.uint32)

    batch, size = [], 0
    for document in documents:
        if not document:
            continue
        batch.append(document)
        size += len(document)
        if size >= CHARACTERS_PER_BATCH:
            yield from flush(batch)
            batch, size = [], 0
    if batch:
        yield from flush(batch)
    if num_spelled:
        what = "spell special tokens, which this tokenizer doesn't read as text"
        print(f"warning: {num_spelled} document(s) {what}", file=sys.stderr)


@dataclass
class TokenFile:
    """All documents' tokens in one array on disk, and where each document begins."""

    tokens: np.ndarray
    document_starts: np.ndarray


def tokenizer_fingerprint(tokenizer) -> str:
    content = [tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def cached_tokens(folder: Path, key: dict, write: Callable[[], Iterable[np.ndarray]]) -> TokenFile:
    """Opens the token file for `key` under `folder`, written first by `write()` if it is not there, or damaged.

    Args:
        folder: of the caches. Each is a sub-folder that appears only when complete, so a kill leaves no half one.
        key: everything that the tokens depend on (JSON).
        write: () → iterator of the documents' token ids.

    Raises:
        InputError: there are no tokens, or the folder cannot be written.
    """
    target = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    found = _open(target)
    if found is None:
        try:
            if target.exists():  # damaged
                shutil.rmtree(target)
            _write(target, key, write)
        except OSError as error:
            raise InputError(f"{target}: the tokens cannot be written there ({error.strerror or error}).") from error
        found = _open(target)
    assert found is not None, f"{target}: another process removed it meanwhile"
    return found


def _open(target: Path) -> TokenFile | None:
    """The token file of a folder, or None where it is not there or not whole."""
    try:
        bounds = np.load(target / "document_bounds.npy")
        tokens = np.memmap(target / "tokens.bin", dtype=np.uint32, mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return TokenFile(tokens, bounds[:-1]) if len(bounds) and bounds[-1] == len(tokens) else None


def _write(target: Path, key: dict, write: Callable[[], Iterable[np.ndarray]]) -> None:
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
            if _open(target) is None:
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def separation_of(options: DataOptions, patch_size: int) -> Separation:
    return Separation(options.append_eos, options.pad_to_patch, patch_size if options.pad_to_patch else 1)


def token_file(options: DataOptions, part: str, tokenizer, patch_size: int, folder: Path) -> TokenFile:
    """Tokens of the "train" or "validation" part of the data, out of the cache where they are there.

    Args:
        options: where the documents are, and what stands between them.
        part: "train" or "validation".
        tokenizer: whose tokens.
        patch_size: K, to which documents may be padded.
        folder: of the caches.

    Raises:
        InputError: as `documents` and `tokenize_documents`, or there is no text.
    """
    separation = separation_of(options, patch_size)
    texts, source = documents(options, part, f"Tokenising, {part}")
    fields = {f.name for f in dataclasses.fields(options)} - NOT_IN_TOKENS
    key = {
        "format": CACHE_FORMAT,
        "source": source,
        "options": {name: getattr(options, name) for name in fields},
        "patch_size": separation.patch_size,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    return cached_tokens(folder, key, lambda: tokenize_documents(texts, tokenizer, separation))
