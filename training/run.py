"""What the train_* commands share: command line, tokenizer, data sets, training arguments, fit and export."""

import argparse
import sys
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from calm.training.cost import print_cost
from calm.training.data import (
    PackedBlocks,
    PatchCollator,
    Separation,
    StreamedBlocks,
    TokenFile,
    cached_tokens,
    tokenize_documents,
)
from calm.training.data import tokenizer_fingerprint as fingerprint
from calm.training.documents import BadLines, DataError, expand_paths, read_documents, read_hub_dataset
from calm.training.extras import MissingPackage, need
from calm.training.recipe import CONFIGS, Recipe, RecipeError, load_recipe, parse_command_line, recipe_names
from calm.training.tokenizer import filler_token_id, load_tokenizer
from calm.training.trainer import CALMTrainer, TrainingStopped

# Trainer's own settings that our trainer relies on.
FIXED = {"remove_unused_columns": False, "logging_nan_inf_filter": False, "prediction_loss_only": True}


def defaults() -> dict:
    """Trainer's settings that recipes may change."""
    return {
        "report_to": "none",
        "logging_steps": 10,
        "save_steps": 500,
        "eval_steps": 500,
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # torchrun on CPUs needs to be told
    }


def command(kind: str, description: str, work, arguments: list[str] | None = None) -> int:
    """Reads the command line, calls `work(recipe, options)`, and turns a known error into one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        epilog=f"Every field of the recipe can be given as --field value. Recipes: {', '.join(recipe_names())}.",
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
    parser.add_argument("--dry_run", action="store_true", help="print sizes, FLOPs and memory, and exit")
    parser.add_argument(
        "--resume", default="auto", choices=["auto", "never"], help="auto: go on where output_dir's checkpoints end"
    )
    options, rest = parser.parse_known_args(arguments)
    try:
        recipe = load_recipe(options.recipe, parse_command_line(rest))
        if recipe.kind != kind:
            raise RecipeError(f"the recipe {options.recipe!r} is for train_{recipe.kind}.")
        work(recipe, options)
    except (RecipeError, DataError, MissingPackage, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_config(config_class, values: dict):
    """The configuration; a value that it refuses becomes a `RecipeError`."""
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error


class NotThere(RecipeError):
    """What a recipe needs is not named or, so far, not there; a dry run can do without.

    Args:
        why: half a sentence.
    """

    def __init__(self, message: str, why: str):
        super().__init__(message)
        self.why = why


def folder_or_hub_id(what: str, where: str | None, maker: str) -> str:
    """`where`, unless it is missing or clearly a folder that isn't there.

    Raises:
        NotThere: that is so.
    """
    if where is None:
        message = f"no {what}: give --{what} a folder or a Hub id ({maker} makes one)."
        raise NotThere(message, f"no {what} is named")
    if not Path(where).exists() and (where.startswith(("runs/", ".", "/")) or where.count("/") > 1):
        message = f"{what} {where}: no such folder ({maker} makes one)."
        raise NotThere(message, f"the {what} {where} is not there yet")
    return where


def read(what: str, where: str | None, maker: str, reader):
    """`reader(where)`: a tokenizer or a configuration.

    Raises:
        NotThere: it is not named, no such folder, or not to be had from the Hub.
        RecipeError: the folder is there, and is none.
    """
    where = folder_or_hub_id(what, where, maker)
    try:
        return reader(where)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).partition("\n\n")[0].split())
        if Path(where).exists():
            raise RecipeError(f"{what} {where}: cannot be read: {reason}") from error
        message = f"{what} {where}: no such folder, nor to be had from the Hub: {reason}"
        raise NotThere(message, f"the {what} {where} cannot be had") from error


def tokenizer_of(recipe: Recipe):
    """The tokenizer that the recipe names, or the one beside the model that it goes on from.

    Raises:
        RecipeError: there is none, or it cannot be read.
    """
    where = recipe.tokenizer or recipe.init_from or recipe.autoencoder
    return read("tokenizer", where, "train_tokenizer", load_tokenizer)


def tokenizer_fields(tokenizer) -> dict:
    """What a configuration takes from the tokenizer; nothing where a dry run has none."""
    if tokenizer is None:
        return {}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**special, "vocab_size": len(tokenizer)}


def if_there(load, recipe: Recipe, named: str | None, fields: list[str], notes: list[str]):
    """For a dry run: `load(recipe)`, or `None` and a note on the `fields` that come from somewhere else then.

    A recipe that names nothing and states the fields, as the published ones do, gets no note.
    """
    try:
        return load(recipe)
    except NotThere as error:
        config_class = CONFIGS[recipe.kind]
        missing = [field for field in fields if field not in recipe.model]
        values = {**config_class().to_dict(), **recipe.model}
        source = f"{config_class.__name__}'s default" if missing else "the recipe's"
        if named or missing:
            stated = ", ".join(f"{field} {values[field]:,}" for field in missing or fields)
            notes.append(f"{stated}: {source}, for {error.why}")
        return None


def config_before(recipe: Recipe):
    """The configuration of the model that the recipe goes on from.

    Raises:
        RecipeError: there is none, it cannot be read, or it is of another kind than the recipe.
    """
    config_class = CONFIGS[recipe.kind]
    where, maker = recipe.init_from, f"train_{recipe.kind}"
    fields, _ = read("init_from", where, maker, PretrainedConfig.get_config_dict)
    if fields.get("model_type") != config_class.model_type:
        found = fields.get("model_type")
        raise RecipeError(f"init_from {where}: is a model of type {found!r}, not {config_class.model_type!r}.")
    return config_class.from_dict(fields)


def train_with_tokenizer(recipe: Recipe, options, model_class, stated: dict | None = None) -> None:
    """Trains what needs a tokenizer and no other model, the autoencoder or a Llama; or prints what that would cost.

    Args:
        options: of the command line.
        model_class: whose configuration is that of the recipe's kind.
        stated: fields of the configuration that the recipe goes before.

    Raises:
        RecipeError: no tokenizer, or as `config_before` and `make_config`.
    """
    notes: list[str] = []
    if options.dry_run:
        tokenizer = if_there(tokenizer_of, recipe, recipe.tokenizer, ["vocab_size"], notes)
    else:
        tokenizer = tokenizer_of(recipe)
    if recipe.init_from:
        config, notes = config_before(recipe), []
    else:
        values = {**(stated or {}), **recipe.model, **tokenizer_fields(tokenizer)}
        config = make_config(CONFIGS[recipe.kind], values)
    if options.dry_run:
        return print_cost(recipe, config, notes)
    args = training_arguments(recipe)
    start(args)
    model = model_class.from_pretrained(recipe.init_from) if recipe.init_from else model_class(config)
    fit(recipe, model, tokenizer, getattr(config, "patch_size", 1), args, options.resume)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Trainer's arguments. Checkpoints are counted, and old ones removed, by our trainer."""
    given = {key: value for key, value in recipe.training.items() if key != "save_total_limit"}
    if "eval_strategy" not in given and (recipe.data.validation_files or recipe.data.validation_split):
        given["eval_strategy"] = "steps"
    try:
        unused = {"ddp_find_unused_parameters": recipe.head_weight == 0}
        return TrainingArguments(**{**defaults(), **unused, "output_dir": recipe.output_dir, **given, **FIXED})
    except (ValueError, TypeError) as error:
        raise RecipeError(f"section training: {error}") from error


