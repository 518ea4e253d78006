"""Recipes are data: loaded by name or file, every field overridable, nothing unknown accepted."""

import dataclasses

import pytest
import torch
from training_helpers import train
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from calm.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm.modeling_calm import CALMForCausalLM
from calm.modeling_calm_autoencoder import CALMAutoencoder
from calm.training.cost import PAPER_TOKENS, ar_cost, autoencoder_cost, calm_cost, recipe_cost
from calm.training.recipe import (
    CONFIGS,
    RECIPE_FOLDER,
    RecipeError,
    load_recipe,
    parse_command_line,
    recipe_names,
    section_fields,
)
from calm.training.run import make_config, training_arguments

NAMES = (
    "autoencoder calm-l calm-m calm-m-diffusion calm-m-flow calm-xl "
    "demo demo-autoencoder demo-backbone demo-tokenizer demo-transformer transformer-l transformer-m transformer-s"
).split()
MODELS = [name for name in NAMES if name != "demo-tokenizer"]


def test_the_named_recipes_are_there():
    assert recipe_names() == NAMES


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_is_accepted_by_its_configuration_and_by_trainer(name, tmp_path):
    recipe = load_recipe(name, {"output_dir": str(tmp_path), "bf16": False})
    config = make_config(CONFIGS[recipe.kind], recipe.model)
    assert all(getattr(config, key) == value for key, value in recipe.model.items())
    assert training_arguments(recipe).learning_rate == recipe.training["learning_rate"]


# Of the published training scripts, on eight processes each: block, rows, rows accumulated, sequences a step over all
# processes, steps, warm-up written.
PUBLISHED = {
    "autoencoder": (2048, 8, 4, 256, 30_000, 1000),
    "calm": (8192, 4, 8, 256, 250_000, 2000),
    "ar": (2048, 4, 32, 1024, 250_000, 2000),
}
PUBLISHED_OPTIMISER = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "bf16": True,
    "seed": 1,
}


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("demo")])
def test_published_recipes_have_the_constants_of_the_published_scripts(name):
    recipe = load_recipe(name)
    block_size, rows, accumulated, sequences, steps, warmup = PUBLISHED[recipe.kind]
    assert rows * accumulated * 8 == sequences
    assert recipe.data.block_size == block_size
    assert recipe.training == {
        **PUBLISHED_OPTIMISER,
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulated,
        "warmup_steps": warmup,
    }


def test_published_recipes_name_their_sources_and_the_number_of_processes():
    for name in MODELS:
        if name.startswith("demo"):
            continue
        text = (RECIPE_FOLDER / f"{name}.yaml").read_text()
        constants = text.partition("\ntraining:\n")[2].splitlines()
        assert all("# published script" in line for line in constants if not line.startswith("  #"))
        assert "For 8 processes, as published" in text and "8 / n" in text


def test_the_schedule_called_constant_has_no_warm_up(tmp_path):
    """As the recipes' comments say."""
    args = training_arguments(load_recipe("calm-m", {"output_dir": str(tmp_path), "bf16": False}))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(250_000), 250_000)
    assert args.get_warmup_steps(250_000) == 2000
    assert schedule.get_last_lr() == [3e-4]


@pytest.mark.parametrize("section", ["model", "data", "training", ""])
def test_every_field_of_a_section_can_be_overridden(section):
    for key in section_fields("calm")[section] - {"train_files", "validation_files"}:
        recipe = load_recipe("calm-m", {key: "changed"})
        values = dataclasses.asdict(recipe)
        assert (values[section] if section else values)[key] == "changed"


def test_no_field_name_is_ambiguous():
    for kind in CONFIGS:
        fields = section_fields(kind)
        assert sum(map(len, fields.values())) == len(set().union(*fields.values()))


def test_the_command_line_is_read_as_yaml():
    arguments = "--learning_rate 3e-4 --max_steps=7 --bf16 --eval_strategy no --train_files a b --beta 1.0 --seed -1"
    assert parse_command_line(arguments.split()) == {
        "learning_rate": 3e-4,
        "max_steps": 7,
        "bf16": True,
        "eval_strategy": "no",
        "train_files": ["a", "b"],
        "beta": 1.0,
        "seed": -1,
    }
    with pytest.raises(RecipeError, match="unexpected 'calm-m'"):
        parse_command_line(["calm-m"])


