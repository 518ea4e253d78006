"""Recipes: loading by name or file, bases, overrides, errors, and the estimated cost."""

import dataclasses
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from commands import refusal
from training_helpers import train

from calm_transformers.command_line import InputError
from calm_transformers.model.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder
from calm_transformers.training import recipe as recipes
from calm_transformers.training.cost import autoencoder_cost, calm_cost, recipe_cost
from calm_transformers.training.recipe import CONFIGS, KINDS, load_recipe
from calm_transformers.training.train import main, make_config

NAMES = sorted(set(recipes.recipe_names()) - {"small"}) + [f"small of kind {kind}" for kind in KINDS if kind != "ar"]
RESOLVED = json.loads((Path(__file__).parent / "fixtures" / "resolved_recipes.json").read_text())


def load_named(name: str, fields: dict | None = None):
    name, _, kind = name.partition(" of kind ")
    return load_recipe(name, {**(fields or {}), **({"kind": kind} if kind else {})})


@pytest.mark.parametrize("name", NAMES)
def test_the_resolved_recipe_is_as_recorded_and_valid(name, tmp_path, monkeypatch):
    """The record is from before recipes had bases."""
    assert dataclasses.asdict(load_named(name)) == {**RESOLVED[name], "run_facts": {}}
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # as Trainer's arguments would
    fields = {"output_dir": str(tmp_path), "bf16": False, "fsdp": True, "fsdp_config": {"fsdp_version": 2}}
    recipe = load_named(name, fields)
    if recipe.kind != "tokenizer":
        config = make_config(CONFIGS[recipe.kind], recipe.model)
        assert all(getattr(config, key) == value for key, value in recipe.model.items())
        assert recipes.training_arguments(recipe).learning_rate == recipe.training["learning_rate"]
        assert recipe.training["fsdp_config"] == {"fsdp_version": 2}  # which Trainer's arguments rewrite


