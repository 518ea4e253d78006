"""Documents to one array of tokens on disk, written once for what it depends on."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calm.training.documents import DataError, documents
from calm.training.recipe import DataOptions

# Documents are tokenised in batches of about this many characters.
CHARACTERS_PER_BATCH = 4_000_000


@dataclass(frozen=True)
class Separation:
    """What stands between two documents. A BOS comes from the tokenizer itself.

    Published: CALM none of these; autoencoder both (`append_eos`, then padding to a whole patch).
    """

    append_eos: bool = False
    pad_to_patch: bool = False
    patch_size: int = 1


def tokenize_documents(documents: Iterable[str], tokenizer, separation: Separation) -> Iterator[np.ndarray]:
    """Token ids of each document, ends as `separation` says; empty documents are left out."""
    if separation.append_eos and tokenizer.eos_token_id is None:
        raise DataError("append_eos needs a tokenizer with an EOS token.")
    if separation.pad_to_patch and tokenizer.pad_token_id is None:
        raise DataError("pad_to_patch needs a tokenizer with a pad token.")

    def flush(batch):
        for ids in tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]:
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


@dataclass
class TokenFile:
    """All documents' tokens in one array on disk, and where each document begins."""

    tokens: np.ndarray
    document_starts: np.ndarray


def tokenizer_fingerprint(tokenizer) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def cached_tokens(folder: Path, key: dict, write: Callable[[], Iterable[np.ndarray]]) -> TokenFile:
    """Opens the token file for `key` under `folder`, written first by `write()` if it is not there.

    Args:
        folder: of the caches. Each is a sub-folder that appears only when complete, so a kill leaves no half one.
        key: everything that the tokens depend on (JSON).
        write: () → iterator of the documents' token ids.
    """
    target = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    if not target.exists():
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            starts, length = [], 0
            with open(unfinished / "tokens.bin", "wb") as file:
                for ids in write():
                    starts.append(length)
                    length += len(ids)
                    file.write(ids.tobytes())
            np.save(unfinished / "document_starts.npy", np.asarray(starts, dtype=np.int64))
            (unfinished / "key.json").write_text(json.dumps(key, indent=1))
            try:
                os.replace(unfinished, target)
            except OSError:  # another process wrote the same tokens meanwhile, and was first
                if not target.exists():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    if not (target / "tokens.bin").stat().st_size:
        raise DataError("the data holds no text.")
    tokens = np.memmap(target / "tokens.bin", dtype=np.uint32, mode="r")
    return TokenFile(tokens, np.load(target / "document_starts.npy"))


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
        DataError: as `documents` and `tokenize_documents`, or there is no text.
    """
    separation = separation_of(options, patch_size)
    texts, source = documents(options, part, f"Tokenising, {part}")
    key = {
        "source": source,
        "text_column": options.text_column,
        "max_documents": options.max_documents,
        "separation": [separation.append_eos, separation.pad_to_patch, separation.patch_size],
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    return cached_tokens(folder, key, lambda: tokenize_documents(texts, tokenizer, separation))
