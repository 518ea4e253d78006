"""A model and a recipe → the trained model in the run's folder: data, steps, Trainer's arguments, training, export."""

import copy
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments, get_scheduler, set_seed
from transformers.trainer_utils import SchedulerType, get_last_checkpoint

from calm.progress import load_with_bar, shows_bars, unbroken
from calm.training.average import WeightAverage
from calm.training.configuration import config_of, tokenizer_of
from calm.training.data import Length, PatchCollator, data_sets
from calm.training.recipe import Recipe, RecipeError
from calm.training.trainer import CALMTrainer, folder_of

# Trainer's own settings that our trainer relies on.
FIXED = {"remove_unused_columns": False, "logging_nan_inf_filter": False, "prediction_loss_only": True}


def defaults() -> dict:
    """Trainer's settings that recipes may change."""
    return {
        "report_to": "none",
        "logging_steps": 10,
        "save_steps": 500,
        "eval_steps": 500,
        "disable_tqdm": not shows_bars(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # torchrun on CPUs needs to be told
    }


def training_arguments(recipe: Recipe, **settled) -> TrainingArguments:
    """Trainer's arguments as the recipe states them, but for what is settled by now.

    Checkpoints are counted, and old ones removed, by our trainer.

    Raises:
        RecipeError: Trainer refuses a value.
    """
    given = copy.deepcopy(recipe.training)  # Trainer rewrites nested ones
    given.pop("save_total_limit", None)
    if "eval_strategy" not in given and (recipe.data.validation_files or recipe.data.validation_split):
        given["eval_strategy"] = "steps"
    unused = {"ddp_find_unused_parameters": recipe.head_weight == 0}
    try:
        return TrainingArguments(
            **{**defaults(), **unused, "output_dir": recipe.output_dir, **given, **FIXED, **settled}
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(f"section training: {error}") from error


def begin(recipe: Recipe) -> TrainingArguments:
    """Before the model is made: checks Trainer's arguments, quiets third-party logs, makes the folder, sets the seed.

    Returns:
        Trainer's arguments as stated.

    Raises:
        RecipeError: Trainer refuses a value, fields contradict each other, or the folder cannot be made.
    """
    check_fields(recipe)
    args = training_arguments(recipe)
    check_schedule(args)
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()  # of saving; loading and training have ours
    try:
        folder_of(args).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output_dir {args.output_dir}: {error.strerror}.") from error
    set_seed(args.seed)
    return args


def check_schedule(args: TrainingArguments) -> None:
    """Makes the schedule of learning rates as Trainer will, which does so after the model and the data.

    Raises:
        RecipeError: it cannot be made.
    """
    steps, settings = max(1, args.max_steps), args.lr_scheduler_kwargs
    if isinstance(settings, str):
        raise RecipeError(f"lr_scheduler_kwargs={settings!r}: must have fields, as in '{{num_cycles: 2}}'.")
    try:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, settings)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value}: {error}") from error


def check_fields(recipe: Recipe) -> None:
    """Raises `RecipeError` where fields contradict each other, before a model is made or read."""
    check_auxiliary(recipe)
    if recipe.lora_rank and (recipe.auxiliary_weight or recipe.freeze_backbone or not recipe.init_from):
        raise RecipeError("lora_rank needs init_from, and neither auxiliary_weight nor freeze_backbone.")
    if recipe.head_learning_rate is not None and recipe.kind != "calm":
        raise RecipeError(f"head_learning_rate={recipe.head_learning_rate}: only a CALM has a head.")
    if recipe.head_learning_rate is not None and recipe.head_learning_rate < 0:
        raise RecipeError(f"head_learning_rate={recipe.head_learning_rate}: must not be negative.")
    if not 0 <= recipe.ema_decay < 1:
        raise RecipeError(f"ema_decay={recipe.ema_decay}: must lie in [0, 1).")
    if recipe.ema_decay and recipe.training.get("fsdp"):
        raise RecipeError("ema_decay averages whole weights, and fsdp shards them: leave one of the two out.")
    if recipe.ema_decay and recipe.training.get("load_best_model_at_end"):
        raise RecipeError("ema_decay exports the last average, load_best_model_at_end the best weights: name one.")


