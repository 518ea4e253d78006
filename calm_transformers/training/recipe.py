"""A recipe: every constant of a training run, from a YAML file, each overridable on the command line.

A recipe file has the fields of `Recipe`; `data` those of `DataOptions`, `model` those of the model's configuration,
`training` those of Hugging Face's TrainingArguments. On the command line the sections are left out:
`--recipe calm-m --learning_rate 1e-3 --block_size 2048 --num_hidden_layers 8`.

`base: calm-m` in a recipe file takes that recipe over and changes the fields that the file states, section by section.
A base may have a base, and need not be a recipe by itself.
"""

import copy
import dataclasses
import difflib
import math
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader
from transformers import LlamaConfig, Trainer, TrainingArguments, get_scheduler
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
# What `init_backbone` decides in place of the model section. RoPE is kept as it is, and with it the longest sequence,
# from which some of its scalings are made.
BACKBONE_FIELDS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "initializer_range"),
)
# What a resumed run keeps, beside the model section and the recipe's own fields.
KEPT = {
    *("block_size", "random_phase", "left_fill", "streaming", "seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("neftune_noise_alpha", "bf16", "fp16"),
}
PLACES = ("tokenizer", "autoencoder", "init_from", "init_backbone", "distil")  # folders, or Hub ids
# Trainer's own settings that our trainer, data and losses rely on.
FIXED = {
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "prediction_loss_only": True,
    "label_smoothing_factor": 0.0,
    "train_sampling_strategy": "random",  # the data set has the order
    "auto_find_batch_size": False,
    "ignore_data_skip": False,
    "dataloader_drop_last": False,
    "resume_from_checkpoint": None,  # the last of output_dir
}
# How a patch looks to the backbone at first → how much less each of its tokens counts than the one behind it.
PATCH_EMBEDDINGS = {"last": 0.0, "mix": 0.5, "mean": 1.0}


@dataclass
class Recipe:
    """One training run.

    Args:
        kind: "tokenizer", "autoencoder", "calm" or "ar" (an ordinary Llama, for comparison).
        tokenizer: folder or Hub id.
        autoencoder: folder or Hub id of the trained autoencoder (calm only).
        init_from: folder or Hub id of a model to go on from; the model section changes its configuration, as to
            another head_type, whose weights are then new.
        init_backbone: folder or Hub id of a Llama whose layers, final norm and token embeddings a new model begins
            with, and its multi-token loss with the output matrix (calm only, see backbone.py); its sizes take the
            place of the model section's.
        patch_embedding_init: with `init_backbone`, what a patch looks like to the first layer at the start: "last",
            its last token's embedding; "mean" of all; "mix", a mean in which each counts half as much as the next.
        lora_rank: with `init_from`, train a LoRA adapter of this rank on the backbone and the head; 0 trains all.
        auxiliary_weight: weight of the training-only multi-token loss (calm only, see auxiliary.py).
        auxiliary_decay: share of the steps over which that weight falls linearly to 0; 0 keeps it.
        auxiliary_targets: patches that the multi-token loss draws, beside each of the text's, for the head to learn
            from; 0 is the text's alone.
        head_weight: weight of the head's loss beside it; 0 trains the backbone alone.
        head_learning_rate: learning rate of the head and its context layers, on the schedule of `learning_rate`, which
            it takes by default (calm only).
        ema_decay: evaluate and export an exponential moving average of the weights, of which each step keeps this
            share; 0 is the weights themselves.
        distil: folder or Hub id of a Llama whose token probabilities the multi-token loss learns (see distil.py).
        distil_weight: their share in that loss, in (0, 1]; the rest is the text's own tokens.
        freeze_backbone: train the head alone, on the backbone of `init_from` or `init_backbone` (calm only).
        data, model, training: the sections.
        found: what a run fills in: the blocks of a step (`batch_size`) and a digest of the training text's `tokens`.
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
    auxiliary_decay: float = 0.0
    auxiliary_targets: int = 0
    head_weight: float = 1.0
    head_learning_rate: float | None = None
    distil: str | None = None
    distil_weight: float = 1.0
    freeze_backbone: bool = False
    ema_decay: float = 0.0
    data: DataOptions = field(default_factory=DataOptions)
    model: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    found: dict = field(default_factory=dict, compare=False)

    @property
    def output_dir(self) -> str:
        return self.training.get("output_dir", f"runs/{self.name}")

    def save(self, path: Path) -> None:
        """Writes the resolved recipe, from which the same run can be started again; without the Hub's token."""
        content = dataclasses.asdict(self)
        content["training"].pop("hub_token", None)
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def values(self) -> dict:
        """All fields of all sections, defaults included."""
        sections = dataclasses.asdict(self)
        data, model, training, found = (sections.pop(name) for name in ("data", "model", "training", "found"))
        defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
        return {**defaults, **CONFIGS[self.kind]().to_dict(), **sections, **data, **model, **training, **found}


def changes(before: Recipe, now: Recipe) -> str:
    """What has changed from the recipe of a run to that by which it is to be resumed, in words.

    The text is compared by its tokens, not by where it lies, unless it is a stream.
    """
    fields = section_fields(now.kind)
    kept = KEPT | fields[""] - {"name"} | fields["model"] | {"batch_size", "tokens"}
    if now.data.streaming:
        kept |= {name for name in vars(now.data) if not name.startswith("validation_")} - {"cache_dir"}
        kept |= {"dataloader_num_workers"}  # which share the documents
    old, new = before.values(), now.values()
    for values in (old, new):
        values |= {name: os.path.realpath(values[name]) for name in PLACES if os.path.exists(values[name] or "")}
    both = old.keys() & new.keys() - {"output_dir"}
    found = {name: f"{name} {old[name]!r} -> {new[name]!r}" for name in sorted(both) if old[name] != new[name]}
    if refused := ", ".join(change for name, change in found.items() if name in kept):
        raise InputError(
            f"{now.output_dir} holds checkpoints of another training ({refused}): "
            "give the values that it began with, or name another --output_dir."
        )
    return ", ".join(found.values())


class _Loader(yaml.SafeLoader):
    """YAML that reads 3e-4 as a number (PyYAML wants 3.0e-4) and "no" as a word (eval_strategy: no)."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def section_fields(kind: str) -> dict[str, set[str]]:
    """Known field names by section, "" for the recipe's own."""
    own = {f.name for f in dataclasses.fields(Recipe)} - {"data", "model", "training", "found"}
    not_in_dict = {"attn_implementation", "rope_theta"}  # rope_parameters holds the latter
    model = {"vocab_size"} if kind == "tokenizer" else set(CONFIGS[kind]().to_dict()) | not_in_dict
    return {
        "": own,
        "data": {f.name for f in dataclasses.fields(DataOptions)},
        "model": model - {"model_type", "transformers_version", "architectures", "auto_map"},
        "training": {f.name for f in dataclasses.fields(TrainingArguments)} - {"use_cache"},  # the model's
    }


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def load_recipe(name_or_file: str, overrides: dict | None = None) -> Recipe:
    """Reads a recipe by name or from a YAML file, on top of its base, and lays the overrides over it.

    With `init_backbone` the file's own `BACKBONE_FIELDS` are left out; overrides stay, to be checked against it.
    """
    path = _find(name_or_file, Path())
    if not path.exists():
        raise InputError(f"no recipe {name_or_file!r}: {_what_to_name()}.")
    sections = _read_sections(path)
    kind = sections[""].get("kind")
    if kind not in KINDS:
        raise InputError(f"{path}: the recipe must have a field kind, one of {', '.join(KINDS)}.")
    known, found = section_fields(kind), sections[""].pop("found", None) or {}
    for section, values in sections.items():
        for key in values:
            if key not in known[section]:
                raise InputError(f"{path}: {_unknown(key, known[section], section)}")
    everything = set().union(*known.values())
    for key, value in (overrides or {}).items():
        section = next((name for name, keys in known.items() if key in keys), None)
        if section is None:
            raise InputError(_unknown(key, everything, ""))
        sections[section][key] = value
    for values in sections.values():
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value) and key != "num_train_epochs":
                raise InputError(f"{key}={value}: must be a finite number.")
    if sections[""].get("init_backbone"):
        if sections[""].get("init_from") or kind != "calm":
            raise InputError("init_backbone begins a new CALM: it needs train calm, and no init_from.")
        left_out = set(BACKBONE_FIELDS) - set(overrides or {})
        sections["model"] = {key: value for key, value in sections["model"].items() if key not in left_out}
    own, data = {"name": path.stem, **sections[""]}, sections["data"]
    for key in ("train_files", "validation_files"):
        if isinstance(data.get(key), str):
            data[key] = [data[key]]
    _check_types(own, Recipe)
    _check_types(data, DataOptions)
    _settle_upstreams(sections, kind)
    return Recipe(data=DataOptions(**data), model=sections["model"], training=sections["training"], found=found, **own)


