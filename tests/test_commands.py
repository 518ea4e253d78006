"""Every command speaks one dialect: `--help` ends well, what is wrong is one line "error: …" on stderr and code 2."""

import re

import pytest
from commands import COMMANDS, ROOT, main_of, refusal

import calm.command_line
from calm.command_line import CommandError, Parser, command, known_errors

NOWHERE = "./no/such/place"
TOKENIZER, DATA = ["--tokenizer", NOWHERE], ["--data", NOWHERE, "--block_size", "8"]
WRONG_PATHS = {
    "calm.app": [NOWHERE, "--space", "{tmp}"],  # without it gradio is asked for first
    "calm.benchmarks.convert_memory": ["--size", NOWHERE],  # it reads no file
    "calm.benchmarks.generation": ["--json", f"{NOWHERE}/rows.json"],
    "calm.benchmarks.gpu": ["--device", "cpu", "--pairs", NOWHERE],
    "calm.benchmarks.operations": ["--shape", NOWHERE],
    "calm.benchmarks.prefill": ["--shape", NOWHERE],
    "calm.benchmarks.quantised": [NOWHERE],
    "calm.benchmarks.repetitions": ["--model", NOWHERE],
    "calm.benchmarks.serving": ["--model", NOWHERE],
    "calm.benchmarks.speed": ["--demo", NOWHERE],
    "calm.benchmarks.truncation": ["--pools", NOWHERE],
    "calm.benchmarks.training_step": ["--shape", NOWHERE],
    "calm.calibrate_radius": ["--model", NOWHERE],
    "calm.convert_checkpoint": ["--calm", NOWHERE, "--autoencoder", NOWHERE, "--output", "{tmp}"],
    "calm.export_onnx": [NOWHERE, "--output", "{tmp}"],
    "calm.generate_onnx": ["Once", "--folder", NOWHERE],
    "calm.evaluation.ranking": ["--model", NOWHERE, "--data", NOWHERE],
    "calm.inspect_text": [NOWHERE],
    "calm.demo": ["--model", NOWHERE],
    "calm.docs.draw_architecture": [NOWHERE],  # these two read no file that one names
    "calm.docs.stale_figures": [NOWHERE],
    "calm.evaluation.autoencoder_report": ["--model", NOWHERE, *DATA[:2]],
    "calm.evaluation.brier_lm": ["--model", NOWHERE, *DATA],
    "calm.evaluation.calibration": ["--run", NOWHERE, *DATA],
    "calm.evaluation.invented_words": ["--model", NOWHERE, "--text", NOWHERE],
    "calm.evaluation.plot": [NOWHERE],
    "calm.evaluation.prompt_alignment": ["--model", NOWHERE, *DATA[:2]],
    "calm.experiments": ["--corpus", NOWHERE, "--output", "{tmp}"],
    "calm.experiments.language": ["--output", f"/dev/null/{NOWHERE}"],  # it makes folders, but not in a file
    "calm.experiments.replacements": ["--model", NOWHERE, "--language", NOWHERE],
    "calm.experiments.share": ["--model", NOWHERE, "--language", NOWHERE],
    "calm.experiments.sharpening": ["--model", NOWHERE, "--language", NOWHERE],
    "calm.serve": [NOWHERE, "--port", "0"],
    "calm.training.demo_model": ["--corpus", NOWHERE, "--runs", "{tmp}"],
    "calm.training.train_ar": ["--recipe", "demo-transformer", *TOKENIZER],
    "calm.training.train_autoencoder": ["--recipe", "demo-autoencoder", *TOKENIZER],
    "calm.training.train_calm": ["--recipe", "demo-backbone", *TOKENIZER],
    "calm.training.train_tokenizer": ["--recipe", "demo-tokenizer", "--train_files", NOWHERE],
}
REFUSED_WHILE_PARSING = (  # these need no option
    "calm.benchmarks.convert_memory",
    "calm.benchmarks.generation",
    "calm.benchmarks.truncation",
    "calm.docs.draw_architecture",
    "calm.docs.stale_figures",
)


@pytest.fixture(params=COMMANDS)
def module(request, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return request.param


def test_help_ends_well_and_begins_with_the_command_as_one_types_it(module, capsys):
    with pytest.raises(SystemExit) as ended:
        main_of(module)(["--help"])
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out.startswith(f"usage: {COMMANDS[module]} ")


def test_options_are_spelled_with_underscores(module, capsys):
    with pytest.raises(SystemExit):
        main_of(module)(["--help"])
    options = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    assert {option for option in options if "-" in option[2:]} <= {"--push-to-hub"}


def test_an_unknown_option_is_one_line(module, capsys):
    required = [] if module in REFUSED_WHILE_PARSING else WRONG_PATHS[module]
    assert "no_such_option" in refusal(capsys, main_of(module), *required, "--no_such_option", "1")


def test_a_path_that_is_not_there_is_one_line_that_names_it(module, capsys, tmp_path):
    words = [word.format(tmp=tmp_path / "new") for word in WRONG_PATHS[module]]
    assert NOWHERE.strip("./") in refusal(capsys, main_of(module), *words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("module", [name for name in COMMANDS if name.startswith("calm.training.train_")])
def test_an_option_without_its_value_is_one_line(module, capsys):
    recipe = WRONG_PATHS[module][:2]
    assert "train_files" in refusal(capsys, main_of(module), *recipe, "--train_files")
    assert "--recipe: expected one argument" in refusal(capsys, main_of(module), "--recipe")


def test_every_main_takes_argv():
    for module in COMMANDS:
        assert "\ndef main(argv: list[str] | None = None)" in source_of(module), module
        assert source_of(module).endswith("    sys.exit(main())\n"), module


def source_of(module: str) -> str:
    path = ROOT.joinpath(*module.split(".")[1:])
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def test_only_what_is_known_becomes_a_line(capsys):
    @command
    def main(argv: list[str]) -> None:
        Parser("python x.py", "Does nothing.").parse_args(argv)
        with known_errors(KeyError):
            raise ValueError("a fault of ours")

    assert main(["--odd"]) == calm.command_line.WRONG == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --odd (see python x.py --help).\n"
    with pytest.raises(ValueError, match="a fault of ours"):
        main([])


def test_an_error_of_several_lines_is_one():
    with pytest.raises(CommandError, match="^one two three$"), known_errors(ValueError):
        raise ValueError("one\n  two\n\nthree")
    with pytest.raises(CommandError, match="^nowhere.txt: No such file or directory.$"), known_errors(OSError):
        open("nowhere.txt")
