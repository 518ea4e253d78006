"""ONNX export: graphs agree with the model at any size, and generate.py samples the same tokens without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from commands import refusal
from model_copies import ROOT
from tiny import BOS, HEAD_TYPES, record_calls, seeded, tiny_model, tiny_tokenizer
from torch import nn
from transformers import GenerationConfig

from calm_transformers.model.generation_calm_samplers import PatchSampling, RowRandomness
from calm_transformers.model.generation_calm_upstream import GENERATION_SETTINGS, USED_SETTINGS
from calm_transformers.onnx_export import export as export_onnx
from calm_transformers.onnx_export import generate_onnx
from calm_transformers.onnx_export.export import main
from calm_transformers.training.tokenizer import save_tokenizer

pytestmark = pytest.mark.transformers
K, PROMPT = 4, "Once upon"
# Tracing the other heads takes longer.
EACH_HEAD = [pytest.param(each, marks=[] if each == "energy" else pytest.mark.slow) for each in HEAD_TYPES]


class RecordedNoise(generate_onnx.Randomness):
    """Replays recorded noise in order and checks the requested shapes."""

    def __init__(self, values: dict[str, list[np.ndarray]]):
        super().__init__()
        self.recorded = {name: iter(each) for name, each in values.items()}

    def noise(self, spec, shape):
        noise = next(self.recorded[spec["name"]])
        assert noise.shape == shape and noise.dtype == np.float32, (noise.shape, shape)
        return noise

    def exponential(self, num_samples):
        return next(self.recorded["exponential"])


@pytest.fixture(scope="module")
def exporter():
    for package in export_onnx.PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed (extra [onnx])")


def small_model(head_type: str = "energy", **settings):
    """Returns a tiny model with repeating candidates; all head types have the same backbone and autoencoder."""
    steps = {"flow": 1, "diffusion": 2}.get(head_type)  # few, because each step is traced
    reference, model = tiny_model(), tiny_model(head_type, sampling_steps=steps)
    model.model.load_state_dict(reference.model.state_dict())
    model.autoencoder.load_state_dict(reference.autoencoder.state_dict())
    with torch.no_grad():
        if head_type == "energy":
            model.head.out_proj.weight.mul_(0.1)
            model.head.out_proj.bias.normal_(generator=seeded())
    for name, value in {"do_sample": True, "temperature": 0.5, "num_candidates": 12, **settings}.items():
        setattr(model.generation_config, name, value)
    return model


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(tiny_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def exported(exporter, tmp_path_factory):
    """Exports the energy model by the command; returns the folder of exports and the printed lines."""
    base = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        save(small_model(repetition_penalty=1.3), base / "model")
        assert export_onnx.main([str(base / "model"), "--output", str(base / "energy")]) == 0
    return base, lines


def export_folder(exported, head_type: str) -> Path:
    base, _ = exported
    folder = base / head_type
    if not folder.exists():
        shutil.copytree(base / "energy", folder)
        model = small_model(head_type)
        (folder / "calm.json").write_text(json.dumps(export_onnx.export_config(model)))
        with torch.no_grad(), export_onnx.traceable(model.head):
            graph = export_onnx.head_graph(model)
            export_onnx.write_graph("head", graph, folder / "head.onnx", None)
    return folder


def test_the_command_writes_a_folder_and_reports_each_graph(exported):
    base, lines = exported
    graphs = {f"{part}.onnx{end}" for part in ("backbone", "head", "decoder") for end in ("", ".data")}
    others = {"calm.json", "tokenizer.json", "generate.py"}
    assert {path.name for path in (base / "energy").iterdir()} == graphs | others
    assert not [path for path in base.iterdir() if path.name.startswith(".")]
    output = "".join(lines)
    assert all(f"{part}: " in output for part in export_onnx.GRAPH_BUILDERS)
    assert output.count("largest relative difference") == 3 and "Wrote" in output
    assert f"warning: generate.py ignores repetition_penalty=1.3 of {base / 'model'}." in lines
    assert str(ROOT).encode() not in (base / "energy" / "backbone.onnx").read_bytes()


PARTS = [("energy", part) for part in export_onnx.GRAPH_BUILDERS if part != "head"]
PARTS += [pytest.param(*each.values, "head", marks=each.marks) for each in EACH_HEAD]


@pytest.mark.parametrize("head_type, part", PARTS)
def test_graphs_agree_with_the_model_at_other_sizes(exported, head_type, part):
    folder = export_folder(exported, head_type)
    with torch.no_grad():
        graph = export_onnx.GRAPH_BUILDERS[part](small_model(head_type))
    assert len({inputs[graph.inputs[0]].shape for inputs, _ in graph.cases}) >= 2
    assert export_onnx.max_relative_error(folder / f"{part}.onnx", graph) <= 1e-4
    for _, outputs in graph.cases:  # a difference is detected
        values = outputs[graph.outputs[-1]]
        values.mul_(1.001) if values.is_floating_point() else values.add_(1)
    assert export_onnx.max_relative_error(folder / f"{part}.onnx", graph) > 1e-4


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_noise_has_the_distribution_of_the_head(head_type):
    model = small_model(head_type)
    like = torch.zeros(1, model.config.hidden_size)
    config, noise = export_onnx.export_config(model), model.head.predrawn_noise(4000, 1, like, seeded())
    assert [spec["name"] for spec in config["noises"]] == list(noise)
    for spec, expected in zip(config["noises"], noise.values(), strict=True):
        shape = tuple({"draws": 4000, "rows": 1}.get(size, size) for size in spec["shape"])
        exported = generate_onnx.Randomness(0).noise(spec, shape)
        assert shape == tuple(expected.shape) and exported.dtype == np.float32
        levels = np.linspace(0, 1, 21)[1:-1]
        assert np.quantile(exported, levels) == pytest.approx(np.quantile(expected.numpy(), levels), abs=0.05)


def generate_recorded(model, monkeypatch, prompt: str, length: int, **settings):
    """Generates with the model; returns its tokens and the noise of its steps: the head's and "exponential"."""
    exponential = record_calls(monkeypatch, RowRandomness, "numbers", lambda noise_RN, *_: noise_RN[0].numpy())
    noises = record_calls(monkeypatch, RowRandomness, "noise_arguments")
    ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
    settings |= {"do_sample": True, "sampling_method": "batch", "generator": [seeded(3)]}
    sequences = model.generate(ids, max_new_tokens=length, **settings)
    recorded = {name: [noise[name].numpy() for noise in noises] for name in noises[0]}
    return sequences[0, ids.shape[1] :].tolist(), {**recorded, "exponential": exponential}