def _find(name_or_file: str, folder: Path) -> Path:
    """A .yaml file, relative to the folder, or else the file of the recipe of that name."""
    path = Path(name_or_file)
    return folder / path if path.suffix in (".yaml", ".yml") else RECIPE_FOLDER / f"{name_or_file}.yaml"


def _what_to_name() -> str:
    return f"name a .yaml file or one of {', '.join(recipe_names())}"


def _read_sections(path: Path, above: tuple[Path, ...] = ()) -> dict[str, dict]:
    """The file's fields by section, "" for the recipe's own, laid over its base's; `above` led here."""
    if path.resolve() in [other.resolve() for other in above]:
        raise InputError(f"{path}: its bases lead back to it ({' -> '.join(p.name for p in (*above, path))}).")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a recipe has fields, as in kind: calm.")
    base = content.pop("base", None)
    sections = {name: content.pop(name, None) or {} for name in ("data", "model", "training")} | {"": content}
    for name, values in sections.items():
        if not isinstance(values, dict):
            raise InputError(f"{path}: section {name} must have fields, as in block_size: 1024.")
    if base is None:
        return sections
    below = _find(str(base), path.parent)
    if not below.is_file():
        raise InputError(f"{path}: no recipe {base!r} to be its base: {_what_to_name()}.")
    taken = _read_sections(below, (*above, path))
    taken[""].pop("name", None)
    return {name: {**taken[name], **values} for name, values in sections.items()}


