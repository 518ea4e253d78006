"""Quantised models: each method writes a text and has a loss; they are saved and loaded."""

import copy
import logging
import warnings

import pytest
import torch
from text_and_loss import text_and_loss
from tiny import HEAD_TYPES, tiny_model
from transformers import BitsAndBytesConfig

from calm_transformers.model.modeling_calm import CALMForCausalLM

pytestmark = pytest.mark.transformers  # most of it runs with the optional clients alone

# bitsandbytes' 4-bit blocks are of 64 values.
WIDE = {"hidden_size": 64, "intermediate_size": 64, "latent_size": 64, "noise_size": 64}
WIDE_AUTOENCODER = {"hidden_size": 64, "intermediate_size": 64, "latent_size": 64}


def check(quantised_model, model, rel=0.3, by_row=True):
    """Texts are written, and the loss is near the whole model's.

    Decoded lazily or not, the text is the same where a row's values don't depend on the rows beside it (`by_row`), as
    they do where activations are rounded by the range, or split by the outliers, of all rows together.
    """
    with torch.no_grad():
        (lazy, loss), (plain, _) = (text_and_loss(quantised_model, lazy_decoding=choice) for choice in (True, False))
        assert loss == pytest.approx(text_and_loss(model)[1], rel=rel)
    assert lazy == plain if by_row else [len(row) for row in lazy] == [len(row) for row in plain]


def load_in_bits(folder, **settings):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra [clients]) is not installed")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each float32 product
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)
    loaded = CALMForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)
    kind = bitsandbytes.nn.Linear4bit if "load_in_4bit" in settings else bitsandbytes.nn.Linear8bitLt
    assert any(isinstance(m, kind) for m in loaded.head.modules())
    return loaded


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_dynamically_quantised_linear_layers(head_type):
    model = tiny_model(head_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch will move it elsewhere
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, torch.qint8)
    assert not any(type(m) is torch.nn.Linear for m in small.modules())
    check(small, model, by_row=False)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_bitsandbytes(tmp_path, head_type):
    for bits, sizes, rel in ((8, {}, 0.3), (4, {"autoencoder_config": dict(WIDE_AUTOENCODER), **WIDE}, 0.5)):
        model = tiny_model(head_type, **sizes)
        model.save_pretrained(tmp_path / str(bits))
        small = load_in_bits(tmp_path / str(bits), **{f"load_in_{bits}bit": True})
        check(small, model, rel, by_row=bits == 4)
        if bits == 8:
            small.save_pretrained(tmp_path / "small")
            loaded = CALMForCausalLM.from_pretrained(tmp_path / "small", device_map="cpu", dtype=torch.float32)
            assert text_and_loss(loaded) == text_and_loss(small)


TORCHAO = [(head_type, "Int8WeightOnlyConfig") for head_type in HEAD_TYPES]
TORCHAO += [("energy", "Int8DynamicActivationInt8WeightConfig")]


@pytest.mark.parametrize("head_type, config", TORCHAO)
def test_torchao(tmp_path, head_type, config):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao (extra [clients]) is not installed")
    from transformers import TorchAoConfig

    model = tiny_model(head_type)
    model.save_pretrained(tmp_path)
    small, config = copy.deepcopy(model), getattr(quantization, config)()
    quantization.quantize_(small, config)
    first_linear = next(part for part in small.head.modules() if isinstance(part, torch.nn.Linear))
    assert type(first_linear.weight) is not torch.nn.Parameter
    check(small, model)
    options = {"device_map": "cpu", "dtype": torch.float32}
    loaded = CALMForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config), **options)
    check(loaded, model)
    loaded.save_pretrained(tmp_path / "small")
    again = CALMForCausalLM.from_pretrained(tmp_path / "small", **options)
    assert text_and_loss(again) == text_and_loss(loaded)
