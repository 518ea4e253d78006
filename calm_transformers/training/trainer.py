"""Trains a model by a recipe into the run's folder. The entry point is `prepare_run`.

The loop is Hugging Face's Trainer with more logs, checkpoints whose completeness can be checked, and a clean stop if
the loss is not finite.
"""

import contextlib
import itertools
import json
import multiprocessing.util
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from calm_transformers.command_line import InputError, format_error, require_package
from calm_transformers.files import written
from calm_transformers.progress import hide_upstream_bars, shows_bars
from calm_transformers.training.auxiliary import (
    AUXILIARY_FILE,
    TrainedCALM,
    WithAuxiliary,
    calm_state_dict,
    without_auxiliary,
)
from calm_transformers.training.data import (
    PackedBlocks,
    PatchCollator,
    RunLength,
    StreamedBlocks,
    build_datasets,
    token_cache_dir,
)
from calm_transformers.training.diagnostics import diagnose
from calm_transformers.training.recipe import (
    Recipe,
    allowed_changes,
    check_arguments,
    check_fields,
    load_recipe,
    training_arguments,
)
from calm_transformers.training.speed import Speed
from calm_transformers.training.tokenizer import save_tokenizer
from calm_transformers.training.upload import Upload

LOSS_TERMS = ("reconstruction_loss", "kl_loss", "auxiliary_loss")
MAX_UNCHECKED_LOSSES = 1000
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again


# a run


def set_up(recipe: Recipe) -> TrainingArguments:
    """Checks the recipe and returns its TrainingArguments; quiets third-party logs and sets the seed."""
    check_fields(recipe)
    args = training_arguments(recipe)
    check_arguments(args)
    transformers.logging.set_verbosity_warning()
    hide_upstream_bars()
    set_seed(args.seed)
    return args


def prepare_run(
    recipe: Recipe,
    initial_args: TrainingArguments,
    model,
    tokenizer,
    patch_size: int,
    resume: str = "auto",
    flops_per_token: float = 0.0,
) -> "PreparedRun":
    """Tokenises the data, builds the trainer and writes the recipe; the caller starts the training.

    `initial_args` come from `set_up`; `patch_size` is K, 1 for a Llama; `resume` is "auto", to resume from the last
    checkpoint if there is one, or "never", which makes it an error.
    """
    folder = output_folder(initial_args)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {folder}: {error.strerror}.") from error
    upload = None
    with initial_args.main_process_first(local=False, desc="restoring"):
        if recipe.upload_to and initial_args.process_index == 0:
            upload = Upload(recipe.upload_to)
            upload.restore(recipe, last_checkpoint(folder) is not None, resume)
    checkpoint = last_checkpoint(folder)
    previous = load_resumed_recipe(recipe, checkpoint, resume)
    batch_size = initial_args.train_batch_size * initial_args.gradient_accumulation_steps * initial_args.world_size
    with initial_args.main_process_first(desc="tokenising"):
        datasets = build_datasets(
            recipe.data,
            tokenizer,
            patch_size,
            RunLength(
                *(batch_size, initial_args.num_train_epochs, initial_args.max_steps),
                *(initial_args.process_index, initial_args.world_size),
            ),
            seed=initial_args.seed if initial_args.data_seed is None else initial_args.data_seed,
            cache=token_cache_dir(recipe.data),
            evaluates=initial_args.eval_strategy != "no",
        )
    recipe.run_facts = {"batch_size": batch_size, "tokens": token_digest(datasets.train)}
    if previous and (changes := allowed_changes(previous, recipe)):
        log_rank0(f"resuming with changed fields: {changes}")
    # Built again, now that the number of steps is known; for Trainer the dataset with all epochs' blocks is one epoch.
    is_stream = isinstance(datasets.train, StreamedBlocks)  # which knows its position
    args = training_arguments(recipe, max_steps=datasets.num_steps, num_train_epochs=1, ignore_data_skip=is_stream)
    trainer = CALMTrainer(
        model=model,
        args=args,
        train_dataset=datasets.train,
        eval_dataset=datasets.validation,
        data_collator=PatchCollator(
            patch_size, skip_first_patch=recipe.kind != "autoencoder", pad_token_id=tokenizer.pad_token_id
        ),
        checkpoint=checkpoint,
        flops_per_token=flops_per_token,
    )
    if checkpoint and is_stream:
        if not (checkpoint / trainer._stream_file()).exists():
            raise InputError(f"{checkpoint} is of a stream of another number of processes: resume with that.")
        trainer.add_callback(RestoredRandomness(trainer))
    if trainer.is_world_process_zero():
        recipe.save(folder / "recipe.yaml")
        save_tokenizer(tokenizer, folder)
        state = f"resuming from {checkpoint.name}" if checkpoint else "new run"
        print(f"{datasets.train.summary()} in {datasets.num_steps} steps, {state}", flush=True)
        if upload is not None:
            upload.begin(folder / "recipe.yaml")
            trainer.add_callback(upload)
    return PreparedRun(trainer, checkpoint, upload)