_TYPES = {str: "a word", bool: "true or false", int: "a whole number", float: "a number", list[str]: "a list of words"}


def _check_types(values: dict, owner: type) -> None:
    """Raises `InputError` for a value that is not of the type that the dataclass gives its field."""
    types = typing.get_type_hints(owner)
    for key, value in values.items():
        allowed = [t for t in (typing.get_args(types[key]) or [types[key]]) if t is not type(None)]
        if types[key] == list[str]:
            allowed, fits = [list[str]], isinstance(value, list) and all(isinstance(v, str) for v in value)
        else:
            fits = type(value) in allowed or (float in allowed and type(value) is int)
        if not fits and not (value is None and type(None) in typing.get_args(types[key])):
            raise InputError(f"{key}={value!r}: must be {' or '.join(_TYPES[t] for t in allowed)}.")


def _settle_upstreams(sections: dict[str, dict], kind: str) -> None:
    """Makes whole numbers of those that YAML reads as 10000.0, as 1e4, and refuses values of another type than the
    model's configuration or Trainer takes: only those that would else fail much later, the rest is checked there.
    """
    defaults = {} if kind == "tokenizer" else CONFIGS[kind]().to_dict()
    types = {key: str(type(value)) for key, value in defaults.items()}
    types |= {f.name: str(f.type) for f in dataclasses.fields(TrainingArguments)} | {"fsdp": "bool"}  # takes it, too
    for section in ("model", "training"):
        for key, value in sections[section].items():
            wanted = types.get(key, "")
            if value is True and "bool" not in wanted:
                raise InputError(f"{key} needs a value: --{key} VALUE.")
            if value is None or (isinstance(value, list) and key.endswith("_token_id")):  # there may be several
                continue
            if "dict" in wanted and not isinstance(value, dict | str):
                raise InputError(f"{key}={value!r}: must have fields, as in --{key} '{{name: value}}'.")
            if wanted not in (str(int), str(float)):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{key}={value!r}: must be a number.")
            if wanted == str(int):
                if not float(value).is_integer():
                    raise InputError(f"{key}={value!r}: must be a whole number.")
                sections[section][key] = int(value)