# data


def documents(recipe: Recipe, part: str):
    """Documents of the "train" or "validation" part, and where they come from (JSON, for the cache key)."""
    options = recipe.data
    paths = options.train_files if part == "train" else options.validation_files
    bad_lines = BadLines(options.skip_bad_lines)
    if paths:
        files = expand_paths(paths)
        source = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        texts = read_documents(files, options.text_column, bad_lines)
    elif options.dataset:
        need("datasets", "train", "a Hub data set")
        from datasets import load_dataset

        split = options.dataset_split if part == "train" else options.validation_split
        stream = options.streaming and part == "train"
        dataset = load_dataset(options.dataset, options.dataset_config, split=split, streaming=stream)
        source = [options.dataset, options.dataset_config, split, getattr(dataset, "_fingerprint", None)]
        texts = read_hub_dataset(dataset, options.text_column, bad_lines)
    else:
        raise RecipeError("no data: give --train_files files or folders, or --dataset a Hub data set.")
    return _limited(texts, options.max_documents, bad_lines), source


def _limited(texts, limit, bad_lines):
    for number, text in enumerate(texts):
        if number == limit:
            break
        yield text
    if bad_lines.count:
        print(f"warning: {bad_lines.summary()}", file=sys.stderr)


def separation_of(recipe: Recipe, patch_size: int) -> Separation:
    options = recipe.data
    return Separation(options.append_eos, options.pad_to_patch, patch_size if options.pad_to_patch else 1)


