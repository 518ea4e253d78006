"""A model and a recipe → the trained model in the run's folder: data, steps, Trainer's arguments, training, export."""

import copy
import itertools
import math
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from calm.command_line import InputError, sentence
from calm.loading import load_whole
from calm.progress import hide_upstream_bars, shows_bars
from calm.training.average import WeightAverage
from calm.training.configuration import config_of, read, say, tokenizer_of
from calm.training.data import Length, PackedBlocks, PatchCollator, data_sets
from calm.training.recipe import Recipe, changes, load_recipe
from calm.training.tokenizer import save_tokenizer
from calm.training.trainer import CALMTrainer, checkpoints, damage, folder_of, last_checkpoint

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


def defaults() -> dict:
    """Trainer's settings that recipes may change."""
    return {
        "report_to": "none",
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "eval_steps": 500,
        "disable_tqdm": not shows_bars(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # torchrun on CPUs needs to be told
    }


def training_arguments(recipe: Recipe, **settled) -> TrainingArguments:
    """Trainer's arguments as the recipe states them, but for what is settled by now.

    Raises:
        InputError: Trainer refuses a value.
    """
    given = copy.deepcopy(recipe.training)  # Trainer rewrites nested ones
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise InputError(f"{name}={given[name]!r}: leave it out, training here relies on {value!r}.")
    if "eval_strategy" not in given and (recipe.data.validation_files or recipe.data.validation_split):
        given["eval_strategy"] = "steps"
    unused = {"ddp_find_unused_parameters": recipe.head_weight == 0}
    try:
        return TrainingArguments(
            **{**defaults(), **unused, "output_dir": recipe.output_dir, **given, **FIXED, **settled}
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"section training: {error}") from error


def begin(recipe: Recipe) -> TrainingArguments:
    """Before the model is made: checks Trainer's arguments, quiets third-party logs, makes the folder, sets the seed.

    Returns:
        Trainer's arguments as stated.

    Raises:
        InputError: Trainer refuses a value, fields contradict each other, or the folder cannot be made.
    """
    check_fields(recipe)
    args = training_arguments(recipe)
    check_arguments(args)
    transformers.logging.set_verbosity_warning()
    hide_upstream_bars()
    try:
        folder_of(args).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {args.output_dir}: {error.strerror}.") from error
    set_seed(args.seed)
    return args


def check_arguments(args: TrainingArguments) -> None:
    """Makes what Trainer will make of its arguments after the model and the data: optimizer, schedule, reporters.

    Raises:
        InputError: it cannot be made, as for want of a package, or nothing would be trained.
    """
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
        raise InputError(f"{field}: {sentence(error)}") from error


def check_fields(recipe: Recipe) -> None:
    """Raises `InputError` where fields contradict each other, before a model is made or read."""
    check_auxiliary(recipe)
    if recipe.lora_rank and (recipe.auxiliary_weight or recipe.freeze_backbone or not recipe.init_from):
        raise InputError("lora_rank needs init_from, and neither auxiliary_weight nor freeze_backbone.")
    if recipe.head_learning_rate is not None and recipe.kind != "calm":
        raise InputError(f"head_learning_rate={recipe.head_learning_rate}: only a CALM has a head.")
    if recipe.head_learning_rate is not None and recipe.head_learning_rate < 0:
        raise InputError(f"head_learning_rate={recipe.head_learning_rate}: must not be negative.")
    decays = {"weight_decay": recipe.training.get("weight_decay", 0.0)}
    for name, value in {**vars(recipe), **decays}.items():
        if name in ("auxiliary_weight", "head_weight", "weight_decay") and value < 0:
            raise InputError(f"{name}={value}: must not be negative.")
    if not 0 <= recipe.ema_decay < 1:
        raise InputError(f"ema_decay={recipe.ema_decay}: must lie in [0, 1).")
    if recipe.ema_decay and recipe.training.get("fsdp"):
        raise InputError("ema_decay averages whole weights, and fsdp shards them: leave one of the two out.")
    if recipe.ema_decay and recipe.training.get("load_best_model_at_end"):
        raise InputError("ema_decay exports the last average, load_best_model_at_end the best weights: name one.")


def check_auxiliary(recipe: Recipe) -> None:
    """Raises `InputError` where what belongs to the multi-token loss makes no sense, or there is no such loss."""
    needs_it = {"auxiliary_decay": 0.0, "auxiliary_targets": 0, "head_weight": 1.0}
    for name, default in needs_it.items():
        value = getattr(recipe, name)
        if value != default and not recipe.auxiliary_weight:
            raise InputError(f"{name}={value} has no meaning without auxiliary_weight.")
    if recipe.distil and not recipe.auxiliary_weight:
        raise InputError(f"distil {recipe.distil}: teaches through the multi-token loss, whose auxiliary_weight is 0.")
    if not 0 <= recipe.auxiliary_decay <= 1:
        raise InputError(f"auxiliary_decay={recipe.auxiliary_decay}: must lie in [0, 1], a share of the steps.")
    if recipe.auxiliary_targets < 0:
        raise InputError(f"auxiliary_targets={recipe.auxiliary_targets}: must not be negative.")
    if not 0 < recipe.distil_weight <= 1 or (recipe.distil_weight < 1 and not recipe.distil):
        raise InputError(f"distil_weight={recipe.distil_weight}: must lie in (0, 1], and needs distil.")


def train_with_tokenizer(recipe: Recipe, resume: str, model_class) -> Callable[[], None]:
    """Prepares the training of what needs a tokenizer and no other model: the autoencoder or a Llama.

    Args:
        recipe: names the tokenizer.
        resume: as in `fit`.
        model_class: whose configuration is that of the recipe's kind.

    Raises:
        InputError: no tokenizer, or as `config_of`.
    """
    tokenizer = tokenizer_of(recipe)
    config = config_of(recipe, tokenizer)
    stated = begin(recipe)
    load = partial(load_whole, model_class.from_pretrained)
    model = (
        read("init_from", recipe.init_from, f"train_{recipe.kind}", load) if recipe.init_from else model_class(config)
    )
    return fit(recipe, stated, model, tokenizer, getattr(config, "patch_size", 1), resume)


def fit(
    recipe: Recipe, stated: TrainingArguments, model, tokenizer, patch_size: int, resume: str = "auto"
) -> Callable[[], None]:
    """Prepares a training, resumed from the last checkpoint if there is one, which exports to the run's folder.

    Args:
        recipe: what to train on, how long and how.
        stated: what `begin` returned.
        model: trained in place.
        tokenizer: exported with the model.
        patch_size: K; 1 for a Llama.
        resume: "auto", or "never" to refuse a folder with checkpoints.

    Returns:
        the training; called, it raises `InputError` where the loss is no number or a checkpoint another model's.

    Raises:
        InputError: the folder or the data are not as they must be.
    """
    folder = folder_of(stated)
    last = last_checkpoint(folder)
    before = resumed_recipe(recipe, last, resume)
    batch_size = stated.train_batch_size * stated.gradient_accumulation_steps * stated.world_size
    with stated.main_process_first(desc="tokenising"):
        data = data_sets(
            recipe.data,
            tokenizer,
            patch_size,
            Length(batch_size, stated.num_train_epochs, stated.max_steps),
            seed=stated.seed if stated.data_seed is None else stated.data_seed,
            cache=Path(recipe.data.cache_dir or Path(HF_HOME) / "calm" / "tokens"),
            evaluates=stated.eval_strategy != "no",
        )
    recipe.found = {"batch_size": batch_size, "tokens": digest(data.train)}
    if before and (changed := changes(before, recipe)):
        say(f"going on with {changed}")
    args = training_arguments(recipe, max_steps=data.num_steps, num_train_epochs=1)  # all epochs are one to Trainer
    trainer = CALMTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=PatchCollator(patch_size, recipe.kind != "autoencoder", tokenizer.pad_token_id),
        average=WeightAverage(recipe.ema_decay, last) if recipe.ema_decay else None,
        head_learning_rate=recipe.head_learning_rate,
    )
    if trainer.is_world_process_zero():
        recipe.save(folder / "recipe.yaml")
        save_tokenizer(tokenizer, folder)
        state = f"resuming from {last.name}" if last else "from the start"
        print(f"{data.train.summary()} in {data.num_steps} steps, {state}", flush=True)

    def train() -> None:
        torch.manual_seed(args.seed + args.process_index)  # the processes see other blocks, and other noise
        transformers.logging.disable_progress_bar()  # of saving
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except BaseException:
            if shows_bars():
                print(file=sys.stderr)  # below the bar
            raise
        trainer.export()
        say(f"the model is in {folder}")

    return train


