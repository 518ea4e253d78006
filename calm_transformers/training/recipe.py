"""Recipes: YAML files with all settings of a training run, each of which the command line can override.

A recipe has the fields of `Recipe`; its section `data` those of `DataOptions`, `model` those of the model's
configuration and `training` those of TrainingArguments. On the command line the sections are left out:
`--recipe calm-m --learning_rate 1e-3 --block_size 2048 --num_hidden_layers 8`.

`base: calm-m` inherits the fields of that recipe, section by section; the file's own fields override them. A base may
have a base itself, and need not be a complete recipe. `kinds` gives each kind of training its own values of these
fields, so that one file serves `calm train tokenizer`, `autoencoder` and `calm`.
"""

import copy
import dataclasses
import difflib
import math
import os
import re
import textwrap
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader
from transformers import LlamaConfig, PreTrainedConfig, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from calm_transformers.command_line import InputError, format_error
from calm_transformers.documents import DataOptions
from calm_transformers.model.configuration_calm import CALMAutoencoderConfig, CALMConfig
from calm_transformers.progress import shows_bars

RECIPE_FOLDER = Path(__file__).parent / "recipes"
CONFIGS = {"calm": CALMConfig, "autoencoder": CALMAutoencoderConfig, "ar": LlamaConfig}
KINDS = ("tokenizer", *CONFIGS)
# Fields that `init_backbone` sets in place of the model section. max_position_embeddings is one, as some RoPE scalings
# depend on it.
BACKBONE_FIELDS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "initializer_range"),
)
# Fields that a resumed run must not change, beside the model section and the recipe's own fields.
FIXED_ON_RESUME = {
    *("block_size", "random_phase", "left_fill", "streaming", "seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("neftune_noise_alpha", "bf16", "fp16"),
}
PATH_FIELDS = ("tokenizer", "autoencoder", "init_from", "init_backbone")  # folders, or Hub ids
# With their defaults, as earlier versions wrote them to a run's recipe.yaml.
REMOVED_FIELDS = [("auxiliary_decay", 0.0), ("head_learning_rate", None), ("ema_decay", 0.0)]
REMOVED_FIELDS += [("distil", None), ("distil_weight", 1.0)]
# Arguments of Trainer that our trainer, data and losses rely on.
REQUIRED_ARGUMENTS = {
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "prediction_loss_only": True,
    "label_smoothing_factor": 0.0,
    "train_sampling_strategy": "random",  # the dataset itself is shuffled
    "auto_find_batch_size": False,
    "ignore_data_skip": False,
    "dataloader_drop_last": False,
    "resume_from_checkpoint": None,  # always the last checkpoint in output_dir
}
# `patch_embedding_init` → weight of a token in the patch embedding relative to the next token.
PATCH_EMBEDDING_DECAYS = {"last": 0.0, "mix": 0.5, "mean": 1.0}


@dataclass
class Recipe:
    """The settings of a training run.

    Args:
        kind: "tokenizer", "autoencoder", "calm" or "ar" (a standard Llama, for comparison).
        tokenizer: folder or Hub id.
        autoencoder: folder or Hub id of the trained autoencoder (calm only).
        init_from: folder or Hub id of the model to initialise from; the model section overrides its configuration,
            for example to another head_type, whose weights are then new.
        init_backbone: folder or Hub id of a Llama to initialise the backbone and the MTP loss from (calm only, see
            backbone.py); its sizes replace those of the model section.
        patch_embedding_init: with `init_backbone`, the initial patch embedding: "last", the last token's embedding;
            "mean", the mean of all; "mix", a weighted mean in which each token weighs half as much as the next.
        lora_rank: with `init_from`, train a LoRA adapter of this rank on backbone and head; 0 trains all weights.
        auxiliary_weight: weight of the training-only MTP loss (calm only, see auxiliary.py).
        auxiliary_targets: number of pseudo-targets per patch that are sampled from the MTP model for the head's loss.
        head_weight: weight of the head's loss; 0 trains the backbone alone.
        distil_temperature: train the head alone to sample in one draw at every temperature from this to 1, taught by
            `init_from` (see distil_temperature.py); num_samples is the number of targets at each position.
        upload_to: URL (s3://, gs://, hf://, …) to which checkpoints and model are also copied (see upload.py).
        freeze_backbone: train the head alone, on the backbone of `init_from` or `init_backbone` (calm only).
        data, model, training: the sections.
        run_facts: filled in by a run (`found` in files): `batch_size`, blocks per step, and `tokens`, their digest.
    """

    kind: str
    name: str = ""
    tokenizer: str | None = None
    autoencoder: str | None = None
    init_from: str | None = None
    init_backbone: str | None = None
    patch_embedding_init: str = "last"
    lora_rank: int = 0
    auxiliary_weight: float = 0.0
    auxiliary_targets: int = 0
    head_weight: float = 1.0
    distil_temperature: float | None = None
    freeze_backbone: bool = False
    upload_to: str | None = None
    data: DataOptions = field(default_factory=DataOptions)
    model: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    run_facts: dict = field(default_factory=dict, compare=False)

    @property
    def output_dir(self) -> str:
        return self.training.get("output_dir", f"runs/{self.name}")

    def save(self, path: Path) -> None:
        """Writes the resolved recipe, which reproduces the run, without the Hub's token."""
        content = dataclasses.asdict(self)
        content["found"] = content.pop("run_facts")
        content["training"].pop("hub_token", None)
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def all_values(self) -> dict:
        """Returns the fields of all sections in one dict, defaults included."""
        sections = dataclasses.asdict(self)
        data, model, training, facts = (sections.pop(name) for name in ("data", "model", "training", "run_facts"))
        defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
        return {**defaults, **CONFIGS[self.kind]().to_dict(), **sections, **data, **model, **training, **facts}


def allowed_changes(before: Recipe, now: Recipe, place: str | None = None) -> str:
    """Returns the fields that a resumed run changes, as "name old -> new, …"; one that must not is an `InputError`.

    Training text is compared by its tokens, not its path, unless it is streamed. `place` is named in the error, by
    default the run's folder.
    """
    fields = section_fields(now.kind)
    fixed = FIXED_ON_RESUME | fields[""] - {"name", "upload_to"} | fields["model"] | {"batch_size", "tokens"}
    if now.data.streaming:
        fixed |= {name for name in vars(now.data) if not name.startswith("validation_")} - {"cache_dir"}
        fixed |= {"dataloader_num_workers"}  # the stream depends on it
    old, new = before.all_values(), now.all_values()
    for values in (old, new):
        values |= {name: os.path.realpath(values[name]) for name in PATH_FIELDS if os.path.exists(values[name] or "")}
    shared = old.keys() & new.keys() - {"output_dir"}
    changes = {name: f"{name} {old[name]!r} -> {new[name]!r}" for name in sorted(shared) if old[name] != new[name]}
    if conflicts := ", ".join(change for name, change in changes.items() if name in fixed):
        raise InputError(
            f"{place or now.output_dir} holds checkpoints of another training ({conflicts}): "
            f"restore these values, or name another {'--upload_to' if place else '--output_dir'}."
        )
    return ", ".join(changes.values())


class _Loader(yaml.SafeLoader):
    """YAML loader that reads 3e-4 as a number (PyYAML needs 3.0e-4) and "no" as a string (eval_strategy: no)."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def section_fields(kind: str) -> dict[str, set[str]]:
    """Returns the known field names by section; the section of the recipe's own fields is ""."""
    own_fields = {f.name for f in dataclasses.fields(Recipe)} - {"data", "model", "training", "run_facts"}
    not_in_dict = {"attn_implementation", "rope_theta"}  # to_dict() has the latter in rope_parameters
    model = {"vocab_size"} if kind == "tokenizer" else set(CONFIGS[kind]().to_dict()) | not_in_dict
    return {
        "": own_fields,
        "data": {f.name for f in dataclasses.fields(DataOptions)},
        "model": model - {"model_type", "transformers_version", "architectures", "auto_map"},
        "training": {f.name for f in dataclasses.fields(TrainingArguments)} - {"use_cache"},  # the model's
    }


def describe_fields(kind: str) -> str:
    """Returns the fields of a recipe by section, with their defaults, and the recipes' names, for --help."""
    own, data = ({f.name: f.default for f in dataclasses.fields(each)} for each in (Recipe, DataOptions))
    defaults = {"": own, "data": data, "model": CONFIGS[kind]().to_dict() if kind in CONFIGS else {}}
    names = section_fields(kind)
    names["model"] -= set(PreTrainedConfig().to_dict()) - {"tie_word_embeddings", "vocab_size"}
    parts = []
    for section, values in defaults.items():
        shown = {name: values.get(name, dataclasses.MISSING) for name in sorted(names[section])}
        has_none = (dict, type(dataclasses.MISSING))
        words = (name if isinstance(value, has_none) else f"{name}={value!r}" for name, value in shown.items())
        text = textwrap.fill(" ".join(words), 100, initial_indent="  ", subsequent_indent="  ")
        parts.append(f"{section or 'recipe'}:\n{text}")
    parts.append("training:\n  the fields of transformers.TrainingArguments")
    return "\n".join([*parts, f"\nrecipes: {', '.join(recipe_names())}"])


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def load_recipe(name_or_file: str, overrides: dict | None = None) -> Recipe:
    """Reads a recipe, by name or from a YAML file, with its bases, and applies the overrides.

    The override `kind` selects among the `kinds` of a file; a file of another kind is an InputError. With
    `init_backbone` the file's `BACKBONE_FIELDS` are dropped; those in `overrides` stay, to be checked against it.
    """
    path = _recipe_path(name_or_file, Path())
    if not path.exists():
        raise InputError(f"no recipe {name_or_file!r}: {_recipe_hint()}.")
    wanted = (overrides or {}).get("kind")
    sections = _read_sections(path, wanted)
    kind = sections[""].get("kind")
    if kind not in KINDS:
        part = f"a part for {wanted or '--kind'}"
        raise InputError(f"{path}: needs a field kind, or {part} in kinds: {', '.join(KINDS)}.")
    if wanted not in (None, kind):
        raise InputError(f"the recipe {name_or_file!r} is for train {kind}.")
    known = section_fields(kind)
    run_facts = sections[""].pop("found", None) or {}  # in the recipe.yaml that a run wrote
    sections[""] = {name: value for name, value in sections[""].items() if (name, value) not in REMOVED_FIELDS}
    for section, values in sections.items():
        for key in values:
            if key not in known[section]:
                raise InputError(f"{path}: {_unknown_field(key, known[section], section)}")
    all_known = set().union(*known.values())
    for key, value in (overrides or {}).items():
        section = next((name for name, keys in known.items() if key in keys), None)
        if section is None:
            raise InputError(_unknown_field(key, all_known, ""))
        sections[section][key] = value
    for values in sections.values():
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value) and key != "num_train_epochs":
                raise InputError(f"{key}={value}: must be a finite number.")
    if sections[""].get("init_backbone"):
        if sections[""].get("init_from") or kind != "calm":
            raise InputError("init_backbone initialises a new CALM: it needs train calm, and no init_from.")
        dropped = set(BACKBONE_FIELDS) - set(overrides or {})
        sections["model"] = {key: value for key, value in sections["model"].items() if key not in dropped}
    own_fields, data = {"name": path.stem, **sections[""]}, sections["data"]
    for key in ("train_files", "validation_files"):
        if isinstance(data.get(key), str):
            data[key] = [data[key]]
    _check_types(own_fields, Recipe)
    _check_types(data, DataOptions)
    _normalize_types(sections, kind)
    model, training = sections["model"], sections["training"]
    return Recipe(data=DataOptions(**data), model=model, training=training, run_facts=run_facts, **own_fields)