def _unknown(key: str, known: set[str], section: str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "the recipes and TrainingArguments name the known ones."
    return f"unknown field {key!r}{f' in section {section}' if section else ''}: {hint}"


def parse_command_line(arguments: list[str]) -> dict:
    """`--key value`, `--key=value`, `--key a b c` (a list) and `--flag` (true) → {key: value}, values read as YAML."""
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
        parsed = {key: [yaml.load(v, _Loader) for v in given] for key, given in values.items()}
    except yaml.YAMLError as error:
        raise InputError(f"a value on the command line cannot be read: {error}") from error
    return {key: True if not given else given[0] if len(given) == 1 else given for key, given in parsed.items()}


# before a training


def check_fields(recipe: Recipe) -> None:
    """Refuses what makes no sense among the recipe's own fields, or contradicts another."""
    r = recipe

    def refuse(is_wrong: Any, message: str) -> None:
        if is_wrong:
            raise InputError(f"{message}.")

    for name, default in {"auxiliary_decay": 0.0, "auxiliary_targets": 0, "head_weight": 1.0}.items():
        is_idle = getattr(r, name) != default and not r.auxiliary_weight
        refuse(is_idle, f"{name}={getattr(r, name)} has no meaning without auxiliary_weight")
    weights = {name: getattr(r, name) for name in ("auxiliary_weight", "head_weight", "auxiliary_targets")}
    weights |= {"head_learning_rate": r.head_learning_rate, "weight_decay": r.training.get("weight_decay")}
    for name, value in weights.items():
        refuse(value is not None and value < 0, f"{name}={value}: must not be negative")
    idle = f"distil {r.distil}: teaches through the multi-token loss, whose auxiliary_weight is 0"
    refuse(r.distil and not r.auxiliary_weight, idle)
    decay = f"auxiliary_decay={r.auxiliary_decay}: must lie in [0, 1], a share of the steps"
    refuse(not 0 <= r.auxiliary_decay <= 1, decay)
    is_share = r.distil_weight == 1 or (r.distil and 0 < r.distil_weight < 1)
    refuse(not is_share, f"distil_weight={r.distil_weight}: must lie in (0, 1], and needs distil")
    is_alone = r.init_from and not r.auxiliary_weight and not r.freeze_backbone
    refuse(r.lora_rank and not is_alone, "lora_rank needs init_from, and neither auxiliary_weight nor freeze_backbone")
    has_head = r.head_learning_rate is None or r.kind == "calm"
    refuse(not has_head, f"head_learning_rate={r.head_learning_rate}: only a CALM has a head")
    begins = f"patch_embedding_init={r.patch_embedding_init!r}: must be one of {', '.join(PATCH_EMBEDDINGS)}"
    refuse(r.patch_embedding_init not in PATCH_EMBEDDINGS, begins)
    refuse(not 0 <= r.ema_decay < 1, f"ema_decay={r.ema_decay}: must lie in [0, 1)")
    shards = "ema_decay averages whole weights, and fsdp shards them: leave one of the two out"
    refuse(r.ema_decay and r.training.get("fsdp"), shards)
    best = "ema_decay exports the last average, load_best_model_at_end the best weights: name one"
    refuse(r.ema_decay and r.training.get("load_best_model_at_end"), best)


def training_arguments(recipe: Recipe, **settled) -> TrainingArguments:
    """Trainer's arguments as the recipe states them, but for what is settled by now."""
    given = copy.deepcopy(recipe.training)  # Trainer rewrites nested ones
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise InputError(f"{name}={given[name]!r}: leave it out, training here relies on {value!r}.")
    if "eval_strategy" not in given and (recipe.data.validation_files or recipe.data.validation_split):
        given["eval_strategy"] = "steps"
    defaults = {
        "output_dir": recipe.output_dir,
        "report_to": "none",
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "eval_steps": 500,
        "disable_tqdm": not shows_bars(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # torchrun on CPUs needs to be told
        "ddp_find_unused_parameters": recipe.head_weight == 0,
    }
    try:
        return TrainingArguments(**{**defaults, **given, **FIXED, **settled})
    except (ValueError, TypeError) as error:
        raise InputError(f"section training: {error}") from error


def check_arguments(args: TrainingArguments) -> None:
    """Makes what Trainer will make of its arguments after the model and the data: optimizer, schedule, reporters."""
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise InputError(f"{name}={getattr(args, name)}: must be a whole number from 0 to 2**32 - 1.")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"{name}={getattr(args, name)}: must be at least 1.")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        raise InputError(f"num_train_epochs={args.num_train_epochs}: must be above 0, or max_steps is.")
    steps, settings, optim = max(1, args.max_steps), args.lr_scheduler_kwargs, OptimizerNames(args.optim).value
    if isinstance(settings, str):
        raise InputError(f"lr_scheduler_kwargs={settings!r}: must have fields, as in '{{num_cycles: 2}}'.")
    field = f"optim {optim}"
    try:
        model: Any = torch.nn.Linear(1, 1)
        kind, given = Trainer.get_optimizer_cls_and_kwargs(args, None if args.optim_target_modules else model)
        optimizer = torch.optim.SGD(model.parameters(), args.learning_rate)
        if not args.optim_target_modules:
            kind(model.parameters(), **given)
        field = f"lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value}"
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, settings)
        field = "dataloader"
        DataLoader([0], num_workers=args.dataloader_num_workers, prefetch_factor=args.dataloader_prefetch_factor)  # pyright: ignore
        field = f"report_to {args.report_to}"
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()
    except Exception as error:  # each package has its own
        raise InputError(f"{field}: {format_error(error)}") from error
