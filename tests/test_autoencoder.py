"""The autoencoder on its own: shapes for every K and depth, training noise, loss, weights tied through a save."""

import re

import fresh_process
import pytest
import torch
from model_copies import ROOT, reconstruct_by_auto_model
from text_and_loss import some_ids
from tiny import VOCAB_SIZE, seeded, tiny_model

from calm_transformers.model import modeling_calm_autoencoder
from calm_transformers.model.configuration_calm import CALMAutoencoderConfig
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder


def autoencoder(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "latent_size": 16}
    return CALMAutoencoder(CALMAutoencoderConfig(**{**sizes, **fields})).eval()


@pytest.mark.parametrize("patch_size, num_layers", [(1, 2), (2, 1), (4, 4), (8, 3)])
def test_every_patch_size_and_depth(patch_size, num_layers):
    model = autoencoder(patch_size=patch_size, num_encoder_layers=num_layers, num_decoder_layers=num_layers)
    mean, log_std = model.encoder(some_ids())
    assert mean.shape == log_std.shape == (2, 24 // patch_size, 16)
    assert model.decoder(mean).shape == (2, 24 // patch_size, patch_size, VOCAB_SIZE)
    assert model(some_ids()).logits.shape == (2, 24, VOCAB_SIZE)
    used = [name for name, p in model.named_parameters() if p.grad_fn is None]
    model(some_ids(), labels=some_ids()).loss.backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in used), "a layer that is not used"


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_patch_is_encoded_alone(num_layers):
    model, ids = autoencoder(num_encoder_layers=num_layers), some_ids()
    mean, changed = model.encode(ids)[0], ids.clone()
    changed[0, 5] = 3 if ids[0, 5] != 3 else 4
    difference = (model.encode(changed)[0] - mean).abs().sum(-1)
    sees = torch.zeros(2, 6).bool()
    sees[0, 1] = True
    assert torch.equal(difference > 0, sees)


def test_left_out_labels_and_accumulation():
    """Two halves with the number of labels of the whole add up to the loss of the whole, padding left out."""
    model, ids = autoencoder(kl_weight=0.1), some_ids(4)
    labels = ids.clone()
    labels[1, 9:] = -100
    noise = torch.randn(4, 6, 16)
    whole = model(ids, labels=labels, noise=noise).loss
    items, parts = (labels != -100).sum(), (slice(2), slice(2, 4))
    halves = [model(ids[s], labels=labels[s], noise=noise[s], num_items_in_batch=items).loss for s in parts]
    torch.testing.assert_close(sum(halves), whole)
    ids[1, 12:] = 3  # patches without a label don't matter
    torch.testing.assert_close(model(ids, labels=labels, noise=noise).loss, whole)


@pytest.mark.parametrize(
    "rates, is_seen",
    [
        ({"ae_dropout": 0.0}, (False, False)),
        ({"ae_dropout": 0.5}, (True, True)),
        ({"ae_dropout": 0.0, "token_dropout": 0.5}, (True, False)),
        ({"ae_dropout": 0.0, "latent_dropout": 0.5}, (False, True)),
        ({"ae_dropout": 0.5, "token_dropout": 0.0}, (False, True)),
        ({"ae_dropout": 0.5, "latent_dropout": 0.0}, (True, False)),
    ],
    ids=str,
)
def test_each_dropout_has_a_rate_of_its_own_in_training_alone(rates, is_seen):
    """The encoder's is seen in the posterior, the other in what the decoder is given of it."""
    model, ids, seen, noise = autoencoder(**rates), some_ids(8, 40), [], torch.zeros(8, 10, 16)
    clean = model.encode(ids)[0]
    model.decoder.register_forward_pre_hook(lambda decoder, args: seen.append(args[0]))
    model(ids, noise=noise)
    assert torch.equal(seen.pop(), clean)
    mean = model.train()(ids, noise=noise).mean
    assert (not torch.equal(mean, clean), not torch.equal(seen[0], mean)) == is_seen


def test_the_rate_is_the_share_of_tokens_that_are_replaced():
    model, seen = autoencoder(ae_dropout=0.5).train(), []
    model.encoder.register_forward_pre_hook(lambda encoder, args: seen.append(args[0]))
    model(some_ids(8, 400), generator=seeded())
    assert (seen[0] == 0).float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.transformers
def test_dropouts_of_its_own_survive_a_save(tmp_path):
    CALMAutoencoderConfig(token_dropout=0.1, latent_dropout=0.0).save_pretrained(tmp_path / "own")
    own = CALMAutoencoderConfig.from_pretrained(tmp_path / "own")
    assert (own.token_dropout_rate, own.latent_dropout_rate, own.ae_dropout) == (0.1, 0.0, 0.15)


def test_decode_tokens_is_the_argmax_in_chunks(monkeypatch):
    model, latents = autoencoder(), torch.randn(3, 5, 16)
    expected = model.decoder(latents).argmax(-1)
    assert torch.equal(model.decode_tokens(latents), expected)
    monkeypatch.setitem(modeling_calm_autoencoder.LOGITS_CHUNK_SIZE, "cpu", 2 * 4 * VOCAB_SIZE)
    assert torch.equal(model.decode_tokens(latents), expected)
    forbidden = torch.zeros(4, VOCAB_SIZE, dtype=torch.bool)
    forbidden[1, expected[0, 0, 1]] = True
    changed = model.decode_tokens(latents, forbidden)
    assert changed[0, 0, 1] != expected[0, 0, 1] and torch.equal(changed[..., 0], expected[..., 0])


@pytest.mark.transformers
def test_save_and_load_keeps_the_tie(tmp_path):
    model, ids, noise = autoencoder(), some_ids(), torch.zeros(2, 6, 16)
    model.save_pretrained(tmp_path)
    loaded = CALMAutoencoder.from_pretrained(tmp_path)
    assert loaded.decoder.lm_head.weight is loaded.encoder.embed_tokens.weight
    assert torch.equal(loaded(ids, noise=noise).logits, model(ids, noise=noise).logits)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"num_encoder_layers": 0}, "num_encoder_layers=0: must lie in"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"ae_dropout": 1.0}, "ae_dropout=1.0"),
        ({"token_dropout": -0.1}, "token_dropout=-0.1"),
        ({"latent_dropout": 1.0}, "latent_dropout=1.0"),
        ({"kl_clamp": -1}, "kl_clamp=-1"),
        ({"kl_weight": -1}, "kl_weight=-1"),
    ],
)
def test_config_refuses(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        CALMAutoencoderConfig(**fields)


def test_a_part_alone_gives_its_outputs_and_no_loss():
    model, ids = autoencoder().train(), some_ids()
    outputs = model(ids, output_logits=False)
    assert torch.equal(outputs.mean, model.encoder(ids)[0]) and outputs.logits is None  # uncorrupted, in training too
    latents = torch.randn(3, 16)
    assert torch.equal(model(latents=latents).logits, model.decoder(latents))
    for given, sentence in (
        ({"labels": ids, "latents": latents}, "it scores only what it encodes and decodes"),
        ({"labels": ids, "input_ids": ids, "output_logits": False}, "it scores only what it encodes and decodes"),
        ({}, "takes either input_ids, to encode and decode, or latents"),
        ({"input_ids": ids, "latents": latents}, "takes either input_ids, to encode and decode, or latents"),
        ({"input_ids": ids[:, :6]}, "6 tokens per row, not divisible by patch_size=4"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(**given)


def test_the_example_of_the_guide_prints_what_it_says(capsys):
    guide = (ROOT / "docs/guides/embed.md").read_text(encoding="utf-8")
    section = guide.split("## The autoencoder by itself")[1].split("\n## ")[0]
    example, printed = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)
    exec(example, {"MODEL": str(ROOT)})
    assert capsys.readouterr().out == printed


@pytest.mark.slow
@pytest.mark.transformers
def test_a_folder_of_its_own_loads_by_auto_model(tmp_path):
    model, ids = tiny_model().autoencoder, [[1, 5, 6, 7, 8, 9, 10, 11]]
    model.save_pretrained(tmp_path / "autoencoder")
    inputs = {"folder": str(tmp_path / "autoencoder"), "ids": ids}
    name, decoded = fresh_process.call(reconstruct_by_auto_model, tmp_path / "home", **inputs).result
    with torch.no_grad():
        expected = model.decode_tokens(model.encode(torch.tensor(ids))[0])
    assert name == "CALMAutoencoder" and decoded == expected.tolist()
    assert "auto_map" not in tiny_model().config.to_dict()["autoencoder_config"]
