"""The trained tokenizer: any size, reversible, and readable by every supported transformers version."""

import pytest
from training_helpers import WORDS, train
from transformers import AutoTokenizer

from calm.training.tokenizer import SPECIAL_TOKENS, filler_token_id, save_tokenizer, train_bpe

TEXTS = [" ".join(WORDS), "  two  spaces\n\n\tand tabs, 1234567 and ünïcödé 猫 🐈", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe(TEXTS * 3, vocab_size=290), folder)
    return AutoTokenizer.from_pretrained(folder)


def test_size_special_tokens_and_padding(tokenizer):
    assert len(tokenizer) == 290
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == list(SPECIAL_TOKENS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert filler_token_id(tokenizer) == 0
    batch = tokenizer(TEXTS[:2], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    shorter = min((0, 1), key=lambda row: sum(batch["attention_mask"][row]))
    assert batch["input_ids"][shorter][0] == 3 and batch["attention_mask"][shorter][0] == 0  # on the left


@pytest.mark.parametrize("text", [*TEXTS, "never seen: żółw \x00 ﷽"])
def test_any_text_comes_back_behind_one_bos(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and ids.count(1) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_vocabulary_too_small_or_too_large_for_the_text_is_refused():
    with pytest.raises(ValueError, match="vocab_size=259: must be at least 260"):
        train_bpe(TEXTS, 259)
    with pytest.raises(ValueError, match="vocab_size='all': must be at least 260"):
        train_bpe(TEXTS, "all")
    with pytest.raises(ValueError, match="the text gives only"):
        train_bpe(TEXTS, 5000)


@pytest.mark.parametrize(
    "content, why",
    [
        (rb'{"text": "\ud800"}', "line 1: no text: character 1 is half of a surrogate pair"),
        (b"", "no text there"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_text_that_cannot_be_read_is_one_sentence(tmp_path, capsys, content, why):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert train("tokenizer", train_files=str(tmp_path / "a.jsonl"), output_dir=str(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'a.jsonl'}") and why in error and error.count("\n") == 1