def _recipe_path(name_or_file: str, folder: Path) -> Path:
    """Returns the path of a .yaml file, relative to the folder, or of the recipe with that name."""
    path = Path(name_or_file)
    return folder / path if path.suffix in (".yaml", ".yml") else RECIPE_FOLDER / f"{name_or_file}.yaml"


def _recipe_hint() -> str:
    return f"name a .yaml file or one of {', '.join(recipe_names())}"


def _read_sections(path: Path, kind: str | None, parents: tuple[Path, ...] = ()) -> dict[str, dict]:
    """Reads the fields by section (see `section_fields`), with those of `kind` and of the bases.

    `parents` are the files of which it is a base.
    """
    if path.resolve() in [other.resolve() for other in parents]:
        raise InputError(f"{path}: its bases form a cycle ({' -> '.join(p.name for p in (*parents, path))}).")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a recipe has fields, as in kind: calm.")
    base, kinds = content.pop("base", None), content.pop("kinds", None) or {}
    if not isinstance(kinds, dict) or not all(kind in KINDS and isinstance(kinds[kind], dict) for kind in kinds):
        raise InputError(f"{path}: kinds must have fields of {', '.join(KINDS)}.")
    sections, kind = _split_sections(path, content), kind or content.get("kind")
    inherited: dict[str, dict] = {name: {} for name in sections}
    if base is not None:
        base_path = _recipe_path(str(base), path.parent)
        if not base_path.is_file():
            raise InputError(f"{path}: its base {base!r} does not exist: {_recipe_hint()}.")
        inherited = _read_sections(base_path, kind, (*parents, path))
        inherited[""].pop("name", None)
        kind = kind or inherited[""].get("kind")
    if kind in kinds:
        sections = _merge(sections, _split_sections(path, {"kind": kind, **kinds[kind]}))
    return _merge(inherited, sections)


