"""Damaged files: a command works, or ends with one sentence and no output; code in a folder is not run."""

import contextlib
import io
import json
import logging
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import main_of
from hypothesis import given, settings
from hypothesis import strategies as st
from published import PublishedRepository, write_tokenizer
from safetensors.torch import load_file, save_file

from calm_transformers.onnx_export import export
from calm_transformers.serving import serve
from calm_transformers.training.trainer import PreparedRun

pytestmark = pytest.mark.fuzz

SHORT = ["ab", "--max_new_tokens", "4"]
TRAIN = ["calm", "--recipe", "{text}.yaml", "--train_files", "{text}", "--validation_files", "{text}"]
COMMANDS = {
    "generate": ["{model}", *SHORT],
    "pages.inspect_text": ["{model}", *SHORT, "--num_candidates", "4"],
    "evaluation.brier_lm": ["--model", "{model}", "--data", "{text}", "--block_size", "8", "--max_positions", "2"],
    "evaluation.autoencoder_report": ["--model", "{model}", "--data", "{text}"],
    "evaluation.invented_words": ["--model", "{model}", "--text", "{text}", "--prompt", *SHORT, "--num_texts", "1"],
    "serving.serve": ["{model}", "--port", "0"],
    "pages.app": ["{model}", "--space", "{out}"],
    "training.train": [*TRAIN, "--init_from", "{model}", "--output_dir", "{out}", "--cache_dir", "{out}-tokens"],
    "conversion.convert": ["--calm", "{model}", "--autoencoder", "{model}/../autoencoder", "--output", "{out}"],
    **({"onnx_export.export": ["{model}", "--output", "{out}"]} if find_spec("onnx") else {}),
}
FILES = "config.json generation_config.json tokenizer.json tokenizer_config.json model.safetensors pytorch_model.bin"
KINDS = ("[]", "null", "3", '"x"', "[{}]", '{"a":', "[" * 100_000, "NaN", "\ufeff{}", "{}\0", "\udcff")
VALUES = (None, True, -1, 3, 10**9, 1.5, "x", "../../x", [], {}, {"a": 1})
INDEXES = ("{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "no"}}')
INDEXES += ('{"weight_map": {"a": "/dev/zero"}}', '{"weight_map": {"a": "../a"}}')
TENSORS = ("nan", "inf", "shape", "type", "missing", "extra")
UPSTREAM = r"it/s\]|^\[transformers\] (You are using a model of type|mtime may not)"


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """A model's folder, and a published pair with two texts; models are loaded, but neither served nor trained."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_folder, root / "model")
    for name in ("calm", "autoencoder"):
        PublishedRepository(f"energy_k4/{name}", root / name).write("bin")
    write_tokenizer(root / "calm")
    (root / "text.jsonl.yaml").write_text("kind: calm\ndata: {block_size: 16}\ntraining: {max_steps: 1}")
    (root / "text.jsonl").write_text(json.dumps({"text": 99 * "the cat sat "}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "write_folder", lambda *_: None)
        patch.setattr(serve, "run", lambda *_: None)
        patch.setattr(PreparedRun, "train_and_export", lambda _: 0)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield root


def run(command: str, words: list[str]) -> tuple[int, list[str]]:
    """Runs a command; returns its code and the lines on stderr without upstream's bars and warnings."""
    handler, printed = logging.getLogger("transformers").handlers[0], io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        stderr = handler.setStream(printed)
        try:
            code = main_of(f"calm_transformers.{command}")(words)
        finally:
            handler.setStream(stderr)
    lines = printed.getvalue().replace("\r", "\n").split("\n")
    return code, [line for line in lines if line.strip() and not re.search(UPSTREAM, line)]


def run_on(root: Path, command: str, output: Path) -> tuple[int, list[str]]:
    model = root / ("calm" if command == "conversion.convert" else "model")
    return run(command, [w.format(model=model, text=root / "text.jsonl", out=output) for w in COMMANDS[command]])


def change_field(path: Path, draw) -> None:
    fields = inner = json.loads(path.read_text())
    while isinstance(inner[key := draw(st.sampled_from(list(inner)))], dict) and inner[key] and draw(st.booleans()):
        inner = inner[key]
    inner[key] = draw(st.sampled_from(VALUES))
    path.write_text(json.dumps(fields))


def change_tensor(path: Path, draw) -> None:
    tensors = load_file(path)
    what, name = draw(st.sampled_from(TENSORS)), draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    if what in ("nan", "inf"):
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = float(what)
    changed = {"shape": tensor[:-1].clone(), "type": tensor.long()}.get(what, tensor)
    tensors |= {} if what == "missing" else {f"{name}{'x' * (what == 'extra')}": changed}
    save_file(tensors, path, {"format": "pt"})


def damage(folder: Path, draw) -> tuple[str, str]:
    """Damages one file of a folder; returns its name and what was done."""
    path = draw(st.sampled_from([folder / name for name in FILES.split() if (folder / name).exists()]))
    kinds = {".json": ["replace", "field"], ".bin": ["index"], ".safetensors": ["index", "tensor", "tensor"]}
    what = draw(st.sampled_from(["truncate", "flip", "remove", "link", *kinds[path.suffix]]))
    content = path.read_bytes()
    if what == "truncate":
        path.write_bytes(content[: len(content) * draw(st.integers(0, 19)) // 20])
    elif what == "flip":
        changed, last = bytearray(content), draw(st.sampled_from([7, 3000, len(content) - 1]))
        changed[draw(st.integers(0, last)) % len(content)] ^= 1 << draw(st.integers(0, 7))
        path.write_bytes(changed)
    elif what == "replace":
        path.write_bytes(draw(st.sampled_from(KINDS)).encode(errors="surrogateescape"))
    elif what == "field":
        change_field(path, draw)
    elif what == "tensor":
        change_tensor(path, draw)
    else:
        path.unlink()
        if what == "link":
            path.symlink_to(draw(st.sampled_from([path.name, "nowhere", "/tmp"])))
        elif what == "index":
            path.with_name(f"{path.name}.index.json").write_text(draw(st.sampled_from(INDEXES)))
    return path.name, what


@settings(max_examples=max(150, settings().max_examples))
@given(st.sampled_from(sorted(COMMANDS)), st.data())
def test_a_damaged_folder_is_read_or_named_in_one_sentence(folders, command, data):
    with tempfile.TemporaryDirectory() as temporary:
        root = shutil.copytree(folders, Path(temporary, "there"))
        is_published = command == "conversion.convert"
        file, what = damage(root / ("calm" if is_published else "model"), data.draw)
        code, lines = run_on(root, command, root / "out")
        if code == 0:
            assert what not in ("truncate", "replace", "link") or file == "tokenizer_config.json" or is_published
        else:
            assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
            names_a_value = "=" in lines[0] or "the data has" in lines[0]  # the second of a tokenizer that drops text
            assert str(root) in lines[0] or what in ("field", "flip") and names_a_value, lines
            assert command == "training.train" or not (root / "out").exists()


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("how", ["zip", "legacy", "code"])
def test_code_in_a_folder_is_not_run(folders, tmp_path, how):
    root, victim = shutil.copytree(folders, tmp_path / "there"), tmp_path / "victim"
    for source in ("model", "calm"):
        if how == "code":  # the package's is used
            for file in (root / source).glob("*.py"):
                file.write_text(f"open({str(victim)!r}, 'w')")
            continue
        pickled = root / source / "pytorch_model.bin"
        (root / source / "model.safetensors").unlink(missing_ok=True)
        torch.save({"a": Malicious(victim)}, pickled, _use_new_zipfile_serialization=how == "zip")
    for command in COMMANDS:
        code, lines = run_on(root, command, tmp_path / f"{command}-out")
        assert code == 0 if how == "code" else (code, len(lines)) == (2, 1), (command, lines)
        assert not victim.exists(), command
    if how != "code":
        torch.load(pickled, weights_only=False)  # the attack works without our loader
        assert victim.exists()