@dataclass
class PreparedRun:
    """A run that is ready to start, with the `checkpoint` to resume from, `None` for a new run."""

    trainer: "CALMTrainer"
    checkpoint: Path | None
    upload: Upload | None = None

    def train_and_export(self) -> int:
        """Trains and writes the model; returns 0, or `EXIT_PREEMPTED` after a SIGTERM, with a checkpoint saved."""
        args, preemption = self.trainer.args, Preemption()
        self.trainer.add_callback(preemption)
        torch.manual_seed(args.seed + args.process_index)  # each process needs its own noise
        transformers.logging.disable_progress_bar()  # the one of saving
        with contextlib.ExitStack() as stack:
            if self.upload is not None:
                stack.callback(self.upload.wait)
            try:
                self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            except BaseException:
                if shows_bars():
                    print(file=sys.stderr)  # below the bar
                raise
            if preemption.is_stopped:
                log_rank0(f"SIGTERM: saved step {self.trainer.state.global_step}; the same command resumes")
                return EXIT_PREEMPTED
            with written(output_folder(args)):
                self.trainer.export()
            if self.upload is not None:
                self.upload.finish(output_folder(args))
        log_rank0(f"the model is in {output_folder(args)}")
        return 0


def ignore_sigterm(init: Callable[[int], None] | None, worker_id: int) -> None:
    """Lets a DataLoader worker outlive a SIGTERM to all processes, as the step that is saved needs its batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init is not None:
        init(worker_id)


def end_workers() -> None:
    """Kills the DataLoader workers that are left when the process ends: they ignore the SIGTERM that Python sends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


class RestoredRandomness(TrainerCallback):
    """Restores the random state of a checkpoint at the first step, as Trainer does where it skips data."""

    def __init__(self, trainer: "CALMTrainer"):
        self.trainer, self.checkpoint = trainer, trainer.checkpoint

    def on_step_begin(self, args, state, control, **kwargs):
        if self.checkpoint is not None:
            self.trainer._load_rng_state(str(self.checkpoint))
            self.checkpoint = None


class Preemption(TrainerCallback):
    """On SIGTERM, saves a checkpoint at the end of the step and stops: all processes at the same step."""

    def __init__(self):
        self.is_signalled = self.is_stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        # On the CPU, so that no step waits for the device.
        self._group = torch.distributed.new_group(backend="gloo") if args.world_size > 1 else None
        self._previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_) -> None:
        self.is_signalled = True

    def on_step_end(self, args, state, control, **kwargs):
        is_signalled = self.is_signalled
        if self._group is not None:  # a signal may reach the processes at different steps
            is_signalled = torch.tensor(is_signalled, dtype=torch.int)
            torch.distributed.all_reduce(is_signalled, torch.distributed.ReduceOp.MAX, self._group)
        self.is_stopped = bool(is_signalled) and state.global_step < state.max_steps  # the last step ends as always
        if self.is_stopped:
            control.should_save = control.should_training_stop = True
            args.load_best_model_at_end, args.save_total_limit = False, None  # or Trainer may delete this checkpoint

    def on_train_end(self, args, state, control, **kwargs):
        if not self.is_stopped:  # else this process ends with its code, also if its own signal comes late
            signal.signal(signal.SIGTERM, self._previous)


def load_resumed_recipe(recipe: Recipe, last: Path | None, resume: str) -> Recipe | None:
    """Returns the recipe of the run to resume, checked against `recipe`, or `None`; logs damaged checkpoints."""
    folder = Path(recipe.output_dir)
    existing, saved_recipe = checkpoints(folder), folder / "recipe.yaml"
    if existing and resume == "never":
        raise InputError(f"{folder} contains {existing[0].name}: name another --output_dir, or let it resume.")
    previous = load_recipe(str(saved_recipe)) if existing and saved_recipe.is_file() else None
    if previous and previous.training.get("save_only_model"):
        raise InputError(f"{folder} has no optimizer (save_only_model) to resume from: name another --output_dir.")
    for damaged in itertools.takewhile(lambda path: path != last, existing):
        log_rank0(f"{damaged} {find_damage(damaged)}, and is not used")
    if previous and last:
        allowed_changes(previous, recipe)  # only for its error, before the data is tokenised
        return previous
    return None