def test_a_saved_recipe_is_the_same_recipe(tmp_path):
    recipe = load_recipe("demo", {"train_files": "a.jsonl", "learning_rate": 1e-5})
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "kind: calm\nmodel: {hiden_size: 4}",
            "unknown field 'hiden_size' in section model: did you mean hidden_size?",
        ),
        ("kind: calm\nlearning_rate: 1", "unknown field 'learning_rate'"),
        ("kind: transformer", "field kind, one of tokenizer, calm, autoencoder, ar"),
    ],
)
def test_a_recipe_file_with_a_mistake_is_refused(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(RecipeError) as error:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert message in str(error.value)


def test_a_mistaken_override_or_name_is_refused():
    with pytest.raises(RecipeError, match="unknown field 'lerning_rate': did you mean learning_rate"):
        load_recipe("calm-m", {"lerning_rate": 1})
    with pytest.raises(RecipeError, match="no recipe 'calm-s': name a .yaml file or one of autoencoder, calm-l"):
        load_recipe("calm-s")
    with pytest.raises(RecipeError, match="num_samples=1: the pairwise term needs at least 2 samples"):
        make_config(CONFIGS["calm"], {"num_samples": 1})


# what they cost


@pytest.mark.parametrize(
    "name, printed",
    [
        ("autoencoder", "75.83 M"),
        ("calm-m", "371.73 M"),
        ("calm-l", "735.33 M"),
        ("calm-xl", "1,829.8 M"),
        ("transformer-s", "282.0 M"),
        ("transformer-m", "465.1 M"),
        ("transformer-l", "847.0 M"),
    ],
)
def test_dry_runs_print_the_published_parameter_counts(name, printed, capsys):
    assert train(load_recipe(name).kind, name, dry_run=[]) == 0
    total = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("total"))
    assert total.split()[-2:] == printed.split()


def test_flops_agree_with_the_papers():
    transformer, calm = recipe_cost(load_recipe("transformer-s")), recipe_cost(load_recipe("calm-m"))
    assert sum(transformer.train_flops.values()) * PAPER_TOKENS == pytest.approx(6.6e20, rel=0.01)
    assert sum(transformer.inference_flops.values()) == pytest.approx(4.4e8, rel=0.01)
    assert sum(calm.inference_flops.values()) == pytest.approx(2.9e8, rel=0.01)
    # The published code applies the whole head to each of the 8 samples; here the context's part runs once a patch.
    d, repeated = 1024, 7
    saved = 3 * 2 * (d * d + 4 * d * d) * repeated / 4
    assert (sum(calm.train_flops.values()) + saved) * PAPER_TOKENS == pytest.approx(3.7e20, rel=0.025)


def test_estimated_activations_are_within_a_third_of_what_autograd_keeps():
    sizes = {"hidden_size": 128, "intermediate_size": 344, "vocab_size": 500}
    attention = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    autoencoder = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 500}
    ids = torch.randint(500, (2, 256))  # of 64 patches one is no target
    configs = [LlamaConfig(**sizes, **attention), CALMAutoencoderConfig(**autoencoder)]
    configs += [
        CALMConfig(**sizes, **attention, head_type=head, autoencoder_config=autoencoder)
        for head in ("energy", "flow", "diffusion")
    ]
    for config, model_class, cost in zip(
        configs,
        [LlamaForCausalLM, CALMAutoencoder, *3 * [CALMForCausalLM]],
        [ar_cost, lambda config, _: autoencoder_cost(config), *3 * [calm_cost]],
        strict=True,
    ):
        model, kept = model_class(config).train(), {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(input_ids=ids, labels=ids)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        measured = sum(size for pointer, size in kept.items() if pointer not in weights) / 4 / ids.numel()
        assert outputs.loss.requires_grad
        assert 0.95 < measured / cost(config, 256).kept < 4 / 3, config.model_type
