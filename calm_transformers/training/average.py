"""A moving average of the weights, kept beside the training, evaluated and exported in their place."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

AVERAGE_FILE = "average.safetensors"  # beside a checkpoint's weights


class WeightAverage(TrainerCallback):
    """After each step, average ← decay · average + (1 − decay) · weights, of what is trained and in float32.

    It begins as the weights after the first step.

    Args:
        decay: share of the average that stays, 0 < decay < 1.
        checkpoint: where the training goes on; `None` at its start.
    """

    def __init__(self, decay: float, checkpoint: Path | None = None):
        self.decay = decay
        self._path = None if checkpoint is None else checkpoint / AVERAGE_FILE
        self._average: AveragedModel | None = None

    def on_train_begin(self, args, state, control, *, model: nn.Module, **kwargs):
        self._average = AveragedModel(in_float32(model), multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if self._path is not None:
            self._average.load_state_dict(safetensors.torch.load_file(self._path))

    def on_step_end(self, args, state, control, *, model: nn.Module, **kwargs):
        self.average.update_parameters(in_float32(model))

    @property
    def average(self) -> AveragedModel:
        assert self._average is not None, "training made it when it began"
        return self._average

    def save(self, folder: Path) -> None:
        """Writes the average beside a checkpoint's weights."""
        safetensors.torch.save_file(self.average.state_dict(), folder / AVERAGE_FILE)

    def put_into(self, model: nn.Module) -> None:
        """Overwrites the trained weights of the model."""
        overwrite(trained(model), self.average.module.parameters())

    @contextlib.contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """Within, the model has the average; afterwards its weights again."""
        weights = [parameter.detach().clone() for parameter in trained(model)]
        self.put_into(model)
        try:
            yield
        finally:
            overwrite(trained(model), weights)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def in_float32(model: nn.Module) -> nn.ParameterList:
    """The trained weights; those that are float32 themselves are not copied."""
    return nn.ParameterList(parameter.detach().float() for parameter in trained(model))


@torch.no_grad()
def overwrite(parameters, values) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