@pytest.mark.parametrize(
    "head_type, settings, prompt",
    [
        *(pytest.param(*each.values, {"temperature": 0.4}, PROMPT, marks=each.marks) for each in EACH_HEAD),
        ("energy", {"temperature": 1.0}, ""),
        ("energy", {"temperature": 1.0, "top_k": 2}, "abc"),
        ("energy", {"temperature": 1.7, "top_p": 0.9}, "abcd"),
        ("energy", {"temperature": 1 / 3, "num_candidates": 60, "top_k": 20, "top_p": 0.8, "min_p": 0.1}, PROMPT),
    ],
)
def test_the_same_noise_gives_the_same_tokens_as_the_model(exported, monkeypatch, head_type, settings, prompt):
    """The length ends within a patch; the prompts, with BOS, are one token, a patch, or not divisible into patches."""
    folder, model = export_folder(exported, head_type), small_model(head_type, eos_token_id=None)
    settings = {"num_candidates": 12, **settings}
    expected, recorded = generate_recorded(model, monkeypatch, prompt, 22, **settings)
    exported_model = generate_onnx.ExportedCALM(folder, num_threads=1)
    exported_model.config["eos_token_ids"] = []
    ids = exported_model.tokenizer.encode(prompt).ids
    tokens = list(exported_model.generate_tokens(ids, 22, RecordedNoise(recorded), **settings))
    assert len(expected) == 22 and len(set(expected)) > 4 and tokens == expected


