"""A byte-level BPE tokenizer trained on text, and saving one so that every supported transformers version reads it."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# In order of their ids. Id 0 is what the autoencoder puts in place of a dropped token (paper 2.2): here it is a token
# that no text contains, and the same one fills the first patch of a short prompt.
FILLER, BOS, EOS, PAD = SPECIAL_TOKENS = ("<|filler|>", "<|bos|>", "<|eos|>", "<|pad|>")

# Spaces go with the word behind them; digits in groups of at most three: the pattern of the Llama 3 tokenizer.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries: 4 special tokens, 256 bytes, the rest merges.

    BOS comes in front of every text, as with Llama 3; padding goes to the left.

    Raises:
        ValueError: `vocab_size` too small to hold the special tokens and all bytes, or text too short for it.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if not isinstance(vocab_size, int) or vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size!r}: must be at least {smallest}, the special tokens and all bytes.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # its bars know neither rate nor time left
    )
    bpe.train_from_iterator(documents, trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the text gives only {bpe.get_vocab_size()} entries; lower it or add text."
        )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return with_special_tokens(bpe)


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Ours as transformers knows them, whose vocabulary begins with `SPECIAL_TOKENS`; padding goes to the left."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def first_difference(theirs, ours, num_known: int) -> tuple[int, str | None, str | None] | None:
    """The first id at which two tokenizers have different tokens, with their token and ours; `None` where all agree.

    Ours may have special tokens that theirs lacks, and special tokens that neither begins or ends a text with may be
    called otherwise, as the reserved ones of Llama 3 and 3.1: no text contains them.

    Args:
        theirs: of the model whose weights are to be used.
        ours: the autoencoder's.
        num_known: number of tokens that the model knows; what its tokenizer has above is of no account.
    """
    marks = {mark for t in (theirs, ours) for mark in (t.bos_token_id, t.eos_token_id)}
    vocabularies = [{token_id: token for token, token_id in t.get_vocab().items()} for t in (theirs, ours)]
    specials = [{i for i, token in t.added_tokens_decoder.items() if token.special} for t in (theirs, ours)]
    for token_id in sorted(vocabularies[0].keys() | vocabularies[1].keys()):
        their, our = (vocabulary.get(token_id) for vocabulary in vocabularies)
        if token_id >= num_known:
            their = None
        may_differ = token_id in specials[1] and (their is None or (token_id in specials[0] and token_id not in marks))
        if their != our and not may_differ:
            return token_id, their, our
    return None


def filler_token_id(tokenizer) -> int | None:
    """Id of the token that fills the first patch of a short prompt: our own, or the pad token of another tokenizer."""
    return tokenizer.get_vocab().get(FILLER, tokenizer.pad_token_id)


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """`save_pretrained`, without what it notes of the machine and the version."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
