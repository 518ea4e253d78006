"""Loading a repository in a fresh, offline process through every Auto class and the pipeline, without a warning."""

import contextlib
import functools
import json

import fresh_process
import pytest
import safetensors.torch
import torch
from model_copies import PROMPT, ROOT, assert_carries_its_code, load_every_way
from tiny import BOS, VOCAB_SIZE, tiny_model, tiny_tokenizer

from calm_transformers import loading
from calm_transformers.conversion.convert import convert
from calm_transformers.evaluation.text_scores import score_texts
from calm_transformers.loading import check_tokenizer
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import non_finite_weight
from calm_transformers.serving.batcher import Batcher

pytestmark = pytest.mark.transformers


def check_loads_every_way(folder, home):
    """Checks the result of `load_every_way`; returns it and the folder of the copy that it saved."""
    copy = home / "copy"
    loaded = fresh_process.call(load_every_way, home, folder=str(folder), copy=str(copy))
    assert loaded.complaints == []
    assert loaded.result["classes"] == ["CALMConfig", "CALMModel", "CALMForCausalLM"]
    assert loaded.result["text"].startswith(PROMPT) and loaded.result["snippet"].startswith(PROMPT)
    assert_carries_its_code(copy)
    settings, copied = (json.loads((each / "generation_config.json").read_text()) for each in (folder, copy))
    assert copied == settings | {"transformers_version": copied["transformers_version"]}
    return loaded.result, copy


@pytest.mark.slow
@pytest.mark.parametrize("is_converted", [False, True])
def test_the_root_and_a_converted_checkpoint_load(tmp_path, is_converted):
    if is_converted:
        published, tokenizer = ROOT / "tests/fixtures/energy_k4", tmp_path / "tokenizer"
        tiny_tokenizer().save_pretrained(tokenizer)
        pair = str(published / "calm"), str(published / "autoencoder")
        convert(*pair, tmp_path / "converted", str(tokenizer))
        assert_carries_its_code(tmp_path / "converted")
    check_loads_every_way(tmp_path / "converted" if is_converted else ROOT, tmp_path / "home")


def test_a_saved_model_and_a_copy_of_its_copy_load_alike(tmp_path):
    saved = tmp_path / "saved"
    tiny_model().save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    assert_carries_its_code(saved)
    first, copy = check_loads_every_way(saved, tmp_path / "first")
    second, _ = check_loads_every_way(copy, tmp_path / "second")
    assert second == first


PROMPT_IDS = torch.tensor([[BOS, 5, 6, 7]])
WEIGHT = "head.blocks.0.context_proj.weight"


def save_changed(folder, change):
    tiny_model().save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def remove(tensors):
    del tensors[WEIGHT]


def set_nan(tensors):
    tensors[WEIGHT][3, 5] = torch.nan


@pytest.mark.parametrize(("change", "message"), [(remove, "loaded without values of"), (set_nan, "NaN")])
def test_missing_and_non_finite_weights_raise_errors(tmp_path, change, message):
    model = CALMForCausalLM.from_pretrained(save_changed(tmp_path, change))
    generate = functools.partial(CALMForCausalLM.generate, max_new_tokens=4)
    for function, *inputs in ((generate, PROMPT_IDS), (score_texts, PROMPT_IDS.repeat(1, 2)), (Batcher,)):
        with pytest.raises(ValueError, match=message) as error:
            function(model, *inputs)
        assert WEIGHT in str(error.value) and "\n" not in str(error.value)


def test_missing_weights_are_used_after_they_were_trained(tmp_path):
    model = CALMForCausalLM.from_pretrained(save_changed(tmp_path, remove))
    with torch.no_grad():
        dict(model.named_parameters())[WEIGHT].add_(0.1)
    assert model.generate(PROMPT_IDS, max_new_tokens=4, min_new_tokens=4).shape == (1, 8)


def test_changed_weights_are_checked_again():
    model = tiny_model()
    for value, message in ((1.0, None), (torch.inf, r"model\.norm\.weight holds NaN or infinity"), (70000.0, None)):
        with torch.no_grad():
            model.model.norm.weight[2] = value
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            model.generate(PROMPT_IDS, max_new_tokens=4)
    with pytest.raises(ValueError, match="float16"):  # whose largest number is 65504
        model.half().generate(PROMPT_IDS, max_new_tokens=4)


def test_another_model_s_tokenizer_raises_an_error(monkeypatch):
    model, tokenizer, warnings = tiny_model(), tiny_tokenizer(), []
    monkeypatch.setattr(loading.logger, "warning", warnings.append)
    check_tokenizer(model, tokenizer)
    assert not warnings
    model.config.vocab_size = VOCAB_SIZE + 4  # rounded up
    check_tokenizer(model, tokenizer, "there")
    (warning,) = warnings
    assert warning.startswith("there: has no token for 4 of the 100 ids of the model, as 96, 97, 98 and 1 more: if")
    model.config.vocab_size = 2 * VOCAB_SIZE
    with pytest.raises(ValueError, match="there: has no token for 96 of the 192 ids .* another model's tokenizer"):
        check_tokenizer(model, tokenizer, "there")
    vocabulary = tokenizer.get_vocab()
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {token: i for token, i in vocabulary.items() if i != 9})
    model.config.vocab_size = VOCAB_SIZE
    with pytest.raises(ValueError, match="no token for 1 of the 96 ids of the model, as 9. It is"):
        check_tokenizer(model, tokenizer)


def test_weights_of_extreme_values_are_finite():
    layer = torch.nn.Linear(4, 4, dtype=torch.float64)
    torch.nn.init.constant_(layer.weight, 1e300)  # the sum in float32 is infinite
    assert non_finite_weight(layer) is None
    layer.bias.data[1] = -torch.inf
    assert non_finite_weight(layer) == "bias"