def tokens(recipe: Recipe, part: str, tokenizer, patch_size: int, args: TrainingArguments) -> TokenFile:
    options = recipe.data
    separation = separation_of(recipe, patch_size)
    texts, source = documents(recipe, part)
    key = {
        "source": source,
        "text_column": options.text_column,
        "max_documents": options.max_documents,
        "separation": [separation.append_eos, separation.pad_to_patch, separation.patch_size],
        "tokenizer": fingerprint(tokenizer),
    }
    folder = Path(options.cache_dir or Path(recipe.output_dir) / "tokens")
    with args.main_process_first(desc="tokenising"):
        return cached_tokens(folder, key, lambda: tokenize_documents(texts, tokenizer, separation))


def training_blocks(recipe: Recipe, tokenizer, patch_size: int, args: TrainingArguments):
    """Training blocks for the whole run, streamed or from the token file."""
    options = recipe.data
    cut = {
        "block_size": options.block_size,
        "patch_size": patch_size,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "random_phase": options.random_phase,
        "left_fill": options.left_fill,
        "filler_token_id": filler_token_id(tokenizer),
    }
    if options.streaming:
        if args.max_steps <= 0:
            raise RecipeError("streaming needs max_steps: a stream has no length.")
        separation = separation_of(recipe, patch_size)
        return StreamedBlocks(
            lambda epoch: tokenize_documents(documents(recipe, "train")[0], tokenizer, separation), **cut
        )
    train = PackedBlocks(tokens(recipe, "train", tokenizer, patch_size, args), **cut)
    # All epochs are one to Trainer, in whole batches; see PackedBlocks.
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps <= 0:
        args.max_steps = -int(-args.num_train_epochs * train.blocks_per_epoch // batch)
    args.num_train_epochs = 1
    train.num_blocks = args.max_steps * batch
    return train


def validation_blocks(recipe: Recipe, tokenizer, patch_size: int, args: TrainingArguments) -> PackedBlocks | None:
    if args.eval_strategy == "no":
        return None
    held_out = tokens(recipe, "validation", tokenizer, patch_size, args)
    blocks = PackedBlocks(held_out, recipe.data.block_size, patch_size)
    blocks.num_blocks = min(blocks.num_blocks, recipe.data.validation_blocks or blocks.num_blocks)
    return blocks


# fit


def fit(recipe: Recipe, model, tokenizer, patch_size: int, args: TrainingArguments, resume: str) -> CALMTrainer:
    """Trains, going on from the last checkpoint if there is one, and exports to the run's folder."""
    output_dir = Path(args.output_dir)
    last = get_last_checkpoint(output_dir) if output_dir.exists() else None
    if last and resume == "never":
        raise RecipeError(f"{output_dir} holds {Path(last).name}: name another --output_dir, or let it resume.")
    train = training_blocks(recipe, tokenizer, patch_size, args)
    trainer = CALMTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation_blocks(recipe, tokenizer, patch_size, args),
        data_collator=PatchCollator(patch_size, recipe.kind != "autoencoder", tokenizer.pad_token_id),
        keep_checkpoints=recipe.training.get("save_total_limit", 2),
    )
    if trainer.is_world_process_zero():
        recipe.save(output_dir / "recipe.yaml")
        state = f"resuming from {Path(last).name}" if last else "from the start"
        print(f"{train.summary()} in {args.max_steps} steps, {state}", flush=True)
    torch.manual_seed(args.seed + args.process_index)  # the processes see other blocks, and other noise
    trainer.train(resume_from_checkpoint=last)
    trainer.export(tokenizer)
    return trainer


def start(args: TrainingArguments) -> None:
    """Quiet third-party logs and a seed, before the model is made."""
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()  # of loading and saving; training has its own
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
