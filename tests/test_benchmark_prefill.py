"""The prefill benchmark compares what it says."""

import pytest
import torch
from commands import refusal
from tiny import tiny_config

from calm.benchmarks import prefill
from calm.modeling_calm import CALMForCausalLM


def test_the_llama_has_the_backbone_s_layers():
    config = tiny_config()
    llama = prefill.random_model(prefill.same_backbone(config), torch.device("cpu"), torch.float32)
    shapes = {name: p.shape for name, p in llama.model.named_parameters()}
    backbone = {name: p.shape for name, p in CALMForCausalLM(config).model.named_parameters()}
    assert shapes == {name: shape for name, shape in backbone.items() if not name.startswith("embed_proj")}


def test_medians_leave_out_the_first_round(monkeypatch):
    values = iter([0, 100, 0, 100, 0, 3, 0, 30, 0, 5, 0, 10, 0, 1, 0, 20])
    monkeypatch.setattr(prefill.Meter, "clock", lambda device: prefill.Meter(lambda: next(values), lambda a, b: b - a))
    assert prefill.seconds([lambda: None, lambda: None], torch.device("cpu"), 3) == [3, 20]


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(prefill, "shape_config", lambda shape: tiny_config())
    prefill.main(["--prompt_length", "16", "--repetitions", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("calm-m, 16 tokens: ") and lines[1].startswith("Llama of the same backbone, 4 tokens: ")
    assert lines[2].startswith("ratio: ")


@pytest.mark.parametrize("options", [["--prompt_length", "15"], ["--repetitions", "0"], ["--shape", "transformer-s"]])
def test_bad_options_are_refused(options, capsys):
    assert options[-1] in refusal(capsys, prefill.main, *options)
