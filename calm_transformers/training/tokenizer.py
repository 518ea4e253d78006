"""Trains, compares and saves tokenizers."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from calm_transformers.files import written

# In the order of their ids. The autoencoder replaces dropped tokens by id 0 (paper 2.2), which is the filler: no text
# contains it, and it also fills the first patch of a short prompt.
FILLER, BOS, EOS, PAD = SPECIAL_TOKENS = ("<|filler|>", "<|bos|>", "<|eos|>", "<|pad|>")

# The Llama 3 tokenizer's pattern: a space belongs to the word after it, digits form groups of at most three.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of `vocab_size` entries: 4 special tokens, 256 bytes, the rest merges.

    It puts BOS before every text, as Llama 3 does, and pads on the left.

    Raises:
        ValueError: `vocab_size` is too small for the special tokens and all bytes, or too large for the text.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if not isinstance(vocab_size, int) or vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size!r}: must be at least {smallest}, the special tokens and all bytes.")
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # its bars show neither speed nor remaining time
    )
    bpe.train_from_iterator(documents, trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the text yields only {bpe.get_vocab_size()} entries; lower it or add text."
        )
    bos = [(BOS, bpe.token_to_id(BOS))]
    bpe.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS} $B", bos)
    return with_special_tokens(bpe)


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wraps a tokenizer whose vocabulary begins with `SPECIAL_TOKENS` for transformers, with left padding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def first_difference(pretrained, ours, vocab_size: int) -> tuple[int, str | None, str | None] | None:
    """Returns the first id at which two tokenizers differ, with both tokens, or `None` if they are compatible.

    Special tokens may be missing in `pretrained`, or have other names unless they are BOS or EOS, like the reserved
    ones of Llama 3 and 3.1: no text contains them.

    Args:
        pretrained: tokenizer of the model whose weights are to be used.
        ours: the autoencoder's tokenizer.
        vocab_size: of the pretrained model; ids of its tokenizer from there on are ignored.
    """
    bos_eos = {token_id for t in (pretrained, ours) for token_id in (t.bos_token_id, t.eos_token_id)}
    tokens, our_tokens = ({i: token for token, i in t.get_vocab().items()} for t in (pretrained, ours))
    special_ids, our_special_ids = (
        {i for i, token in t.added_tokens_decoder.items() if token.special} for t in (pretrained, ours)
    )
    for token_id in sorted(tokens.keys() | our_tokens.keys()):
        token = tokens.get(token_id) if token_id < vocab_size else None
        our_token = our_tokens.get(token_id)
        is_reserved = token is None or (token_id in special_ids and token_id not in bos_eos)
        if token != our_token and not (token_id in our_special_ids and is_reserved):
            return token_id, token, our_token
    return None


def filler_token_id(tokenizer) -> int | None:
    """Returns the id of the token that fills the first patch of a short prompt: our filler, or else the pad token."""
    return tokenizer.get_vocab().get(FILLER, tokenizer.pad_token_id)


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """Saves the tokenizer without the fields that depend on the machine or the transformers version."""
    with written(folder):
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        for key in ("backend", "is_local", "local_files_only"):
            settings.pop(key, None)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
