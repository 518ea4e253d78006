"""The one training loop: Hugging Face's Trainer, with our logs, checkpoints that a kill cannot spoil, and a clean stop
when the loss is no number.

Axes: B batch, L tokens.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from calm.progress import progress_bar
from calm.training.auxiliary import AUXILIARY_FILE, WithAuxiliary, state_without_auxiliary, without_auxiliary
from calm.training.average import WeightAverage
from calm.training.diagnostics import diagnose
from calm.training.tokenizer import save_tokenizer

LOSS_TERMS = ("reconstruction_loss", "kl_loss", "auxiliary_loss")
UNFINISHED = "unfinished-checkpoint"


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to go back to."""


class CALMTrainer(Trainer):
    """Trainer for the autoencoder, CALM and AR models.

    The order of the data is the dataset's own (see `PackedBlocks`). The logs have, beside Trainer's, each loss term,
    the diagnostics of diagnostics.py, the tokens per second of all processes together, and those per second of
    this process's CPU time, which other work on the machine moves less.

    Args:
        model: trained in place.
        *args: Trainer's.
        keep_checkpoints: only the last so many; `None` keeps all.
        average: of the weights, to be evaluated and exported in their place.
        head_learning_rate: that of a CALM's head, where it is another than the rest's.
        **kwargs: Trainer's.
    """

    def __init__(
        self,
        model,
        *args,
        keep_checkpoints: int | None = None,
        average: WeightAverage | None = None,
        head_learning_rate: float | None = None,
        **kwargs,
    ):
        with keeping_use_cache(model.config):
            super().__init__(model, *args, **kwargs)
        if self.pop_callback(ProgressCallback):
            self.add_callback(TrainingBar())
        self.keep_checkpoints, self.average, self.head_learning_rate = keep_checkpoints, average, head_learning_rate
        if average is not None:
            self.add_callback(average)
        self._unfinished: str | None = None
        has_cache = hasattr(model.config, "use_cache") and not isinstance(model, WithAuxiliary)
        self._no_cache = {"use_cache": False} if has_cache else {}
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens, self._first_step = 0, 0
        self._clock: float | None = None  # when the first batch since the last log came; None before
        self._cpu_clock = 0.0
        self._last_batch: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def _get_train_sampler(self, *args, **kwargs):
        assert isinstance(self.train_dataset, Sized), "Trainer asks for a sampler only then"
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args, **kwargs):
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.head_learning_rate is not None:
            set_apart(bare(self.model).get_submodule("head").parameters(), optimizer, self.head_learning_rate)
        return optimizer

    # loss and logs

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, **self._no_cache}
        block_ids = inputs.pop("block_ids", None)
        if isinstance(self.model, WithAuxiliary) and self.model.decay:
            inputs["progress"] = self.state.global_step / self.state.max_steps
        both = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        assert isinstance(both, tuple), "return_outputs asks for both"
        loss, outputs = both
        if model.training:
            if not torch.isfinite(loss):
                self._stop(f"the loss is {loss.item()}", block_ids)
            if self._clock is None:
                self._clock, self._first_step = time.perf_counter(), self.state.global_step
                self._cpu_clock = time.process_time()
            for name in LOSS_TERMS:
                if outputs.get(name) is not None:
                    self._sums[name] = self._sums.get(name, 0) + outputs[name].detach()
            self._tokens += inputs["input_ids"].numel()
            hidden = outputs.get("last_hidden_state")
            self._last_batch = inputs["input_ids"], None if hidden is None else hidden.detach()
        return (loss, outputs) if return_outputs else loss

    def _stop(self, why: str, block_ids: torch.Tensor | None = None) -> None:
        blocks = "" if block_ids is None else f" on the blocks {block_ids.tolist()}"
        last = get_last_checkpoint(self.args.output_dir)
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise TrainingStopped(
            f"step {self.state.global_step + 1}{blocks}: {why}; {good}. A lower learning rate or a stricter "
            "max_grad_norm may help."
        )

    def log(self, logs: dict, *args, **kwargs) -> None:
        if "loss" in logs and self._last_batch is not None:
            steps = self.state.global_step - self._first_step
            for name, total in self._sums.items():
                of_all = self.accelerator.reduce(total, "sum")
                assert isinstance(of_all, torch.Tensor), "as what it sums up"
                logs[name] = of_all.item() / self._terms_per_step() / steps
            assert self._clock is not None, "the first batch of these steps started it"
            seconds = time.perf_counter() - self._clock
            logs["tokens_per_second"] = round(self._tokens * self.args.world_size / seconds, 1)
            logs["tokens_per_cpu_second"] = round(self._tokens / (time.process_time() - self._cpu_clock), 1)
            self._sums, self._tokens, self._clock = {}, 0, None
            if not self.is_fsdp_enabled:  # its parameters are at home only inside forward
                input_ids, hidden = self._last_batch
                model = bare(self.accelerator.unwrap_model(self.model))
                logs.update(diagnose(model, input_ids, hidden, seed=self.state.global_step))
        super().log(logs, *args, **kwargs)

    def _terms_per_step(self) -> int:
        """By what a term, summed over the micro-batches and processes of a step, is to be divided.

        Where Trainer passes the whole batch's item count to the model, the terms are shares of a mean already.
        """
        return 1 if self.model_accepts_loss_kwargs else self.args.gradient_accumulation_steps * self.args.world_size

    def evaluate(self, *args, **kwargs):
        with self.average.in_place_of_weights(self.model) if self.average else contextlib.nullcontext():
            return super().evaluate(*args, **kwargs)

    # checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        """Under another name first, so that a checkpoint cut short by a kill is never taken for one."""
        broken = [name for name, p in self.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if broken:
            self._stop(f"the weights are not finite any more, {broken[0]} first")
        run_folder = folder_of(self.args)
        unfinished = run_folder / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(run_folder / name, ignore_errors=True)
            os.replace(unfinished / name, run_folder / name)
            shutil.rmtree(unfinished)
            self._remove_old_checkpoints(run_folder)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _remove_old_checkpoints(self, run_folder: Path) -> None:
        if self.keep_checkpoints:
            folders = sorted(run_folder.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
            for folder in folders[: -self.keep_checkpoints]:
                shutil.rmtree(folder)

    def _save(self, output_dir=None, state_dict=None) -> None:
        folder = folder_of(self.args) if output_dir is None else Path(output_dir)
        if self.args.should_save:
            self._write_model(folder, state_dict)
            if isinstance(self.model, WithAuxiliary):
                state = state_dict or self.model.state_dict()
                auxiliary = {key: value for key, value in state.items() if key.startswith("auxiliary.")}
                safetensors.torch.save_file(auxiliary, folder / AUXILIARY_FILE)
            if self.average is not None:
                self.average.save(folder)
            torch.save(self.args, folder / "training_args.bin")

    def _write_model(self, folder: Path, state_dict: dict | None) -> None:
        """Weights, configuration and code, without the auxiliary loss. `state_dict` is the gathered one under FSDP."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        model: PreTrainedModel = without_auxiliary(unwrapped)  # pyright: ignore[reportAssignmentType]  # or PEFT's
        if state_dict is not None:
            if isinstance(unwrapped, WithAuxiliary):
                state_dict = state_without_auxiliary(state_dict)
            model, state_dict = unsharded(model, state_dict)
        model.save_pretrained(folder, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if model is None and isinstance(self.model, WithAuxiliary):
            state = safetensors.torch.load_file(Path(resume_from_checkpoint) / AUXILIARY_FILE)
            auxiliary = {key.removeprefix("auxiliary."): value for key, value in state.items()}
            self.model.auxiliary.load_state_dict(auxiliary)
            model = self.model.calm
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # other parameters are trained now
            raise TrainingStopped(f"the optimizer of {checkpoint} is not of this run: {error}") from error

    def _issue_warnings_after_load(self, load_result) -> None:
        """Upstream only warns when a checkpoint does not fit. Tied weights are allowed to be missing."""
        state = without_auxiliary(self.model).state_dict()
        loaded = {value.data_ptr() for key, value in state.items() if key not in load_result.missing_keys}
        missing = [key for key in load_result.missing_keys if state[key].data_ptr() not in loaded]
        if missing or load_result.unexpected_keys:
            raise TrainingStopped(
                "the checkpoint is not of this model: "
                f"missing {missing[:3]}, unexpected {load_result.unexpected_keys[:3]}."
            )

    # export

    def export(self, tokenizer) -> None:
        """Writes the model to `output_dir` as a repository that loads by itself: weights, code, tokenizer.

        A LoRA adapter is merged into the weights, and also written alone, to the folder `adapter`. Where there is an
        average of the weights, it goes before them.
        """
        folder = folder_of(self.args)
        if self.average is not None:
            self.average.put_into(self.model)
        merge = getattr(self.model, "merge_and_unload", None)
        if merge is not None:
            if self.args.should_save:
                self._write_model(folder / "adapter", None)
            self.model = merge()
        state_dict = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            self._write_model(folder, state_dict)
            save_tokenizer(tokenizer, folder)
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self.accelerator.wait_for_everyone()


class TrainingBar(ProgressCallback):
    """One bar of the training's steps, which begins where a resumed run does, and says how far an evaluation is.

    Upstream's counts the steps of before as done now, and shows a second bar for each evaluation.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = progress_bar(None, "Training", "step", state.max_steps, done=state.global_step)
        self.num_evaluated = 0

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.training_bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader: Sized | None = None, **kwargs):
        self.num_evaluated += 1
        if self.training_bar is not None and eval_dataloader is not None:
            self.training_bar.set_postfix_str(f"evaluating {self.num_evaluated}/{len(eval_dataloader)}")

    def on_evaluate(self, args, state, control, **kwargs):
        self.num_evaluated = 0
        if self.training_bar is not None:
            self.training_bar.set_postfix_str("")


def folder_of(args: TrainingArguments) -> Path:
    """Where a run writes."""
    assert args.output_dir is not None, "upstream fills it in where it is left out"
    return Path(args.output_dir)


@contextlib.contextmanager
def keeping_use_cache(config):
    """transformers 5's Trainer turns `use_cache` off, or puts it, in a configuration that is not its own."""
    before = {name: value for name, value in vars(config).items() if name == "use_cache"}
    try:
        yield
    finally:
        vars(config).pop("use_cache", None)
        vars(config).update(before)


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, out of the auxiliary loss or a LoRA wrapper."""
    model = without_auxiliary(model)
    base_of = getattr(model, "get_base_model", None)
    return model if base_of is None else base_of()


def set_apart(parameters: Iterable[torch.nn.Parameter], optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives the parameters a learning rate of their own; all else stays as their groups have it."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": own, "lr": rate})


def unsharded(model: PreTrainedModel, state_dict: dict) -> tuple[PreTrainedModel, dict]:
    """An empty model to call `save_pretrained` on with a gathered state dict, and that without copies of tied weights.

    FSDP2 puts a class of torch's own over the model's, and its code would be written beside the weights, not ours.
    """
    plain = next(c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, FSDPModule))
    with torch.device("meta"):
        empty = plain(model.config)
    empty.tie_weights()
    empty.generation_config = model.generation_config
    unique = {name for name, _ in empty.named_parameters()}
    tied = {name for name, _ in empty.named_parameters(remove_duplicate=False)} - unique
    return empty, {name: value for name, value in state_dict.items() if name not in tied}