def resumed_recipe(recipe: Recipe, last: Path | None, resume: str) -> Recipe | None:
    """Reads the recipe of the run that is resumed, `None` where one starts; says which checkpoints are damaged.

    Args:
        recipe: by which to train now.
        last: checkpoint to resume from.
        resume: as in `fit`.

    Raises:
        InputError: there is a checkpoint, and it is not to be resumed, or it is of another training.
    """
    folder = Path(recipe.output_dir)
    found, saved = checkpoints(folder), folder / "recipe.yaml"
    if found and resume == "never":
        raise InputError(f"{folder} holds {found[0].name}: name another --output_dir, or let it resume.")
    before = load_recipe(str(saved)) if found and saved.is_file() else None
    if before and before.training.get("save_only_model"):
        raise InputError(f"{folder} has no optimizer (save_only_model), so it can't go on: name another --output_dir.")
    for damaged in itertools.takewhile(lambda path: path != last, found):
        say(f"{damaged} {damage(damaged)}, and is not used")
    if before and last:
        changes(before, recipe)
        return before
    return None


def digest(data) -> str | None:
    """A checksum of the training text's tokens: their number, the first and the last million; `None` of a stream."""
    if not isinstance(data, PackedBlocks):
        return None
    tokens = data.data.tokens
    return f"{len(tokens)}-{zlib.crc32(tokens[-(2**20) :].tobytes(), zlib.crc32(tokens[: 2**20].tobytes())):08x}"