def test_fields_that_contradict_each_other_raise():
    for fields, message in (
        ({"head_weight": 0.0}, "head_weight=0.0 has no effect without auxiliary_weight"),
        ({"auxiliary_targets": -2, "auxiliary_weight": 0.1}, "auxiliary_targets=-2: must not be negative"),
        ({"lora_rank": 2, "init_from": "a/calm", "auxiliary_weight": 0.1}, "lora_rank needs init_from, and neither"),
        ({"patch_embedding_init": "first"}, "patch_embedding_init='first': must be one of last, mix, mean"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            recipes.check_fields(load_recipe("calm-m", fields))


def test_a_missing_value_or_one_of_another_type_raises(capsys):
    for words, message in (
        ("--train_files", "train_files=True: must be a list of strings"),
        ("--block_size long", "block_size='long': must be an integer"),
        ("--append_eos no", "append_eos='no': must be a boolean"),
        ("--learning_rate", "learning_rate needs a value"),
        ("--learning_rate high", "learning_rate='high': must be a number"),
        ("--max_steps .inf", "max_steps=inf: must be a finite number"),
        ("--lr_scheduler_kwargs 3", "lr_scheduler_kwargs=3: must have fields"),
        ("--hidden_act nonsense", "hidden_act='nonsense': must be one of gelu, "),
    ):
        assert refusal(capsys, main, "calm", "--recipe", "calm-m", "--dry_run", *words.split()).startswith(message)


def test_the_command_line_is_read_as_yaml_and_integers_may_be_powers_of_ten():
    words = "--learning_rate 3e-4 --max_steps=1e4 --bf16 --eval_strategy no --train_files a b --beta 1.0 --seed -1"
    fields = {"learning_rate": 3e-4, "max_steps": 1e4, "bf16": True, "eval_strategy": "no", "train_files": ["a", "b"]}
    assert recipes.parse_command_line(words.split()) == fields | {"beta": 1.0, "seed": -1}
    recipe = load_recipe("calm-m", fields | {"num_hidden_layers": 1e1})
    assert (recipe.training["max_steps"], recipe.model["num_hidden_layers"]) == (10_000, 10)
    assert type(recipe.training["max_steps"]) is type(recipe.model["num_hidden_layers"]) is int
    with pytest.raises(InputError, match="unexpected 'calm-m'"):
        recipes.parse_command_line(["calm-m"])


def test_an_invalid_recipe_file_raises(tmp_path):
    for content, message in (
        ("kind: calm\nmodel: {hiden_size: 4}", "'hiden_size' in section model: did you mean hidden_size?"),
        ("kind: calm\nlearning_rate: 1", "unknown field 'learning_rate'"),
        ("kind: ar\ninit_backbone: a/llama", "it needs train calm, and no init_from."),
        ("kind: calm\ninit_backbone: a/llama\ninit_from: a/calm", "it needs train calm, and no init_from."),
        ("kind: transformer", "needs a field kind, or a part for --kind in kinds: tokenizer, calm, autoencoder, ar"),
        ("kinds: {calm: {model: {num_samples: 4}}}", "needs a field kind, or a part for --kind in kinds"),
        ("kind: calm\nkinds: {calm: 3}", "kinds must have fields of tokenizer, calm, autoencoder, ar"),
        ("kind: calm\nkinds: {clam: {}}", "kinds must have fields of tokenizer, calm, autoencoder, ar"),
        ("kind: calm\nkinds: {calm: {model: 4}}", "section model must have fields"),
        ("base: calm-s", "its base 'calm-s' does not exist: name a .yaml file or one of autoencoder, calm-fast"),
        ("base: mine.yaml", "its bases form a cycle (mine.yaml -> mine.yaml)"),
        ("kind: calm\nmodel: [4]", "section model must have fields"),
        ("- calm", "a recipe has fields"),
        ("kind: {", "cannot be read"),
    ):
        (tmp_path / "mine.yaml").write_text(content)
        with pytest.raises(InputError) as error:
            load_recipe(str(tmp_path / "mine.yaml"))
        assert message in str(error.value)


def test_a_recipe_overrides_only_its_own_fields_of_its_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: middle.yaml\nmodel: {num_samples: 4}\ntraining: {seed: 2}")
    middle = "base: calm-l\nname: the middle\nauxiliary_weight: 0.5\ndata: {append_eos: true}\ntraining: {seed: 3}"
    (tmp_path / "middle.yaml").write_text(middle)
    found, large = load_recipe(str(tmp_path / "mine.yaml")), load_recipe("calm-l")
    assert (found.name, found.kind, found.auxiliary_weight) == ("mine", "calm", 0.5)
    assert found.data == dataclasses.replace(large.data, append_eos=True)
    assert found.model == large.model | {"num_samples": 4}
    assert found.training == large.training | {"seed": 2}
    found.save(tmp_path / "saved.yaml")
    assert "base" not in (tmp_path / "saved.yaml").read_text()
    assert load_recipe(str(tmp_path / "saved.yaml")) == found


def test_a_file_of_several_kinds_gives_each_its_fields_also_through_a_base(tmp_path):
    kinds = "{calm: {name: c, model: {num_samples: 4}}, ar: {training: {seed: 5}, data: {append_eos: true}}}"
    (tmp_path / "both.yaml").write_text(f"training: {{seed: 3}}\nmodel: {{hidden_size: 8}}\nkinds: {kinds}")
    (tmp_path / "mine.yaml").write_text("base: both.yaml\nkind: ar\nmodel: {hidden_size: 16}")
    calm, ar = (load_recipe(str(tmp_path / "both.yaml"), {"kind": kind}) for kind in ("calm", "ar"))
    assert (calm.kind, calm.name, calm.training) == ("calm", "c", {"seed": 3})
    assert calm.model == {"hidden_size": 8, "num_samples": 4}
    assert (ar.kind, ar.name, ar.training, ar.model) == ("ar", "both", {"seed": 5}, {"hidden_size": 8})
    mine = load_recipe(str(tmp_path / "mine.yaml"))
    assert mine == dataclasses.replace(ar, name="mine", model={"hidden_size": 16}) and mine.data.append_eos
    with pytest.raises(InputError, match="mine.yaml' is for train ar"):
        load_recipe(str(tmp_path / "mine.yaml"), {"kind": "calm"})
    with pytest.raises(InputError, match="needs a field kind, or a part for autoencoder in kinds"):
        load_recipe(str(tmp_path / "both.yaml"), {"kind": "autoencoder"})  # without fields it would be of default size
    (tmp_path / "larger.yaml").write_text("base: calm-m\nkinds: {calm: {data: {block_size: 4096}}}")
    assert load_recipe(str(tmp_path / "larger.yaml")).data.block_size == 4096


def test_an_invalid_override_or_name_raises():
    with pytest.raises(InputError, match="unknown field 'lerning_rate': did you mean learning_rate"):
        load_recipe("calm-m", {"lerning_rate": 1})
    with pytest.raises(InputError, match="no recipe 'calm-s': name a .yaml file or one of autoencoder, calm-fast"):
        load_recipe("calm-s")


# cost


COUNTS = {
    **{"autoencoder": "75.83 M", "calm-m": "371.73 M", "calm-l": "735.33 M", "calm-xl": "1,829.8 M"},
    **{"transformer-s": "282.0 M", "transformer-m": "465.1 M", "transformer-l": "847.0 M"},
}


@pytest.mark.parametrize("name, printed", COUNTS.items())
def test_dry_runs_print_the_published_parameter_counts(name, printed, capsys):
    assert train(load_recipe(name).kind, name, dry_run=[]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"recipe {name}", "", "parameters"]  # there are no assumptions
    total = next(line for line in lines if line.strip().startswith("total"))
    assert total.split()[-2:] == printed.split()


def test_flops_agree_with_the_papers():
    num_tokens = 5e11  # 250,000 steps of 2 million tokens; paper 4.1
    transformer, calm = recipe_cost(load_recipe("transformer-s")), recipe_cost(load_recipe("calm-m"))
    assert sum(transformer.train_flops.values()) * num_tokens == pytest.approx(6.6e20, rel=0.01)
    assert sum(transformer.inference_flops.values()) == pytest.approx(4.4e8, rel=0.01)
    assert sum(calm.inference_flops.values()) == pytest.approx(2.9e8, rel=0.01)
    # The published code applies the whole head to each of the 8 samples; here the context's part runs once per patch.
    d, repeated = 1024, 7
    saved = 3 * 2 * (d * d + 4 * d * d) * repeated / 4
    assert (sum(calm.train_flops.values()) + saved) * num_tokens == pytest.approx(3.7e20, rel=0.025)


@pytest.mark.parametrize("kind", ["autoencoder", "calm"])
def test_estimated_activations_are_within_a_third_of_what_autograd_saves(kind):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 500}
    config = CALMAutoencoderConfig(**sizes)
    if kind == "calm":
        sizes |= {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = CALMConfig(**sizes, num_key_value_heads=4, autoencoder_config=config.to_dict())
    model, saved = (CALMForCausalLM if kind == "calm" else CALMAutoencoder)(config).train(), {}
    ids = torch.randint(500, (2, 256))  # one of 64 patches is no target

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(input_ids=ids, labels=ids)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(size for pointer, size in saved.items() if pointer not in weights) / 4 / ids.numel()
    assert outputs.loss.requires_grad
    cost = calm_cost(config, 256) if kind == "calm" else autoencoder_cost(config)
    assert 0.95 < measured / cost.saved_activations < 4 / 3


def test_help_lists_the_fields_of_every_section_with_their_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["calm", "--help"])
    words = capsys.readouterr().out.split()
    fields = {"auxiliary_weight=0.0", "tokenizer=None", "block_size=1024", "noise_size=64", "head_type='energy'"}
    assert fields <= set(words) and {"kind", "calm-m,"} <= set(words)


def test_fields_of_earlier_versions_are_read_if_they_had_no_effect(tmp_path):
    path = tmp_path / "recipe.yaml"
    for ending, is_read in (("0.0", True), ("0.9", False)):
        path.write_text(f"kind: calm\ndistil: null\nema_decay: {ending}\n")
        with nullcontext() if is_read else pytest.raises(InputError, match="unknown field 'ema_decay'"):
            load_recipe(str(path))