def check_auxiliary(recipe: Recipe) -> None:
    """Raises `RecipeError` where what belongs to the multi-token loss makes no sense, or there is no such loss."""
    needs_it = {"auxiliary_decay": 0.0, "auxiliary_targets": 0, "head_weight": 1.0}
    for name, default in needs_it.items():
        value = getattr(recipe, name)
        if value != default and not recipe.auxiliary_weight:
            raise RecipeError(f"{name}={value} has no meaning without auxiliary_weight.")
    if recipe.distil and not recipe.auxiliary_weight:
        raise RecipeError(
            f"distil {recipe.distil}: teaches through the multi-token loss, whose auxiliary_weight is 0."
        )
    if not 0 <= recipe.auxiliary_decay <= 1:
        raise RecipeError(f"auxiliary_decay={recipe.auxiliary_decay}: must lie in [0, 1], a share of the steps.")
    if recipe.auxiliary_targets < 0:
        raise RecipeError(f"auxiliary_targets={recipe.auxiliary_targets}: must not be negative.")
    if not 0 < recipe.distil_weight <= 1 or (recipe.distil_weight < 1 and not recipe.distil):
        raise RecipeError(f"distil_weight={recipe.distil_weight}: must lie in (0, 1], and needs distil.")


def train_with_tokenizer(recipe: Recipe, resume: str, model_class) -> None:
    """Trains what needs a tokenizer and no other model: the autoencoder or a Llama.

    Args:
        recipe: names the tokenizer.
        resume: as in `fit`.
        model_class: whose configuration is that of the recipe's kind.

    Raises:
        RecipeError: no tokenizer, or as `config_of`.
    """
    tokenizer = tokenizer_of(recipe)
    config = config_of(recipe, tokenizer)
    stated = begin(recipe)
    load = model_class.from_pretrained
    model = load_with_bar(load, recipe.init_from) if recipe.init_from else model_class(config)
    fit(recipe, stated, model, tokenizer, getattr(config, "patch_size", 1), resume)


def fit(
    recipe: Recipe, stated: TrainingArguments, model, tokenizer, patch_size: int, resume: str = "auto"
) -> CALMTrainer:
    """Trains, going on from the last checkpoint if there is one, and exports to the run's folder.

    Args:
        recipe: what to train on, how long and how.
        stated: what `begin` returned.
        model: trained in place.
        tokenizer: exported with the model.
        patch_size: K; 1 for a Llama.
        resume: "auto", or "never" to refuse a folder with checkpoints.

    Raises:
        RecipeError, DataError: the folder or the data are not as they must be.
        TrainingStopped: the loss is no number, or a checkpoint is not of this model.
    """
    folder = folder_of(stated)
    last = last_checkpoint(folder, resume)
    batch_size = stated.train_batch_size * stated.gradient_accumulation_steps * stated.world_size
    with stated.main_process_first(desc="tokenising"):
        data = data_sets(
            recipe.data,
            tokenizer,
            patch_size,
            Length(batch_size, stated.num_train_epochs, stated.max_steps),
            seed=stated.seed if stated.data_seed is None else stated.data_seed,
            cache=Path(recipe.data.cache_dir or folder / "tokens"),
            evaluates=stated.eval_strategy != "no",
        )
    args = training_arguments(recipe, max_steps=data.num_steps, num_train_epochs=1)  # all epochs are one to Trainer
    trainer = CALMTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=PatchCollator(patch_size, recipe.kind != "autoencoder", tokenizer.pad_token_id),
        keep_checkpoints=recipe.training.get("save_total_limit", 2),
        average=WeightAverage(recipe.ema_decay, last) if recipe.ema_decay else None,
        head_learning_rate=recipe.head_learning_rate,
    )
    if trainer.is_world_process_zero():
        recipe.save(folder / "recipe.yaml")
        state = f"resuming from {last.name}" if last else "from the start"
        print(f"{data.train.summary()} in {data.num_steps} steps, {state}", flush=True)
    torch.manual_seed(args.seed + args.process_index)  # the processes see other blocks, and other noise
    with unbroken():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.export(tokenizer)
    return trainer


def last_checkpoint(folder: Path, resume: str) -> Path | None:
    """Where a run in the folder goes on.

    Raises:
        RecipeError: there is a checkpoint, and it is not to be resumed.
    """
    last = get_last_checkpoint(folder) if folder.exists() else None
    if last and resume == "never":
        raise RecipeError(f"{folder} holds {Path(last).name}: name another --output_dir, or let it resume.")
    return Path(last) if last else None
