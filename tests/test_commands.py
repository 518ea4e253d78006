"""All commands: `--help` succeeds; a user's error is one line "error: …" on stderr and exit code 2."""

import contextlib
import functools
import io
import os
import re
import subprocess
import sys

import pytest
from commands import CLI, COMMANDS, ROOT, main_of, refusal
from server_process import save_tiny_model

from calm_transformers import cli
from calm_transformers.command_line import EXIT_BROKEN_PIPE, InputError, Parser, command, known_errors

NOWHERE = "./no/such/place"
TOKENIZER, DATA = ["--tokenizer", NOWHERE], ["--data", NOWHERE, "--block_size", "8"]
MISSING_PATHS = {  # modules of the package, and scripts in docs/ → arguments with a path that doesn't exist
    "pages.app": [NOWHERE, "--space", "{tmp}"],  # without it gradio is required first
    "benchmarks.generation": ["--json", f"{NOWHERE}/rows.json"],
    "benchmarks.gpu": ["--device", "cpu", "--pairs", NOWHERE],
    "benchmarks.operations": ["--shape", NOWHERE],
    "benchmarks.serving": ["--model", NOWHERE],
    "benchmarks.speed": ["--folder", f"/dev/null/{NOWHERE}"],  # it creates folders, but can't in a file
    "benchmarks.training_step": ["--recipe", NOWHERE],
    "conversion.convert": ["--calm", NOWHERE, "--autoencoder", NOWHERE, "--output", "{tmp}"],
    "conversion.release": ["--version", "0", "--output", NOWHERE],
    "onnx_export.export": [NOWHERE, "--output", "{tmp}"],
    "onnx_export.generate_onnx": ["Once", "--folder", NOWHERE],
    "pages.inspect_text": [NOWHERE],
    "generate": [NOWHERE],
    "docs.stale_figures": [NOWHERE],  # these take no path
    "docs.weight": [NOWHERE],
    "evaluation.autoencoder_report": ["--model", NOWHERE, *DATA[:2]],
    "evaluation.brier_lm": ["--model", NOWHERE, *DATA],
    "evaluation.invented_words": ["--model", NOWHERE, "--text", NOWHERE],
    "experiments.__main__": ["--corpus", NOWHERE, "--output", "{tmp}"],
    "experiments.language": ["--output", f"/dev/null/{NOWHERE}"],
    "experiments.oracle_ablation": ["--model", NOWHERE, "--language", NOWHERE],
    "experiments.optimal_fraction": ["--model", NOWHERE, "--language", NOWHERE],
    "experiments.temperature_fidelity": ["--model", NOWHERE, "--language", NOWHERE],
    "serving.serve": [NOWHERE, "--port", "0"],
    "training.tokenize": ["--recipe", "demo-backbone", "--output", "tokens", *TOKENIZER],
    "training.train": ["calm", "--recipe", "demo-backbone", *TOKENIZER],
}
MISSING_PATHS = {n if n.startswith("docs.") else f"calm_transformers.{n}": it for n, it in MISSING_PATHS.items()}
# The others have a required option, whose absence would be reported first.
WITHOUT_REQUIRED = {f"calm_transformers.benchmarks.{name}" for name in ("generation", "training_step")}
WITHOUT_REQUIRED |= {name for name in MISSING_PATHS if name.startswith("docs.")}
TAKES_A_MODEL = {f"calm_transformers.{n}" for n in ("pages.inspect_text", "serving.serve", "onnx_export.export")}
LOADS_A_MODEL = [name for name, words in MISSING_PATHS.items() if "--model" in words or name in TAKES_A_MODEL]