def _split_sections(path: Path, content: dict) -> dict[str, dict]:
    sections = {name: content.pop(name, None) or {} for name in ("data", "model", "training")} | {"": content}
    for name, values in sections.items():
        if not isinstance(values, dict):
            raise InputError(f"{path}: section {name} must have fields, as in block_size: 1024.")
    return sections


def _merge(sections: dict[str, dict], changes: dict[str, dict]) -> dict[str, dict]:
    return {name: {**values, **changes[name]} for name, values in sections.items()}


_TYPES = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list[str]: "a list of strings"}


def _check_types(values: dict, owner: type) -> None:
    """Raises `InputError` for a value that is not of its field's type in the dataclass."""
    types = typing.get_type_hints(owner)
    for key, value in values.items():
        allowed = [t for t in (typing.get_args(types[key]) or [types[key]]) if t is not type(None)]
        if types[key] == list[str]:
            allowed, fits = [list[str]], isinstance(value, list) and all(isinstance(v, str) for v in value)
        else:
            fits = type(value) in allowed or (float in allowed and type(value) is int)
        if not fits and not (value is None and type(None) in typing.get_args(types[key])):
            raise InputError(f"{key}={value!r}: must be {' or '.join(_TYPES[t] for t in allowed)}.")


def _normalize_types(sections: dict[str, dict], kind: str) -> None:
    """Converts floats such as 1e4 to int in integer fields of `model` and `training`, and checks types in both.

    It checks only what would otherwise fail much later; the configuration class and TrainingArguments check the rest.
    """
    defaults = {} if kind == "tokenizer" else CONFIGS[kind]().to_dict()
    types = {key: str(type(value)) for key, value in defaults.items()}
    types |= {f.name: str(f.type) for f in dataclasses.fields(TrainingArguments)} | {"fsdp": "bool"}  # also accepted
    for section in ("model", "training"):
        for key, value in sections[section].items():
            expected = types.get(key, "")
            if value is True and "bool" not in expected:
                raise InputError(f"{key} needs a value: --{key} VALUE.")
            if value is None or (isinstance(value, list) and key.endswith("_token_id")):  # may be a list
                continue
            if "dict" in expected and not isinstance(value, dict | str):
                raise InputError(f"{key}={value!r}: must have fields, as in --{key} '{{name: value}}'.")
            if expected not in (str(int), str(float)):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{key}={value!r}: must be a number.")
            if expected == str(int):
                if not float(value).is_integer():
                    raise InputError(f"{key}={value!r}: must be an integer.")
                sections[section][key] = int(value)


