"""An exponential moving average (EMA) of the weights, which is evaluated and exported in their place."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

AVERAGE_FILE = "average.safetensors"  # in a checkpoint folder


class WeightAverage(TrainerCallback):
    """After each step sets average ← decay · average + (1 − decay) · weights, for the trainable weights, in float32.

    The average starts as the weights after the first step.

    Args:
        decay: 0 < decay < 1.
        checkpoint: folder of the checkpoint that is resumed, `None` for a new run.
    """

    def __init__(self, decay: float, checkpoint: Path | None = None):
        self.decay = decay
        self._path = None if checkpoint is None else checkpoint / AVERAGE_FILE
        self._average: AveragedModel | None = None

    def on_train_begin(self, args, state, control, *, model: nn.Module, **kwargs):
        self._average = AveragedModel(trainable_in_float32(model), multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if self._path is not None:
            self._average.load_state_dict(safetensors.torch.load_file(self._path))

    def on_step_end(self, args, state, control, *, model: nn.Module, **kwargs):
        self.average.update_parameters(trainable_in_float32(model))

    @property
    def average(self) -> AveragedModel:
        assert self._average is not None, "on_train_begin makes it"
        return self._average

    def save(self, folder: Path) -> None:
        """Writes the average into a checkpoint's folder."""
        safetensors.torch.save_file(self.average.state_dict(), folder / AVERAGE_FILE)

    def copy_to(self, model: nn.Module) -> None:
        """Copies the average into the model's trainable parameters."""
        copy_parameters(trainable_parameters(model), self.average.module.parameters())

    @contextlib.contextmanager
    def average_parameters(self, model: nn.Module) -> Iterator[None]:
        """Context manager: the model has the average inside, and its own weights again afterwards."""
        weights = [parameter.detach().clone() for parameter in trainable_parameters(model)]
        self.copy_to(model)
        try:
            yield
        finally:
            copy_parameters(trainable_parameters(model), weights)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trainable_in_float32(model: nn.Module) -> nn.ParameterList:
    """Returns the trainable parameters in float32; those that are float32 already are not copied."""
    return nn.ParameterList(parameter.detach().float() for parameter in trainable_parameters(model))


@torch.no_grad()
def copy_parameters(parameters: Iterable[nn.Parameter], values: Iterable[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
