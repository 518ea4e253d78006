"""The backbone of a CALM is initialised from a Llama whose tokenizer is the autoencoder's."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llama_workshop import NUM_KNOWN, make_llama, recipe_of, refusal
from safetensors.torch import load_file, save_file
from training_helpers import changed_weights, train, values
from transformers import LlamaForCausalLM, LlamaModel

from calm_transformers.loading import load_tokenizer
from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.training.recipe import load_recipe
from calm_transformers.training.tokenizer import first_difference
from calm_transformers.training.train import build_model, config_with_notes, wrap_for_training

K = 4
SCALED = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMAS = {
    "grouped": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 500.0},
    "wide heads": dict(head_dim=16, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-2, hidden_act="gelu"),
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}},
}


@pytest.fixture(scope="module")
def workshop(workshop_of_one_more_token):
    return workshop_of_one_more_token


def build(workshop, llama, **fields) -> CALMForCausalLM:
    torch.manual_seed(2)
    return build_model(recipe_of(workshop, init_backbone=str(llama), **fields), load_tokenizer(workshop["tokenizer"]))


@pytest.mark.parametrize("name", LLAMAS)
def test_the_backbone_computes_what_the_llama_does(name, workshop, llama, tmp_path):
    folder = make_llama(tmp_path, llama, **LLAMAS[name])
    before, model = LlamaForCausalLM.from_pretrained(folder).model.eval(), build(workshop, folder).eval()
    embeds = before.embed_tokens(torch.randint(NUM_KNOWN, (2, 80)))  # longer than the Llama's, for dynamic RoPE
    after = LlamaModel.forward(model.model, inputs_embeds=embeds).last_hidden_state
    assert torch.equal(after, before(inputs_embeds=embeds).last_hidden_state)
    with torch.no_grad():  # and it does after it was saved and loaded
        model.save_pretrained(tmp_path / "calm")
    again = CALMForCausalLM.from_pretrained(tmp_path / "calm").model.eval()
    assert torch.equal(LlamaModel.forward(again, inputs_embeds=embeds).last_hidden_state, after)


@pytest.mark.parametrize("vocab_size", [NUM_KNOWN, 320])  # padded with rows that no token has
def test_embeddings_are_copied_and_new_tokens_get_their_mean(vocab_size, workshop, llama, tmp_path):
    folder = make_llama(tmp_path, llama, dtype=torch.bfloat16, vocab_size=vocab_size)
    known = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()
    model = build(workshop, folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    embeddings, new = model.model.embed_tokens.weight, known.mean(0) if vocab_size == NUM_KNOWN else known[NUM_KNOWN]
    assert embeddings.shape == (NUM_KNOWN + 1, 32) and torch.equal(embeddings[:NUM_KNOWN], known[:NUM_KNOWN])
    assert torch.allclose(embeddings[NUM_KNOWN], new, atol=1e-7)


WEIGHTS = {"last": [0, 0, 0, 1], "mean": [0.25] * 4, "mix": [1 / 15, 2 / 15, 4 / 15, 8 / 15]}


@pytest.mark.parametrize("how", WEIGHTS)
def test_the_initial_patch_embedding_is_a_mean_of_its_tokens(how, workshop, llama):
    model = build(workshop, llama, patch_embedding_init=how).model
    embeddings = model.embed_tokens.weight[:NUM_KNOWN]
    tokens = torch.randn(3, 2 * K, 32)
    mean = (tokens.unflatten(1, (2, K)) * torch.tensor(WEIGHTS[how])[:, None]).sum(2)
    centred = embeddings - embeddings.mean(-1, keepdim=True)
    expected = F.layer_norm(mean, (32,), eps=1e-6) * centred.square().mean().sqrt()
    assert torch.allclose(model.embed_patches(tokens), expected, atol=1e-6)


@pytest.mark.parametrize("where", ["MTP loss", "token-chain head"])
@torch.no_grad()
def test_every_position_of_a_patch_initially_predicts_the_llamas_next_token(where, workshop, llama):
    fields = {"auxiliary_weight": 1.0} if where == "MTP loss" else {"head_type": "token_chain"}
    recipe = recipe_of(workshop, init_backbone=llama, **fields)
    tokenizer = load_tokenizer(workshop["tokenizer"])
    model = build_model(recipe, tokenizer)
    chain = model.head.chain if where == "token-chain head" else wrap_for_training(model, recipe).auxiliary
    before = LlamaForCausalLM.from_pretrained(llama).eval()
    ids = torch.randint(NUM_KNOWN, (4, 40))
    expected = before(ids).logits.log_softmax(-1)
    states = chain.context_proj(before.model(ids).last_hidden_state).unflatten(-1, (K, -1))
    logits = chain.logits(states)
    found = logits[..., :NUM_KNOWN].log_softmax(-1)
    divergence = F.kl_div(found, expected.unsqueeze(-2).expand_as(found), log_target=True, reduction="none").sum(-1)
    of_uniform = (expected.exp() * expected).sum(-1) + math.log(NUM_KNOWN)
    assert divergence.mean() < 0.1 * of_uniform.mean()
    embeddings = [before.model.embed_tokens] * (K - 1)
    for matrix, source in zip((chain.lm_head, *chain.embeddings), (before.lm_head, *embeddings), strict=True):
        assert torch.equal(matrix.weight[:NUM_KNOWN], source.weight)
        assert torch.allclose(matrix.weight[NUM_KNOWN], source.weight.mean(0), atol=1e-6)


def test_a_training_starts_from_a_llama_and_resumes_without_its_weights(workshop, llama, tmp_path, capsys):
    folder = make_llama(tmp_path / "llama", llama, **LLAMAS["llama3"])
    fields = {**workshop, "init_backbone": str(folder), "eval_strategy": "no", "save_steps": 2, "warmup_steps": 0}
    fields |= {"lr_scheduler_type": "constant", "auxiliary_weight": 1.0}
    assert train("calm", **fields, max_steps=4, output_dir=str(tmp_path / "whole")) == 0
    sizes = (
        "num_hidden_layers 2, hidden_size 32, intermediate_size 40, num_attention_heads 4, num_key_value_heads 4, "
        f"head_dim 8, max_position_embeddings 64: from the Llama {folder}"
    )
    assert f"{sizes}; 1 new tokens get the mean embedding\n" in capsys.readouterr().out

    assert train("calm", **fields, max_steps=2, output_dir=str(tmp_path / "parts")) == 0
    (folder / "model.safetensors").unlink()
    assert train("calm", **fields, max_steps=4, output_dir=str(tmp_path / "parts")) == 0
    assert not changed_weights(tmp_path / "whole", tmp_path / "parts")

    # The saved recipe gives the same configuration in a dry run.
    config, notes = config_with_notes(load_recipe(str(tmp_path / "whole" / "recipe.yaml")))
    assert values(config) == values(CALMConfig.from_pretrained(tmp_path / "whole")) and notes == [sizes]


def test_fields_that_contradict_the_llama_raise(workshop, llama, tmp_path, capsys):
    own, autoencoder = {**workshop, "init_backbone": llama, "output_dir": str(tmp_path)}, workshop["autoencoder"]
    assert train("calm", **own, hidden_size=32, rope_theta=10000.0, num_key_value_heads=2, dry_run=[]) == 0
    for fields, message in [
        ({"hidden_size": 64}, f"hidden_size=64: init_backbone {llama} has 32, which cannot be changed."),
        ({"rope_theta": 500.0}, f"rope_theta=500.0: init_backbone {llama} has 10000.0, which cannot be changed."),
        ({"init_backbone": "runs/no"}, "init_backbone runs/no: no such folder (train ar makes one)."),
    ]:
        assert refusal(capsys, **own | fields) == message
    error = refusal(capsys, **own | {"init_backbone": autoencoder})
    assert error == f"init_backbone {autoencoder}: is a model of type 'calm_autoencoder', not 'llama'."
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_llama_raises(workshop, llama, tmp_path, capsys):
    fields = {**workshop, "output_dir": str(tmp_path / "run")}
    broken = Path(shutil.copytree(llama, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    changes = {
        "missing model.norm.weight": {key: value for key, value in weights.items() if key != "model.norm.weight"},
        "unexpected model.layers.9.bias": weights | {"model.layers.9.bias": torch.zeros(32)},
    }
    for message, changed in changes.items():
        save_file(changed, broken / "model.safetensors", {"format": "pt"})
        assert message in refusal(capsys, **fields, init_backbone=str(broken))
    (broken / "model.safetensors").unlink()
    assert "its weights cannot be read: " in refusal(capsys, **fields, init_backbone=str(broken))
    config = json.loads((broken / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (broken / "config.json").write_text(json.dumps(config))
    assert "its weights are quantised" in refusal(capsys, **fields, init_backbone=str(broken))


def with_tokens(tokenizer: str, folder: Path, changed: dict[str, str]) -> str:
    """Copies a folder and renames some tokens of its tokenizer."""
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("tokens"))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {changed.get(token, token): token_id for token, token_id in vocabulary.items()}
    for token in content["added_tokens"]:
        token["content"] = changed.get(token["content"], token["content"])
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_the_error_of_a_different_tokenizer_names_the_token(workshop, llama, tmp_path, capsys):
    one, other = load_tokenizer(llama).convert_ids_to_tokens([290, 295])
    swapped = with_tokens(llama, tmp_path / "other", {one: other, other: one})
    fields = {**workshop, "auxiliary_weight": 0.5, "output_dir": str(tmp_path / "run"), "init_backbone": swapped}
    difference = f"token 290 is {other!r}, in the autoencoder's tokenizer {one!r}"
    assert refusal(capsys, **fields) == f"init_backbone {swapped}: the tokenizers differ: {difference}."


def test_only_special_tokens_that_no_text_has_may_differ(workshop, llama, tmp_path):
    def changed(filler, eos_token="<|eos|>"):
        tokenizer = load_tokenizer(with_tokens(llama, tmp_path / filler / eos_token, {"<|filler|>": filler}))
        tokenizer.eos_token = eos_token
        return tokenizer

    ours, plain = load_tokenizer(workshop["tokenizer"]), load_tokenizer(llama)
    for pretrained, own, vocab_size, difference in [
        (plain, ours, NUM_KNOWN, None),
        # The Llama must not have a token that the autoencoder lacks, unless it has no embedding for it.
        (ours, plain, NUM_KNOWN + 1, (NUM_KNOWN, "<|one more|>", None)),
        (ours, plain, NUM_KNOWN, None),
        (changed("<|reserved|>"), ours, NUM_KNOWN, None),
        (changed("<|filler|>", eos_token="<|filler|>"), ours, NUM_KNOWN, None),
        (changed("<|end|>", eos_token="<|end|>"), ours, NUM_KNOWN, (0, "<|end|>", "<|filler|>")),
        (plain, ours, 290, (290, None, plain.convert_ids_to_tokens(290))),
    ]:
        assert first_difference(pretrained, own, vocab_size) == difference


def test_without_a_tokenizer_the_vocabulary_sizes_are_compared(workshop, tmp_path, capsys):
    small, large = (make_llama(tmp_path / str(size), tokenizer=None, vocab_size=size) for size in (300, 302))
    build(workshop, small)
    note = "no tokenizer found, only the sizes were compared: it has a vocabulary of 300 tokens, the autoencoder's has"
    assert f"init_backbone {small}: {note} 301" in capsys.readouterr().out
    error = refusal(capsys, **workshop, init_backbone=str(large), output_dir=str(tmp_path / "run"))
    assert error == f"init_backbone {large}: has a vocabulary of 302 tokens, the autoencoder's has 301."