def test_an_eos_within_a_patch_is_the_last_token(exported):
    folder = exported[0] / "energy"
    model = generate_onnx.ExportedCALM(folder, num_threads=1)

    def generate(eos):
        model.config["eos_token_ids"] = [eos]
        return list(model.generate_tokens([BOS, 5, 6], 40, generate_onnx.Randomness(1), temperature=1.0))

    whole = generate(-1)
    index = next(i for i, token in enumerate(whole) if i > 4 and i % K == 1 and token not in whole[:i])
    assert len(whole) == 40 and generate(whole[index]) == whole[: index + 1]


def test_streamed_parts_add_up_to_the_text(exported):
    model = generate_onnx.ExportedCALM(exported[0] / "energy", num_threads=1)
    model.config["eos_token_ids"] = []
    ids = model.tokenizer.encode(PROMPT).ids
    settings = {"max_new_tokens": 9, "temperature": 1.0}
    *two, again = (generate_onnx.Randomness(seed) for seed in (2, 3, 2))
    first, second = (list(model.generate_tokens(ids, randomness=each, **settings)) for each in two)
    parts = model.generate_text(PROMPT, randomness=again, **settings)
    assert PROMPT + "".join(parts) == model.tokenizer.decode(ids + first)
    assert first != second


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["transformers"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_exported_command(exported):
    script = str(exported[0] / "energy" / "generate.py")

    def run(*words):
        words = [sys.executable, "-c", WITHOUT_TORCH, script, *map(str, words)]
        return subprocess.run(words, capture_output=True, text=True, timeout=60)

    options = [PROMPT, "--max_new_tokens", "6", "--seed", "0", "--num_threads", "1"]
    first, again = run(*options), run(*options)
    assert first.returncode == 0 and first.stdout.startswith(PROMPT) and first.stdout == again.stdout
    assert not first.stderr
    max_length = 2048 * K
    failed = run(PROMPT, "--max_new_tokens", max_length)
    assert failed.returncode == 2 and not failed.stdout
    assert failed.stderr.startswith(f"error: the prompt has 10 tokens and {max_length} are to be written, but the")


INVALID = [{"temperature": temperature} for temperature in (2.01, float("nan"), 0.1, 1e-320)]
INVALID += [{"top_k": -1}, {"top_p": 1.1}, {"min_p": -0.1}]


@pytest.mark.parametrize("settings", INVALID)
def test_invalid_sampling_settings_raise_errors(settings):
    settings = {"temperature": 1.0, "num_candidates": 9, **settings}
    with pytest.raises(generate_onnx.InputError, match="^(temperature|num_candidates|top_k|top_p|min_p)="):
        generate_onnx.Sampling(**settings).check()
    with pytest.raises(ValueError):
        PatchSampling(**settings)


def test_models_that_cannot_be_exported_raise_errors(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert refusal(capsys, main, other, "--output", tmp_path / "new") == f"{other} is no CALM."
    (other / "config.json").write_text('{"model_type": "calm", "head_type": "mine"}')
    assert "head of type 'mine': those exported are energy" in refusal(capsys, main, other, "--output", tmp_path / "n")
    monkeypatch.setattr(export_onnx, "PACKAGES", ("no_such_package",))
    message = refusal(capsys, main, ROOT, "--output", tmp_path / "new")
    assert message.endswith('needs no_such_package: pip install "calm-transformers[onnx]".')
    assert sorted(tmp_path.iterdir()) == [other]


def test_an_existing_output_raises_an_error(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "exists already" in refusal(capsys, main, ROOT, "--output", tmp_path)
    assert "is not a folder" in refusal(capsys, main, ROOT, "--output", tmp_path / "nowhere" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_opset_and_a_missing_tokenizer_raise_errors(exporter, capsys, tmp_path):
    model, words = tmp_path / "model", (tmp_path / "model", "--output", tmp_path / "new")
    small_model().save_pretrained(model)
    for opset in (9, 999):
        message = refusal(capsys, main, *words, "--opset", opset)
        assert message.startswith(f"--opset {opset}: must be at least 18, and ")
    assert refusal(capsys, main, *words) == f"{model}: no tokenizer can be read there."
    for content in ("{", "{}"):
        (model / "tokenizer.json").write_text(content)
        assert refusal(capsys, main, *words).startswith(f"{model}/tokenizer.json: no tokenizer can be read there (")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def wrong_decoder(model):
    class Wrong(nn.Module):
        def forward(self, latents):
            logits = 1.001 * model.autoencoder.decode(latents)
            return logits.argmax(-1), logits

    graph = export_onnx.decoder_graph(model)
    graph.module = Wrong()
    return graph


def test_wrong_graphs_and_interruptions_leave_no_files(exporter, capsys, tmp_path, monkeypatch):
    words = [str(save(small_model(), tmp_path / "model")), "--output", str(tmp_path / "new")]
    full_disk = Mock(side_effect=OSError("problem writing element 9"))
    for graph, code, message in (
        (wrong_decoder, 2, "error: decoder.onnx differs from the model by 1.0e-03 of the largest output"),
        (Mock(side_effect=KeyboardInterrupt()), 130, "error: interrupted.\n"),
        (full_disk, 2, f"error: {tmp_path}/new: problem writing element 9.\n"),
    ):
        monkeypatch.setattr(export_onnx, "GRAPH_BUILDERS", {"decoder": graph})
        assert export_onnx.main(words) == code and message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_settings_are_exported_or_named():
    for settings, ignored in (
        ({"do_sample": False, "sampling_method": "exact"}, ["do_sample=False", "sampling_method='exact'"]),
        ({"max_length": 512, "suppress_tokens": [7]}, ["max_length=512", "suppress_tokens=[7]"]),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.1, "max_new_tokens": 30, "temperature": 1.2}, []),
        ({"repetition_penalty": 1.0, "typical_p": 1.0, "min_length": 0, "cache_implementation": "static"}, []),
    ):
        model = small_model(**settings)
        assert export_onnx.ignored_settings(model.generation_config) == ignored
        defaults = {"temperature": 0.5, "num_candidates": 12, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        defaults |= {"max_new_tokens": None}
        expected = {name: settings.get(name, default) for name, default in defaults.items()}
        assert export_onnx.export_config(model).items() >= expected.items()


def test_no_setting_is_forgotten():
    """Every setting is exported, named in the warning, or doesn't change the generated text."""
    generation = GenerationConfig()
    for name in GENERATION_SETTINGS:
        setattr(generation, name, "something")
    named = {field.split("=")[0] for field in export_onnx.ignored_settings(generation)}
    exported = {*generate_onnx.Sampling._fields, *export_onnx.SUPPORTED_LENGTH_SETTINGS}
    exported |= {"do_sample", "bos_token_id", "pad_token_id"}
    assert set(USED_SETTINGS) - named - exported == {
        *("prefill_chunk_size", "compile_config", "disable_compile"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len"),
        *("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
    }


def test_generate_names_a_damaged_file_a_wrong_folder_and_a_wrong_seed(exported, capsys, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(exported[0] / "energy", folder)
    for name in ("decoder.onnx", "tokenizer.json", "calm.json"):
        (folder / name).write_text("{")
        message = refusal(capsys, generate_onnx.main, PROMPT, "--folder", folder)
        assert message.startswith(f"{folder / name} cannot be read: ")
    message = refusal(capsys, generate_onnx.main, PROMPT, "--folder", tmp_path)
    assert message.startswith(f"{tmp_path / 'calm.json'} does not exist")
    assert "must not be negative" in refusal(capsys, generate_onnx.main, PROMPT, "--seed", "-1")