def token_digest(dataset) -> str | None:
    """Returns a checksum of the number of tokens and the first and last million of them; `None` for a stream."""
    if not isinstance(dataset, PackedBlocks):
        return None
    tokens = dataset.tokens
    return f"{len(tokens)}-{zlib.crc32(tokens[-(2**20) :].tobytes(), zlib.crc32(tokens[: 2**20].tobytes())):08x}"


def log_rank0(line: str) -> None:
    """Prints a line in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# the loop


class CALMTrainer(Trainer):
    """Trainer for the autoencoder, CALM and AR models, on datasets that are already shuffled (see `PackedBlocks`).

    It also logs each loss term, the diagnostics and the speed (see `Speed`).

    Args:
        checkpoint: that is resumed, if there is one.
        flops_per_token: of the training, forward and backward; `total_flos` is counted by it.
    """

    def __init__(self, model, *args, checkpoint: Path | None = None, flops_per_token: float = 0.0, **kwargs):
        use_cache = {name: value for name, value in vars(model.config).items() if name == "use_cache"}
        super().__init__(model, *args, **kwargs)
        vars(model.config).pop("use_cache", None)  # Trainer set it to False, or added it: undone here
        vars(model.config).update(use_cache)
        self.checkpoint = checkpoint
        self._stream: Any = None  # a StatefulDataLoader
        has_cache = hasattr(model.config, "use_cache") and not isinstance(model, TrainedCALM)
        self._no_cache = {"use_cache": False} if has_cache else {}  # a cache would only take memory
        self._sums: dict[str, torch.Tensor] = {}
        self._losses: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []  # step, loss and blocks, unchecked
        self._first_step: int | None = None  # since the last log
        self._is_warm = False
        self._speed: Speed | None = None  # since the last log
        self.flops_per_token = flops_per_token
        self._last_batch: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def _get_train_sampler(self, *args, **kwargs):
        assert isinstance(self.train_dataset, Sized), "Trainer needs no sampler for iterable datasets"
        return SequentialSampler(self.train_dataset)

    def get_train_dataloader(self):
        """Returns Trainer's, or of a stream, whose processes read parts of their own, one that knows its position."""
        multiprocessing.util.Finalize(None, end_workers, exitpriority=1)
        if not isinstance(self.train_dataset, StreamedBlocks):
            loader = super().get_train_dataloader()
            loader.worker_init_fn = partial(ignore_sigterm, loader.worker_init_fn)
            return loader
        require_package("torchdata", "train", "streaming")
        from torchdata.stateful_dataloader import StatefulDataLoader

        args = self.args
        self._stream = StatefulDataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(ignore_sigterm, None),
        )
        if self.checkpoint is not None:
            self._stream.load_state_dict(torch.load(self.checkpoint / self._stream_file()))
        return self._stream

    def _stream_file(self) -> str:
        return f"stream_{self.args.process_index}_of_{self.args.world_size}.pt"

    # loss and logs

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        return self.flops_per_token * inputs["input_ids"].numel()

    def get_batch_samples(self, *args, **kwargs):
        if self._is_warm and self._speed is None:
            self._speed = Speed()
        self._is_warm, start = True, time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        if self._speed is not None:
            self._speed.data_seconds += time.perf_counter() - start
        return samples

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        """Returns the loss, and in training records what `log` needs."""
        inputs = {**inputs, **self._no_cache}
        block_ids = inputs.pop("block_ids", None)
        result = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        assert isinstance(result, tuple), "of loss and outputs"
        loss, outputs = result
        if model.training:
            self._losses.append((self.state.global_step + 1, loss.detach().clone(), block_ids))
            if len(self._losses) == MAX_UNCHECKED_LOSSES:
                self._check_losses()
            if self._first_step is None:
                self._first_step = self.state.global_step
            for name in LOSS_TERMS:
                if outputs.get(name) is not None:
                    self._sums[name] = self._sums.get(name, 0) + outputs[name].detach()
            if self._speed is not None:
                self._speed.tokens += inputs["input_ids"].numel()
            hidden = outputs.get("last_hidden_state")
            self._last_batch = inputs["input_ids"], None if hidden is None else hidden.detach()
        return (loss, outputs) if return_outputs else loss

    def _check_losses(self) -> None:
        """Raises InputError if a loss since the last check is not finite; at each step the host would have to wait."""
        steps, self._losses = self._losses, []
        finite = torch.stack([loss for _, loss, _ in steps]).isfinite().tolist() if steps else []
        for is_finite, (step, loss, block_ids) in zip(finite, steps, strict=True):
            if not is_finite:
                self._raise_not_finite(f"the loss is {loss.item()}", step, block_ids)

    def _raise_not_finite(self, problem: str, step: int, block_ids: torch.Tensor | None = None) -> None:
        blocks = "" if block_ids is None else f" on the blocks {block_ids.tolist()}"
        last = last_checkpoint(output_folder(self.args))
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise InputError(
            f"step {step}{blocks}: {problem}; {good}. A lower learning rate or a stricter max_grad_norm may help."
        )

    def log(self, logs: dict, *args, **kwargs) -> None:
        """Also logs the means of the loss terms since the last log, the speed and the diagnostics."""
        self._check_losses()
        if "loss" in logs and self._last_batch is not None:
            assert self._first_step is not None, "compute_loss sets it"
            steps = self.state.global_step - self._first_step
            # With num_items_in_batch, micro-batch terms already sum to the mean over the whole batch.
            num_micro_batches = self.args.gradient_accumulation_steps * self.args.world_size
            sums_per_step = 1 if self.model_accepts_loss_kwargs else num_micro_batches
            for name, local_sum in self._sums.items():
                total: Any = self.accelerator.reduce(local_sum, "sum")
                logs[name] = total.item() / sums_per_step / steps
            if self._speed is not None:
                logs.update(self._speed.results(self.args, self.flops_per_token))
            self._sums, self._speed, self._first_step = {}, None, None
            if not self.is_fsdp_enabled:  # which gathers the parameters only inside forward
                input_ids, hidden = self._last_batch
                model = unwrap_model(self.accelerator.unwrap_model(self.model))
                logs.update(diagnose(model, input_ids, hidden, seed=self.state.global_step))
        super().log(logs, *args, **kwargs)

    # checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        self._check_losses()
        broken = [name for name, p in self.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if broken:
            self._raise_not_finite(f"the weights are not finite any more, {broken[0]} first", self.state.global_step)
        if self.args.should_save:  # a damaged checkpoint of this step is overwritten: mark it as incomplete
            checkpoint = output_folder(self.args) / f"checkpoint-{self.state.global_step}"
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        with written(output_folder(self.args)):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir) -> None:
        """Waits for all processes, since the next file, `TRAINER_STATE_NAME`, marks the checkpoint as complete."""
        super()._save_rng_state(output_dir)
        if self._stream is not None:
            torch.save(self._stream.state_dict(), Path(output_dir) / self._stream_file())
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None) -> None:
        """Writes the model and, in checkpoints, the auxiliary loss."""
        folder = output_folder(self.args) if output_dir is None else Path(output_dir)
        if self.args.should_save:
            self._write_model(folder, state_dict)
            torch.save(self.args, folder / "training_args.bin")
        if self.args.should_save and folder != output_folder(self.args):  # in checkpoints only
            if isinstance(self.model, WithAuxiliary):
                state = state_dict or self.model.state_dict()
                auxiliary = {key: value for key, value in state.items() if key.startswith("auxiliary.")}
                safetensors.torch.save_file(auxiliary, folder / AUXILIARY_FILE)

    def _write_model(self, folder: Path, state_dict: dict | None) -> None:
        """Writes weights, configuration and code without the auxiliary loss; `state_dict` is gathered under FSDP."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        model: PreTrainedModel = without_auxiliary(unwrapped)  # pyright: ignore[reportAssignmentType]  # or PEFT's
        if state_dict is not None:
            if isinstance(unwrapped, TrainedCALM):
                state_dict = calm_state_dict(state_dict)
            model, state_dict = empty_model_and_state(model, state_dict)
        model.save_pretrained(folder, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        try:
            if model is None and isinstance(self.model, TrainedCALM):
                if isinstance(self.model, WithAuxiliary):
                    state = safetensors.torch.load_file(Path(resume_from_checkpoint) / AUXILIARY_FILE)
                    auxiliary = {key.removeprefix("auxiliary."): value for key, value in state.items()}
                    self.model.auxiliary.load_state_dict(auxiliary)
                model = self.model.calm
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{resume_from_checkpoint} can't be loaded: {format_error(error)}") from error

    def _push_from_checkpoint(self, checkpoint_folder) -> None:
        """Copies the model's code to the uploaded folder, once, as an upload may still be running, and pushes."""
        folder = output_folder(self.args)
        for file in Path(checkpoint_folder).glob("*.py") if self.is_world_process_zero() else ():
            if not (folder / file.name).exists():
                shutil.copy(file, folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        optimizer: Any = self.optimizer
        settings = optimizer.param_groups[0].keys()  # loading replaces them
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError) as error:  # the trained parameters differ
            raise InputError(f"the optimizer of {checkpoint} doesn't fit this run: {error}") from error
        if missing := settings - optimizer.param_groups[0].keys():
            raise InputError(
                f"the optimizer of {checkpoint} is not {OptimizerNames(self.args.optim).value}: no {min(missing)}"
            )

    def _load_best_model(self) -> None:
        if isinstance(self.model, TrainedCALM) and self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result) -> None:
        """Raises an error where Trainer only warns about missing or unexpected keys; tied weights may be missing."""
        state = without_auxiliary(self.model).state_dict()
        loaded = {value.data_ptr() for key, value in state.items() if key not in load_result.missing_keys}
        missing = [key for key in load_result.missing_keys if state[key].data_ptr() not in loaded]
        if missing or load_result.unexpected_keys:
            raise InputError(
                "the checkpoint doesn't fit this model: "
                f"missing {missing[:3]}, unexpected {load_result.unexpected_keys[:3]}."
            )

    # export

    def export(self) -> None:
        """Writes the model with its code to `output_dir`, and uploads it if `push_to_hub` is set.

        A LoRA adapter is merged into the weights, and also saved separately in the folder `adapter`.
        """
        folder = output_folder(self.args)
        merge = getattr(self.model, "merge_and_unload", None)
        if merge is not None:
            if self.args.should_save:
                self._write_model(folder / "adapter", None)
            self.model = merge()
        state_dict = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            self._write_model(folder, state_dict)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="End of training")