@pytest.fixture(params=COMMANDS)
def module(request, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return request.param


@functools.cache
def help_of(module: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        main_of(module)(["--help"])
    assert ended.value.code in (0, None)
    return printed.getvalue()


def test_help_begins_with_the_command_as_typed_and_options_have_underscores(module):
    assert " ".join(help_of(module).split()).startswith(f"usage: {COMMANDS[module]} ")
    options = set(re.findall(r"--[a-z][\w-]*", help_of(module)))
    assert {option for option in options if "-" in option[2:]} <= {"--push-to-hub"}


def test_an_unknown_option_is_one_line(module, capsys):
    required = [] if module in WITHOUT_REQUIRED else MISSING_PATHS[module]
    assert "no_such_option" in refusal(capsys, main_of(module), *required, "--no_such_option", "1")


def test_a_missing_path_is_named_in_one_line(module, capsys, tmp_path):
    words = [word.format(tmp=tmp_path / "new") for word in MISSING_PATHS[module]]
    assert NOWHERE.strip("./") in refusal(capsys, main_of(module), *words)
    assert not (tmp_path / "new").exists()


def test_only_known_errors_become_one_line(capsys):
    @command
    def main(argv: list[str]) -> None:
        Parser("python x.py", "Does nothing.").parse_args(argv)
        with known_errors(KeyError):
            raise ValueError("a bug")

    assert main(["--odd"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --odd (see python x.py --help).\n"
    with pytest.raises(ValueError, match="a bug"):
        main([])


@pytest.mark.parametrize("module", LOADS_A_MODEL)
def test_truncated_weights_are_named_in_one_line(module, capsys, tmp_path, monkeypatch):
    """Other damages: test_faults_files.py."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if module == "calm_transformers.onnx_export.export":
        pytest.importorskip("onnx")
    damaged = save_tiny_model(tmp_path / "damaged")
    os.truncate(damaged / "model.safetensors", 1000)
    words = [word.format(tmp=tmp_path / "new").replace(NOWHERE, str(damaged)) for word in MISSING_PATHS[module]]
    assert str(damaged) in refusal(capsys, main_of(module), *words)


COUNTS = "block_size batch_size max_positions max_patches prompts num_texts max_new_tokens num_candidates".split()
COUNTS += "steps prompt_length output_length repetitions rounds tokens tokens_before num_samples num_pairs".split()
INVALID_NUMBERS = {"seed": ("-1", "4294967296", "1.5"), **{name: ("0", "-1", "1.5") for name in COUNTS}}


def test_an_invalid_seed_or_count_is_one_line(module, capsys):
    options = set(re.findall(r"--([a-z]\w*)", help_of(module))) & INVALID_NUMBERS.keys()
    if module.endswith("generate_onnx"):  # numpy's seeds have another range
        options.discard("seed")
    for name in options:
        for value in INVALID_NUMBERS[name]:
            assert f"--{name}" in refusal(capsys, main_of(module), f"--{name}={value}", *MISSING_PATHS[module])


def test_an_unsupported_image_format_is_one_line(capsys):
    module = "calm_transformers.evaluation.brier_lm"
    message = refusal(capsys, main_of(module), *MISSING_PATHS[module], "--plot", "x.nope")
    assert "--plot: x.nope: an image file must" in message


def test_an_unavailable_device_is_one_line(module, capsys, tmp_path):
    if module in LOADS_A_MODEL and "--device" in help_of(module):  # the others use a GPU if available
        words = [word.format(tmp=tmp_path / "new").replace(NOWHERE, str(ROOT)) for word in MISSING_PATHS[module]]
        assert "device cuda: " in refusal(capsys, main_of(module), *words, "--device", "cuda")


PRINTS = """
import sys
from calm_transformers.command_line import command

@command
def main(argv=None):
    for _ in range(100_000):
        print("caf\u00e9 \u4e2d")

sys.exit(main())
"""


def test_a_closed_pipe_ends_a_command_silently_and_a_terminal_without_utf_8_gets_escapes():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": {**os.environ, "PYTHONIOENCODING": "ascii"}}
    run = subprocess.Popen([sys.executable, "-c", PRINTS], cwd=ROOT, **pipes)
    assert run.stdout.readline() == b"caf\\xe9 \\u4e2d\n"
    run.stdout.close()
    assert (run.stderr.read(), run.wait(30)) == (b"", EXIT_BROKEN_PIPE)


INVENTED = "evaluation.invented_words", ["--model", ".", "--text", ".", "--prompt"]


@pytest.mark.parametrize("module, words", [("pages.inspect_text", ["."]), ("generate", ["."]), INVENTED])
def test_a_prompt_that_is_not_utf_8_is_one_line(module, words, capsys):
    message = refusal(capsys, main_of(f"calm_transformers.{module}"), *words, "caf\udcff")
    assert r"'caf\udcff': invalid UTF-8 at character 4" in message


def test_a_multi_line_error_becomes_one_line():
    with pytest.raises(InputError, match="^one two three$"), known_errors(ValueError):
        raise ValueError("one\n  two\n\nthree")


def test_the_command_lists_its_subcommands_and_finds_them(capsys):
    assert cli.main(["--help"]) == 0 and cli.main(["bench"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  calm {name} " in printed for name in CLI)
    assert refusal(capsys, cli.main, "nope") == "calm nope: no such command (see calm --help)."
    assert refusal(capsys, cli.main, "bench", "nope") == "calm bench nope: no such command (see calm bench --help)."
    assert "--recipe" in refusal(capsys, cli.main, "train", "calm")
