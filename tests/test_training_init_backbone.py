"""A CALM begins with the backbone of a Llama whose tokenizer is the autoencoder's."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llama_workshop import NUM_KNOWN, make_llama, recipe_of, refusal
from safetensors.torch import load_file, save_file
from training_helpers import train, values
from transformers import LlamaForCausalLM, LlamaModel, MistralConfig

from calm_transformers.loading import load_tokenizer
from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.training.tokenizer import first_difference
from calm_transformers.training.train import config_and_notes, for_training, make_model

K = 4
SCALED = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMAS = {
    "grouped queries, tied, another base of RoPE": {
        **{"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 500.0}
    },
    "wide heads, biases": {
        **{"head_dim": 16, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2, "hidden_act": "gelu"}
    },
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}},
}


@pytest.fixture(scope="module")
def workshop(workshop_of_one_more_token):
    return workshop_of_one_more_token


@pytest.fixture(scope="module")
def theirs(workshop):
    return str(Path(workshop["tokenizer"]).with_name("theirs"))


@pytest.fixture(scope="module")
def llama(theirs, tmp_path_factory):
    return str(make_llama(tmp_path_factory.mktemp("llama"), theirs, num_key_value_heads=2))


def built(workshop, llama, **fields) -> CALMForCausalLM:
    torch.manual_seed(2)
    return make_model(recipe_of(workshop, init_backbone=str(llama), **fields), load_tokenizer(workshop["tokenizer"]))


# weights


@pytest.mark.parametrize("name", LLAMAS)
def test_the_backbone_computes_what_the_llama_does(name, workshop, theirs, tmp_path):
    folder = make_llama(tmp_path, theirs, **LLAMAS[name])
    before, model = LlamaForCausalLM.from_pretrained(folder).model.eval(), built(workshop, folder).eval()
    embeds = before.embed_tokens(torch.randint(NUM_KNOWN, (2, 80)))  # longer than the Llama's, for dynamic RoPE
    after = LlamaModel.forward(model.model, inputs_embeds=embeds).last_hidden_state
    assert torch.equal(after, before(inputs_embeds=embeds).last_hidden_state)
    with torch.no_grad():  # and it does after it was saved and loaded
        model.save_pretrained(tmp_path / "calm")
    again = CALMForCausalLM.from_pretrained(tmp_path / "calm").model.eval()
    assert torch.equal(LlamaModel.forward(again, inputs_embeds=embeds).last_hidden_state, after)


def test_embeddings_are_taken_and_new_tokens_get_their_mean(workshop, theirs, tmp_path):
    folder = make_llama(tmp_path, theirs, dtype=torch.bfloat16)
    known = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()
    model = built(workshop, folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    embeddings = model.model.embed_tokens.weight
    assert embeddings.shape == (NUM_KNOWN + 1, 32)
    assert torch.equal(embeddings[:NUM_KNOWN], known)
    assert torch.allclose(embeddings[NUM_KNOWN], known.mean(0), atol=1e-7)


def test_rows_that_no_token_has_are_left_behind(workshop, theirs, tmp_path):
    """As of Llamas whose vocabulary is filled up to a round number."""
    model = built(workshop, make_llama(tmp_path, theirs, vocab_size=320))
    known = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight, known[: NUM_KNOWN + 1])


WEIGHTS = {"last": [0, 0, 0, 1], "mean": [0.25] * 4, "mix": [1 / 15, 2 / 15, 4 / 15, 8 / 15]}


@pytest.mark.parametrize("how", WEIGHTS)
def test_a_patch_begins_as_the_mean_of_its_tokens(how, workshop, llama):
    model = built(workshop, llama, patch_embedding_init=how).model
    embeddings = model.embed_tokens.weight[:NUM_KNOWN]
    tokens = torch.randn(3, 2 * K, 32)
    mean = (tokens.unflatten(1, (2, K)) * torch.tensor(WEIGHTS[how])[:, None]).sum(2)
    centred = embeddings - embeddings.mean(-1, keepdim=True)
    expected = F.layer_norm(mean, (32,), eps=1e-6) * centred.square().mean().sqrt()
    assert torch.allclose(model.embed_patches(tokens), expected, atol=1e-6)


@pytest.mark.parametrize("where", ["multi-token loss", "token-chain head"])
@torch.no_grad()
def test_every_place_of_a_patch_begins_with_what_the_llama_expects_next(where, workshop, llama):
    fields = {"auxiliary_weight": 1.0} if where == "multi-token loss" else {"head_type": "token_chain"}
    recipe = recipe_of(workshop, init_backbone=llama, **fields)
    tokenizer = load_tokenizer(workshop["tokenizer"])
    model = make_model(recipe, tokenizer)
    chain = model.head.chain if where == "token-chain head" else for_training(model, recipe, tokenizer).auxiliary
    before = LlamaForCausalLM.from_pretrained(llama).eval()
    ids = torch.randint(NUM_KNOWN, (4, 40))
    expected = before(ids).logits.log_softmax(-1)
    logits = chain.logits(chain.states(before.model(ids).last_hidden_state))
    found = logits[..., :NUM_KNOWN].log_softmax(-1)
    divergence = F.kl_div(found, expected.unsqueeze(-2).expand_as(found), log_target=True, reduction="none").sum(-1)
    of_uniform = (expected.exp() * expected).sum(-1) + math.log(NUM_KNOWN)
    assert divergence.mean() < 0.1 * of_uniform.mean()
    embeddings = [before.model.embed_tokens] * (K - 1)
    for matrix, theirs in zip((chain.lm_head, *chain.embeddings), (before.lm_head, *embeddings), strict=True):
        assert torch.equal(matrix.weight[:NUM_KNOWN], theirs.weight)
        assert torch.allclose(matrix.weight[NUM_KNOWN], theirs.weight.mean(0), atol=1e-6)


# the command


def test_a_training_begins_with_a_llama_and_resumes_without_its_weights(workshop, theirs, tmp_path, capsys):
    folder = make_llama(tmp_path / "llama", theirs, num_key_value_heads=2)
    fields = {**workshop, "init_backbone": str(folder), "eval_strategy": "no", "save_steps": 2, "warmup_steps": 0}
    fields |= {"lr_scheduler_type": "constant", "auxiliary_weight": 1.0}
    assert train("calm", **fields, max_steps=4, output_dir=str(tmp_path / "whole")) == 0
    assert (
        "num_hidden_layers 2, hidden_size 32, intermediate_size 40, num_attention_heads 4, num_key_value_heads 2, "
        f"head_dim 8, max_position_embeddings 64: of the Llama {folder}; 1 more tokens begin with the mean embedding"
    ) in capsys.readouterr().out

    assert train("calm", **fields, max_steps=2, output_dir=str(tmp_path / "parts")) == 0
    (folder / "model.safetensors").unlink()
    assert train("calm", **fields, max_steps=4, output_dir=str(tmp_path / "parts")) == 0
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)

    # The run's own recipe begins it again.
    again = {"recipe": str(tmp_path / "whole" / "recipe.yaml"), "dry_run": []}
    assert train("calm", **again) == 0


def test_a_dry_run_has_the_configuration_of_the_run(workshop, theirs, tmp_path):
    folder = make_llama(tmp_path / "llama", theirs, **LLAMAS["llama3"])
    fields = {**workshop, "init_backbone": str(folder), "eval_strategy": "no", "max_steps": 1}
    assert train("calm", **fields, output_dir=str(tmp_path / "run")) == 0
    config, notes = config_and_notes(recipe_of(workshop, init_backbone=str(folder)))
    assert values(config) == values(CALMConfig.from_pretrained(tmp_path / "run"))
    assert len(notes) == 1 and "hidden_size 32, intermediate_size 40" in notes[0]


def test_what_contradicts_the_llama_is_refused(workshop, llama, tmp_path, capsys):
    fields = {**workshop, "init_backbone": llama, "output_dir": str(tmp_path / "run")}
    assert refusal(capsys, **fields, hidden_size=64) == (
        f"hidden_size=64: init_backbone {llama} has 32, which cannot be changed."
    )
    assert "rope_theta=500.0: " in refusal(capsys, **fields, rope_theta=500.0)
    assert "it needs train calm, and no init_from" in refusal(capsys, **fields, init_from=llama)
    assert "init_backbone runs/nowhere: no such folder" in refusal(
        capsys, **fields | {"init_backbone": "runs/nowhere"}
    )
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    data = {key: workshop[key] for key in ("train_files", "cache_dir", "tokenizer")}
    assert train("ar", **data, init_backbone=llama, output_dir=str(tmp_path / "run")) == 2
    assert "it needs train calm, and no init_from" in capsys.readouterr().err
    same = {"hidden_size": 32, "rope_theta": 10000.0, "num_key_value_heads": 2}
    assert train("calm", **fields, **same, dry_run=[]) == 0


def test_another_family_and_what_is_not_whole_are_refused(workshop, theirs, llama, tmp_path, capsys):
    fields = {**workshop, "output_dir": str(tmp_path / "run")}
    MistralConfig(hidden_size=32).save_pretrained(tmp_path / "mistral")
    for field in ("init_backbone", "distil"):
        assert refusal(capsys, **fields, auxiliary_weight=1.0, **{field: str(tmp_path / "mistral")}) == (
            f"{field} {tmp_path / 'mistral'}: is a model of type 'mistral', not 'llama'."
        )
    assert "is a model of type 'calm_autoencoder'" in refusal(capsys, **fields, init_backbone=fields["autoencoder"])

    broken = Path(shutil.copytree(llama, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    changes = {
        "misses model.norm.weight": {key: value for key, value in weights.items() if key != "model.norm.weight"},
        "has no place for model.layers.0.self_attn.q_proj.bias": weights
        | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
    }
    for message, changed in changes.items():
        save_file(changed, broken / "model.safetensors", {"format": "pt"})
        assert message in refusal(capsys, **fields, init_backbone=str(broken))
    (broken / "model.safetensors").unlink()
    assert "its weights cannot be read: " in refusal(capsys, **fields, init_backbone=str(broken))
    config = json.loads((broken / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (broken / "config.json").write_text(json.dumps(config))
    assert "its weights are quantised" in refusal(capsys, **fields, init_backbone=str(broken))


# tokenizers


def with_tokens(tokenizer: str, folder: Path, changed: dict[str, str]) -> str:
    """A copy of a folder whose tokenizer calls some tokens otherwise."""
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("tokens"))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {changed.get(token, token): token_id for token, token_id in vocabulary.items()}
    for token in content["added_tokens"]:
        token["content"] = changed.get(token["content"], token["content"])
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("field", ["init_backbone", "distil"])
def test_a_tokenizer_that_differs_is_refused_naming_the_token(field, workshop, theirs, llama, tmp_path, capsys):
    tokens = load_tokenizer(theirs).convert_ids_to_tokens(range(NUM_KNOWN))
    swapped = with_tokens(llama, tmp_path / "other", {tokens[290]: tokens[295], tokens[295]: tokens[290]})
    fields = {**workshop, "auxiliary_weight": 0.5, "output_dir": str(tmp_path / "run")}
    assert refusal(capsys, **fields, **{field: swapped}) == (
        f"{field} {swapped}: token 290 is {tokens[295]!r} in its tokenizer and {tokens[290]!r} in the autoencoder's, "
        "so that the two read text differently."
    )


def test_special_tokens_that_no_text_has_may_differ_but_no_others(workshop, theirs, tmp_path):
    ours = load_tokenizer(workshop["tokenizer"])
    plain = load_tokenizer(theirs)
    assert first_difference(plain, ours, NUM_KNOWN) is None
    # The other way round the Llama has a token that the autoencoder lacks.
    assert first_difference(ours, plain, NUM_KNOWN + 1) == (NUM_KNOWN, "<|one more|>", None)
    assert first_difference(ours, plain, NUM_KNOWN) is None  # and no embedding of it
    reserved = load_tokenizer(with_tokens(theirs, tmp_path / "reserved", {"<|filler|>": "<|reserved|>"}))
    assert reserved.convert_ids_to_tokens(0) == "<|reserved|>"
    assert first_difference(reserved, ours, NUM_KNOWN) is None
    end = load_tokenizer(theirs)
    end.eos_token = "<|filler|>"
    assert first_difference(end, ours, NUM_KNOWN) is None
    changed = load_tokenizer(with_tokens(theirs, tmp_path / "end", {"<|filler|>": "<|end|>"}))
    changed.eos_token = "<|end|>"
    assert first_difference(changed, ours, NUM_KNOWN) == (0, "<|end|>", "<|filler|>")
    shorter = load_tokenizer(theirs)
    assert first_difference(shorter, ours, 290)[:2] == (290, None)


def test_without_a_tokenizer_the_numbers_of_tokens_are_compared(workshop, tmp_path, capsys):
    built(workshop, make_llama(tmp_path / "small", tokenizer=None))
    assert (
        f"init_backbone {tmp_path / 'small'}: no tokenizer can be read there, so only the numbers of tokens were "
        "compared, 300 and the autoencoder's 301"
    ) in capsys.readouterr().out
    large = str(make_llama(tmp_path / "large", tokenizer=None, vocab_size=302))
    assert refusal(capsys, **workshop, init_backbone=large, output_dir=str(tmp_path / "run")) == (
        f"init_backbone {large}: knows 302 tokens, the autoencoder 301."
    )