# the folder of a run


def output_folder(args: TrainingArguments) -> Path:
    assert args.output_dir is not None, "TrainingArguments has a default"
    return Path(args.output_dir)


def checkpoints(folder: Path) -> list[Path]:
    """Returns a run's checkpoint folders, complete or not, latest first."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the latest undamaged checkpoint of a run."""
    return next((path for path in checkpoints(folder) if find_damage(path) is None), None)


def find_damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, such as "was not finished", or `None`; tensors are not read."""
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return "was not finished"
    needed = {"weights": "*model*.safetensors", "optimizer": "optimizer*", "schedule": "scheduler.pt"}
    for what, pattern in needed.items():
        if not any(checkpoint.glob(pattern)) and not (what == "weights" and any(checkpoint.glob("*_fsdp*"))):
            return f"has no {what} ({pattern})"
    for file in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        try:
            if file.suffix == ".json":
                fields = dict(json.loads(file.read_text(encoding="utf-8")))
                if file.name == TRAINER_STATE_NAME and checkpoint.name != f"checkpoint-{fields['global_step']}":
                    raise ValueError(f"it is from step {fields['global_step']}")
            elif file.suffix == ".safetensors":
                safetensors.safe_open(file, "pt").__exit__(None, None, None)
            elif file.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(file).close()
        except Exception as error:  # each format has its own
            return f"has a damaged {file.name} ({format_error(error)})"
    return None


def unwrap_model(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model without the wrapper of the auxiliary loss or of LoRA."""
    model = without_auxiliary(model)
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def empty_model_and_state(model: PreTrainedModel, state_dict: dict) -> tuple[PreTrainedModel, dict]:
    """Returns a meta-device model that can save a gathered state dict, and the state dict without tied copies.

    FSDP2 replaces the model's class by a subclass from torch, so that `save_pretrained` would write the wrong code.
    """
    classes = type(model).__mro__
    model_class = next(c for c in classes if issubclass(c, PreTrainedModel) and not issubclass(c, FSDPModule))
    with torch.device("meta"):
        empty = model_class(model.config)
    empty.tie_weights()
    empty.generation_config = model.generation_config
    unique = {name for name, _ in empty.named_parameters()}
    tied = {name for name, _ in empty.named_parameters(remove_duplicate=False)} - unique
    return empty, {name: value for name, value in state_dict.items() if name not in tied}
