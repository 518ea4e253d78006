"""The language model: every K and head, attention backends, cache, padding, loss, frozen parts, invalid inputs."""

import json

import pytest
import torch
from text_and_loss import some_ids
from tiny import HEAD_TYPES, PAD, VOCAB_SIZE, seeded, tiny_config, tiny_model
from transformers import DynamicCache

from calm_transformers.model import heads_calm
from calm_transformers.model.configuration_calm import AUTOENCODER_AUTO_MAP, CALMConfig
from calm_transformers.model.heads_calm import PatchTarget
from calm_transformers.model.modeling_calm import CALMForCausalLM, CALMModel

pytestmark = pytest.mark.transformers


@pytest.mark.parametrize(
    "head_type, patch_size, overrides",
    [*((head, 4, {}) for head in HEAD_TYPES), ("energy", 1, {}), ("token_chain", 8, {"num_key_value_heads": 2})],
)
def test_every_head_and_patch_size_trains(head_type, patch_size, overrides):
    model, ids = tiny_model(head_type, patch_size, **overrides).train(), some_ids()
    output = model(ids, labels=ids)
    assert output.last_hidden_state.shape == (2, 24 // patch_size, 48)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("autoencoder."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    size = patch_size if model.head.samples_tokens else 16
    assert model.head.sample(output.last_hidden_state, num_samples=3).shape == (3, 2, 24 // patch_size, size)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@torch.no_grad()
def test_attention_backends_agree_with_eager(attention):
    """Flex attention uncompiled, for its compilation takes most of a minute."""
    mask, states = torch.ones(2, 24, dtype=torch.long), []
    mask[0, :8] = 0
    for implementation in ("eager", attention):
        model = tiny_model(attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        with torch.compiler.set_stance("force_eager"):
            states.append(model(some_ids(), attention_mask=mask).last_hidden_state[mask[:, ::4].bool()])
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_cache_equals_no_cache(name):
    model, ids = tiny_model(), some_ids()
    whole = model(ids).last_hidden_state
    first = model(ids[:, :16], use_cache=True)
    cache, parts = getattr(first, name), [first.last_hidden_state]
    assert first[name] is cache
    for start in (16, 20):
        output = model(ids[:, start : start + 4], **{name: cache}, use_cache=True)
        parts.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_left_padding_equals_no_padding():
    model, ids = tiny_model(), some_ids(1, 16)
    padded = torch.cat([torch.full((1, 8), PAD), ids], dim=1)
    by_token = torch.cat([torch.zeros(1, 8), torch.ones(1, 16)], dim=1).long()
    expected = model(ids).last_hidden_state
    for mask in (by_token, by_token[:, ::4]):
        hidden = model(padded, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(hidden[:, 2:], expected, atol=1e-5, rtol=1e-4)
    first = model(padded[:, :16], attention_mask=by_token[:, :16], use_cache=True)
    later = model(padded[:, 16:], attention_mask=by_token, past_key_values=first.past_key_values)
    torch.testing.assert_close(later.last_hidden_state, expected[:, 2:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_patch_sees_no_later_patch():
    model, ids = tiny_model(), some_ids(1)
    changed = ids.clone()
    changed[0, 13] = 3 if ids[0, 13] != 3 else 4
    difference = (model(changed).last_hidden_state - model(ids).last_hidden_state).abs().sum(-1)[0]
    assert (difference[:3] == 0).all() and (difference[3:] > 0).all()


@pytest.mark.parametrize("head_type", ["energy", "flow", "diffusion"])  # whose loss samples the posterior
@torch.no_grad()
def test_loss_counts_whole_later_patches(head_type):
    """Targets are the patches after the first without a masked label; their ids come from the labels."""
    model, ids = tiny_model(head_type), some_ids()
    labels = ids.clone()
    labels[0, :9] = -100  # patch 2 of row 0 lacks a label
    hidden = model(ids).last_hidden_state
    posterior = tuple(x[:, 1:].flatten(0, 1) for x in model.autoencoder.encode(labels.clamp(min=0)))
    losses = model.head.loss(hidden[:, :-1].flatten(0, 1), PatchTarget(posterior=posterior), generator=seeded())
    expected = torch.cat([losses[2:5], losses[5:]])
    loss = model(ids, labels=labels, generator=seeded()).loss
    torch.testing.assert_close(loss, expected.mean())
    items = model(ids, labels=labels, generator=seeded(), num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(items, expected.sum() * 4 / 100)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_loss_without_targets_is_zero_and_differentiable(head_type):
    loss = tiny_model(head_type).train()(some_ids(1, 4), labels=some_ids(1, 4)).loss
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_many_samples_pass_the_head_in_chunks(monkeypatch, head_type):
    head, context = tiny_model(head_type).head, torch.randn(2, 48)
    samples = [head.sample(context, num_samples=24, generator=seeded())]
    monkeypatch.setitem(heads_calm.SAMPLES_CHUNK_SIZE, "cpu", 10)
    samples.append(head.sample(context, num_samples=24, generator=seeded()))
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_times_of_the_flow_loss_are_those_of_the_config():
    """Uniform as published; with a logit mean of −1, their logits are Normal(−1, 1)."""
    times, ids = [], some_ids(200)
    for settings in ({}, {"flow_time_logit_mean": -1.0}):
        model = tiny_model("flow", **settings)
        model.head.net.register_forward_pre_hook(lambda net, args: times.append((args[1].flatten() + 0.5) / 1000))
        model(ids, labels=ids, generator=seeded())
    assert times[0].mean() == pytest.approx(0.5, abs=0.02) and times[0].var() == pytest.approx(1 / 12, abs=0.005)
    logits = times[1].logit()
    assert logits.mean() == pytest.approx(-1, abs=0.06) and logits.std() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
@torch.no_grad()
def test_context_layers_change_the_hidden_state(head_type):
    assert not list(tiny_model(head_type).head.context_layers.parameters())  # published: none
    head, context = tiny_model(head_type, num_context_layers=2).head, torch.randn(3, 48)
    samples, layers = head.sample(context, num_samples=5, generator=seeded()), head.context_layers
    head.context_layers = torch.nn.Sequential()
    assert torch.equal(samples, head.sample(layers(context), num_samples=5, generator=seeded()))
    assert not torch.allclose(samples, head.sample(context, num_samples=5, generator=seeded()))


def test_fresh_heads_start_at_zero():
    """The published heads start with a zero last layer: before training, all samples are the same."""
    torch.manual_seed(0)
    for head_type in set(HEAD_TYPES) - {"token_chain"}:  # every head with a net
        head = CALMForCausalLM(tiny_config(head_type)).head
        zero = [name for name, p in head.named_parameters() if name.endswith("weight") and (p == 0).all()]
        assert any("out_proj" in name for name in zero)
    assert (CALMForCausalLM(tiny_config("energy")).head.sample(torch.randn(2, 48)) == 0).all()


def frozen(model):
    modules, parameters = model.autoencoder.modules(), model.autoencoder.parameters()
    return not any(m.training for m in modules) and not any(p.requires_grad for p in parameters)


def test_autoencoder_stays_frozen(tmp_path):
    model = tiny_model()
    assert frozen(model) and frozen(model.train()) and model.model.training
    assert frozen(model.to(torch.float64).train())
    model.to(torch.float32).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = CALMForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert frozen(loaded) and frozen(loaded.train()) and loaded.head.out_proj.weight.requires_grad


def test_one_file_holds_everything(tmp_path):
    model = tiny_model("token_chain")
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded, info = CALMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, saved), (_, got) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(saved, got), name
    backbone = CALMModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(some_ids()).last_hidden_state, model(some_ids()).last_hidden_state)


def test_config_survives_a_save(tmp_path):
    config = tiny_config("flow", 8, rope_theta=5e5, prompt_filler_token_id=7, num_key_value_heads=2)
    config.save_pretrained(tmp_path)
    loaded = CALMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.autoencoder_config.patch_size == 8
    nested = config.to_dict()["autoencoder_config"]
    code = {"auto_map": AUTOENCODER_AUTO_MAP}  # of a folder of its own
    assert nested | code == config.autoencoder_config.to_dict() and nested["ae_dropout"] == 0.15
    saved = json.loads((tmp_path / "config.json").read_text())["autoencoder_config"]
    assert saved | code == json.loads(json.dumps(config.autoencoder_config.to_diff_dict())) != saved
    assert loaded.rope_parameters["rope_theta"] == 5e5
    assert CALMConfig().autoencoder_config.vocab_size == CALMConfig().vocab_size == 128257


def test_invalid_configs_raise_an_error():
    for fields, message in (
        ({"num_samples": 1}, "num_samples=1: the pairwise term needs at least 2 samples"),
        ({"beta": 2.0}, r"beta=2.0: must lie in \(0, 2\)"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"head_type": "gan"}, "head_type='gan': must be one of"),
        ({"patch_size": 8, "autoencoder_config": {"patch_size": 4}}, "patch_size=8, but the autoencoder's is 4"),
        ({"latent_size": 8, "autoencoder_config": {"latent_size": 16}}, "latent_size=8, but the autoencoder's is 16"),
        ({"vocab_size": 90}, "vocab_size=90, but the autoencoder's is 96"),
        ({"prompt_filler_token_id": VOCAB_SIZE}, "prompt_filler_token_id=96"),
        ({"num_mlp_layers": 0}, "num_mlp_layers=0"),
        ({"num_context_layers": -1}, "num_context_layers=-1"),
        ({"sampling_steps": 0}, "sampling_steps=0"),
        ({"sampling_steps": 1001, "head_type": "diffusion"}, "sampling_steps=1001: the diffusion head has 1000"),
    ):
        autoencoder = {"vocab_size": 96, "latent_size": 16, "patch_size": fields.get("patch_size", 4)}
        autoencoder |= fields.pop("autoencoder_config", {})
        with pytest.raises(ValueError, match=message):
            CALMConfig(**{"vocab_size": 96, "latent_size": 16, "autoencoder_config": autoencoder, **fields})


def test_fields_overridden_on_loading_are_checked(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for changed, message in (({"beta": 2.5}, "beta=2.5"), ({"head_type": "gan"}, "head_type='gan'")):
        with pytest.raises(ValueError, match=message):
            CALMForCausalLM.from_pretrained(tmp_path, **changed)


@pytest.mark.slow
@pytest.mark.parametrize("head_type", ["energy", "flow"])
def test_compiled_loss_with_a_varying_number_of_targets(head_type):
    """Dynamo traces sampling at symbolic sizes. The eager backend skips the code generation, which takes minutes."""
    head = tiny_model(head_type).head
    compiled = torch.compile(head.loss, backend="eager", dynamic=True)
    for patches in (10, 6):
        context = torch.randn(patches, 48)
        target = PatchTarget(posterior=(torch.randn(patches, 16), torch.zeros(patches, 16)))
        losses = []
        for loss in (compiled, head.loss):
            torch.manual_seed(0)
            losses.append(loss(context, target))
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_missing_logits_raise_an_explanation():
    output = tiny_model()(some_ids())
    assert not hasattr(output, "logits") and "logits" not in output
    with pytest.raises(AttributeError, match="no token probabilities.*BrierLM.*generate_until"):
        output.logits  # noqa: B018
    with pytest.raises(KeyError, match="no token probabilities"):
        output["logits"]
    assert output["last_hidden_state"] is output[0]


@pytest.mark.parametrize("head_type", ["energy", "token_chain"])
def test_ids_of_any_integer_type_embeddings_and_tuple_outputs(head_type):
    model, ids = tiny_model(head_type), some_ids()
    expected = model(ids, labels=ids, generator=seeded())
    short = ids.int()
    embeds = model.get_input_embeddings()(ids)
    for inputs in ({"input_ids": short, "labels": short}, {"inputs_embeds": embeds, "labels": ids}):
        loss, hidden, *_ = model(**inputs, generator=seeded(), return_dict=False)
        assert torch.equal(loss, expected.loss) and torch.equal(hidden, expected.last_hidden_state)


INVALID = [  # inputs, message, whether the backbone raises it, too
    ({"labels": some_ids()[:, :20]}, "labels have length 20, but the input has 24 tokens", False),
    ({"input_ids": None}, "exactly one of input_ids or inputs_embeds", True),
    ({"input_ids": some_ids()[:, :7]}, "7 tokens per row, not divisible by patch_size=4.*pad_to_multiple_of=4", True),
    *(({"input_ids": bad}, "the model takes integers of", True) for bad in (some_ids().float(), some_ids()[0])),
    ({"attention_mask": torch.ones(2, 5)}, "attention_mask has length 5: it must count 6 patches or 24 tokens", True),
    ({"position_ids": torch.arange(24)[None]}, "positions count patches: 6", True),
    ({"cache": DynamicCache(), "past_key_values": DynamicCache()}, "pass one of them", True),
]


@pytest.mark.parametrize("inputs, message, is_of_backbone", INVALID, ids=[message for _, message, _ in INVALID])
def test_invalid_inputs_of_forward_raise_an_error(inputs, message, is_of_backbone):
    model = tiny_model()
    for module in (model, model.model)[: 1 + is_of_backbone]:
        with pytest.raises(ValueError, match=message):
            module(**{"input_ids": some_ids(), **inputs})


def test_other_invalid_inputs_raise_an_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="autoencoder got 7 tokens.*pad_to_multiple_of=4"):
        model.autoencoder(some_ids()[:, :7])
    for module in (model, model.model):
        for other in ({"new_num_tokens": 100}, {"pad_to_multiple_of": 64}):
            with pytest.raises(ValueError, match="the vocabulary is the frozen autoencoder's"):
                module.resize_token_embeddings(**other)
        for same in ({}, {"new_num_tokens": VOCAB_SIZE}, {"pad_to_multiple_of": 8}):
            assert module.resize_token_embeddings(**same) is module.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is None
