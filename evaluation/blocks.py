"""Held-out text as whole blocks of tokens, read by the same code as the training data."""

# B blocks, L tokens of a block

from __future__ import annotations

import glob

import numpy as np
import torch

from calm.training.data import Separation, tokenize_documents
from calm.training.documents import DataError, expand_paths, read_documents, read_hub_dataset


def open_documents(data: str, subset: str | None = None, split: str = "test", text_column: str = "text"):
    """Iterator of documents: a file, folder or glob pattern of files, else the name of a Hub dataset (streamed)."""
    if glob.glob(data):
        return read_documents(expand_paths(data), text_column)
    import datasets

    try:
        return read_hub_dataset(datasets.load_dataset(data, subset, split=split, streaming=True), text_column)
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(f"{data}: neither a file here nor a Hub dataset that can be reached ({error}).") from error


def pack_blocks(documents, tokenizer, block_size: int, max_blocks: int | None = None) -> torch.Tensor:
    """(B, L) token ids: documents one after another (BOS by the tokenizer), cut into blocks, the rest left out.

    Raises DataError when there are fewer tokens than one block.
    """
    pieces, length = [], 0
    for ids in tokenize_documents(documents, tokenizer, Separation()):
        pieces.append(ids.astype(np.int64))
        length += len(ids)
        if max_blocks is not None and length >= max_blocks * block_size:
            break
    blocks = length // block_size if max_blocks is None else min(length // block_size, max_blocks)
    if blocks == 0:
        raise DataError(f"the data has {length} tokens, fewer than one block of {block_size}: choose shorter blocks.")
    return torch.from_numpy(np.concatenate(pieces)[: blocks * block_size]).view(blocks, block_size)
