"""The command: models and text in, table, JSON and plot out; the same numbers whatever the batch size."""

import json
import lzma

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calm.configuration_calm import CALMConfig
from calm.evaluation.blocks import pack_blocks
from calm.evaluation.brier_lm import main
from calm.evaluation.models import count_model, load_causal_lm
from calm.modeling_calm import CALMForCausalLM

WORDS = ["<bos>", "one", "two", "three", "four"]
SIZES = dict(vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `calm` (K = 2), `ar`, both with a word tokenizer, and `text.jsonl.xz`."""
    folder = tmp_path_factory.mktemp("brier_lm")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<bos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>")
    torch.manual_seed(0)
    autoencoder = dict(vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, patch_size=2, latent_size=4)
    calm = CALMForCausalLM(CALMConfig(**SIZES, patch_size=2, latent_size=4, autoencoder_config=autoencoder))
    ar = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64))
    for name, model in (("calm", calm), ("ar", ar)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with lzma.open(folder / "text.jsonl.xz", "wt") as file:
        for i in range(30):
            file.write(json.dumps({"text": " ".join(WORDS[1 + (i * j) % 4] for j in range(20))}) + "\n")
    return folder


def run(folder, *more, model=("ar",), data="text.jsonl.xz", block_size=24):
    names = [str(folder / name) for name in model]
    main(["--model", *names, "--data", str(folder / data), "--block_size", str(block_size), *map(str, more)])


def test_json_of_one_model(folder, tmp_path, capsys):
    run(folder, "--json", tmp_path / "out.json")
    [result] = json.loads((tmp_path / "out.json").read_text())
    assert result["block_size"] == 24
    assert result["blocks"] == 30 * 21 // 24  # BOS and 20 words a document
    assert result["positions"] == 26 * 20
    assert len(result["brier"]) == 4 and 0 < result["brier"][0] < 1
    lm = result["brierlm"]
    assert lm["low"] <= lm["value"] <= lm["high"]
    printed = capsys.readouterr().out
    assert f"{lm['value']:.2f}" in printed and "| 24 | 520 |" in printed


def test_comparison_of_models_and_plot(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(folder, "--max_positions", 30, model=("calm", "ar"))
    rows = [line for line in capsys.readouterr().out.splitlines() if str(folder) in line]
    assert len(rows) == 2
    assert rows[0].endswith("| 24 | 30 |")  # 12 patches: 10 positions a block, 3 blocks
    assert rows[1].endswith("| 24 | 40 |")  # 20 positions a block, 2 blocks
    assert (tmp_path / "brier_lm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ((), dict(model=("calm",), block_size=25), "multiple of the model's patch size 2"),
        ((), dict(block_size=4), "block_size=4: too short to predict 4 tokens"),
        ((), dict(block_size=65), "reads at most 64 tokens"),
        ((), dict(model=("nowhere",)), "nowhere"),
        ((), dict(model=("calm",), block_size=1000), "has 630 tokens, fewer than one block of 1000"),
        (("--text_column", "body"), {}, 'no string under the key "body"'),
    ],
)
def test_errors_are_one_sentence(folder, more, options, message):
    with pytest.raises(SystemExit, match=message) as error:
        run(folder, *more, **options)
    assert str(error.value).startswith("brier_lm: ")


def test_bad_option_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        run(folder, "--batch_size", 0)
    assert "--batch_size 0: must be at least 1" in capsys.readouterr().err


def test_blocks_are_the_documents_in_order(folder):
    class Letters:
        eos_token_id = pad_token_id = None

        def __call__(self, batch, **kwargs):
            return {"input_ids": [[ord(c) for c in text] for text in batch]}

    assert pack_blocks(["abc", "defg", "h"], Letters(), 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    assert pack_blocks(["abc", "defg", "h"], Letters(), 3, max_blocks=1).tolist() == [[97, 98, 99]]


@pytest.mark.parametrize("name", ["ar", "calm"])
def test_batches_change_only_the_draws(folder, name):
    """Exact terms agree for every batch size; a seed fixes the rest."""
    model = load_causal_lm(str(folder / name))
    blocks = torch.randint(len(WORDS), (6, 12), generator=torch.Generator().manual_seed(0))
    one, again, batched = (count_model(model, blocks, batch_size) for batch_size in (1, 1, 4))
    assert one.score() == again.score()
    assert one.positions_B.tolist() == batched.positions_B.tolist()
    if name == "ar":
        torch.testing.assert_close(one.accuracy_B4, batched.accuracy_B4)
        torch.testing.assert_close(one.collision_B4[:, 0], batched.collision_B4[:, 0])


def test_ids_outside_the_vocabulary_are_refused(folder):
    with pytest.raises(ValueError, match="token id 5: outside the model's vocabulary of 5"):
        count_model(load_causal_lm(str(folder / "ar")), torch.full((1, 12), 5))