def _unknown_field(key: str, known: set[str], section: str) -> str:
    """Returns the message for an unknown field, with the nearest `known` name."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "the recipes and TrainingArguments name the known ones."
    return f"unknown field {key!r}{f' in section {section}' if section else ''}: {hint}"


def parse_command_line(arguments: list[str]) -> dict:
    """Parses `--key value`, `--key=value`, `--key a b c` (a list) and `--flag` (true); values are read as YAML."""
    values: dict[str, list] = {}
    key = None
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            values[key] = [value] if equals else []
        elif key is None:
            raise InputError(f"unexpected {argument!r}: fields are given as --name value.")
        else:
            values[key].append(argument)
    try:
        parsed = {key: [yaml.load(text, _Loader) for text in texts] for key, texts in values.items()}
    except yaml.YAMLError as error:
        raise InputError(f"a value on the command line cannot be read: {error}") from error
    return {key: True if not items else items[0] if len(items) == 1 else items for key, items in parsed.items()}


# checks before a training


def check_fields(recipe: Recipe) -> None:
    """Raises `InputError` if the recipe's own fields are invalid or contradict each other."""
    r = recipe

    def raise_if(is_invalid: Any, message: str) -> None:
        if is_invalid:
            raise InputError(f"{message}.")

    for name, default in {"auxiliary_targets": 0, "head_weight": 1.0}.items():
        is_unused = getattr(r, name) != default and not r.auxiliary_weight
        raise_if(is_unused, f"{name}={getattr(r, name)} has no effect without auxiliary_weight")
    numbers = {name: getattr(r, name) for name in ("auxiliary_weight", "head_weight", "auxiliary_targets")}
    numbers["weight_decay"] = r.training.get("weight_decay")
    for name, value in numbers.items():
        raise_if(value is not None and value < 0, f"{name}={value}: must not be negative")
    lora_fits = r.init_from and not r.auxiliary_weight and not r.freeze_backbone
    message = "lora_rank needs init_from, and neither auxiliary_weight nor freeze_backbone"
    raise_if(r.lora_rank and not lora_fits, message)
    excluded = [name for name in ("auxiliary_weight", "lora_rank") if getattr(r, name)]
    message = f"distil_temperature={r.distil_temperature}: needs init_from"
    raise_if(r.distil_temperature and not (r.init_from and r.kind == "calm"), message)
    message = f"distil_temperature={r.distil_temperature}: trains the head alone, without {', '.join(excluded)}"
    raise_if(r.distil_temperature and excluded, message)
    message = f"patch_embedding_init={r.patch_embedding_init!r}: must be one of {', '.join(PATCH_EMBEDDING_DECAYS)}"
    raise_if(r.patch_embedding_init not in PATCH_EMBEDDING_DECAYS, message)


