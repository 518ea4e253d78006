"""Reads held-out text and packs it into blocks of tokens, as for training."""

# B blocks, L tokens of a block

import argparse
import re
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from calm_transformers.command_line import InputError
from calm_transformers.documents import (
    DocumentEnding,
    expand_paths,
    find_paths,
    open_hub_dataset,
    read_documents,
    read_hub_dataset,
    tokenize_documents,
)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select the text for open_documents and read_blocks."""
    data_help = ".jsonl/.txt/.parquet file(s), or a Hub dataset (the lines of WikiText are joined to articles)"
    parser.add_argument("--data", required=True, help=data_help)
    parser.add_argument("--subset", help="configuration of the Hub dataset")
    parser.add_argument("--split", default="test", help="split of the Hub dataset (default: test)")
    parser.add_argument("--text_column", default="text", help="name of the text field or column (default: text)")
    parser.add_argument("--append_eos", action="store_true", help="append EOS to documents, if training did")


def open_documents(args: argparse.Namespace) -> Iterator[str]:
    """Returns an iterator over the documents of a file, folder or glob pattern, else of a Hub dataset (streamed)."""
    if find_paths(args.data):
        return read_documents(expand_paths(args.data), args.text_column)
    dataset = open_hub_dataset(args.data, args.subset, args.split, streaming=True, extra="eval")
    rows = read_hub_dataset(dataset, args.text_column)
    return join_articles(rows) if args.data.rpartition("/")[2].lower() == "wikitext" else rows


def join_articles(lines: Iterable[str]) -> Iterator[str]:
    """Yields the articles of WikiText, whose rows on the Hub are lines: the published scores are of whole articles."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = [^=].* = \n", line) and "".join(article).strip():
            yield "".join(article)
            article = []
        article.append(line or " \n")
    if article:
        yield "".join(article)


def read_blocks(args: argparse.Namespace, tokenizer, block_size: int, max_blocks: int | None = None) -> torch.Tensor:
    """Returns token ids (B, L) of the text that the options select; see pack_blocks."""
    return pack_blocks(open_documents(args), tokenizer, block_size, max_blocks, args.append_eos)


def pack_blocks(
    documents: Iterable[str], tokenizer, block_size: int, max_blocks: int | None = None, append_eos: bool = False
) -> torch.Tensor:
    """Concatenates the tokenized documents, returns token ids in blocks (B, L) and drops the remainder."""
    if block_size < 1:
        raise InputError(f"block_size={block_size}: must be at least 1.")
    pieces, length = [], 0
    for ids in tokenize_documents(documents, tokenizer, DocumentEnding(append_eos=append_eos)):
        pieces.append(ids.astype(np.int64))
        length += len(ids)
        if max_blocks is not None and length >= max_blocks * block_size:
            break
    num_blocks = length // block_size if max_blocks is None else min(length // block_size, max_blocks)
    if not length:
        raise InputError("the data contains no text.")
    if num_blocks == 0:
        raise InputError(f"the data has {length} tokens, fewer than one block of {block_size}: use smaller blocks.")
    return torch.from_numpy(np.concatenate(pieces)[: num_blocks * block_size]).view(num_blocks, block_size)