def training_arguments(recipe: Recipe, **overrides) -> TrainingArguments:
    """Returns the recipe's TrainingArguments, with our defaults and the overrides."""
    settings = copy.deepcopy(recipe.training)  # Trainer changes nested values in place
    for name, value in REQUIRED_ARGUMENTS.items():
        if settings.get(name, value) != value:
            raise InputError(f"{name}={settings[name]!r}: leave it out, this trainer relies on {value!r}.")
    if "eval_strategy" not in settings and (recipe.data.validation_files or recipe.data.validation_split):
        settings["eval_strategy"] = "steps"
    defaults = {
        "output_dir": recipe.output_dir,
        "report_to": "none",
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "eval_steps": 500,
        "disable_tqdm": not shows_bars(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # torchrun on CPUs needs it
        "ddp_find_unused_parameters": recipe.head_weight == 0,
    }
    try:
        return TrainingArguments(**{**defaults, **settings, **REQUIRED_ARGUMENTS, **overrides})
    except (ValueError, TypeError) as error:
        raise InputError(f"section training: {error}") from error


def check_arguments(args: TrainingArguments) -> None:
    """Checks arguments that Trainer reads only after model and data are built: optimizer, schedule, reporters.

    They are built for a tiny model and dropped: only their errors matter.
    """
    if args.n_gpu > 1:  # Trainer would use DataParallel
        command = f"torchrun --nproc_per_node {args.n_gpu} -m calm_transformers.training.train …"
        raise InputError(f"{args.n_gpu} GPUs: start `{command}`, or choose one with CUDA_VISIBLE_DEVICES=0.")
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise InputError(f"{name}={getattr(args, name)}: must be an integer from 0 to 2**32 - 1.")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"{name}={getattr(args, name)}: must be at least 1.")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        raise InputError(f"num_train_epochs={args.num_train_epochs}: must be above 0, or max_steps is.")
    steps, scheduler_kwargs = max(1, args.max_steps), args.lr_scheduler_kwargs
    if isinstance(scheduler_kwargs, str):
        raise InputError(f"lr_scheduler_kwargs={scheduler_kwargs!r}: must have fields, as in '{{num_cycles: 2}}'.")
    checked = f"optim {OptimizerNames(args.optim).value}"
    try:
        model: Any = torch.nn.Linear(1, 1)
        target = None if args.optim_target_modules else model
        optimizer_class, optimizer_kwargs = Trainer.get_optimizer_cls_and_kwargs(args, target)
        any_optimizer = torch.optim.SGD(model.parameters(), args.learning_rate)
        if not args.optim_target_modules:
            optimizer_class(model.parameters(), **optimizer_kwargs)
        checked = f"lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value}"
        get_scheduler(args.lr_scheduler_type, any_optimizer, args.get_warmup_steps(steps), steps, scheduler_kwargs)
        checked = "dataloader"
        DataLoader([0], num_workers=args.dataloader_num_workers, prefetch_factor=args.dataloader_prefetch_factor)  # pyright: ignore
        checked = f"report_to {args.report_to}"
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()
    except Exception as error:  # each package has its own
        raise InputError(f"{checked}: {format_error(error)}") from error
