"""Every command line in README and the documents is valid, and those of code blocks run, here or in a named test."""

import json
import lzma
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import CLI, COMMANDS, ROOT, main_of, refusal
from training_helpers import values

from calm_transformers.model.configuration_calm import CALMConfig

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(page for page in sorted(DOCS.rglob("*.md")) if page.name != "log.md")]
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(python -m calm_transformers\.[\w.]+|python [\w/-]+\.py|calm \w+)\b([^…]*)$")
GENERATE = "calm_transformers.onnx_export.generate_onnx"  # exported models contain it as generate.py
MODULES = {tuple(typed.split()): module for module, typed in COMMANDS.items()}


def code_lines(page: Path) -> list[str]:
    """Returns all lines of fenced and indented blocks, and all inline code."""
    text = page.read_text(encoding="utf-8")
    blocks, rest = "".join(FENCE.findall(text)).replace("\\\n", " "), FENCE.sub("", text)
    indented = re.findall(r"^    (.*)", rest, re.MULTILINE)
    return [*blocks.splitlines(), *indented, *(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest))]


def parse_commands(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Returns module and arguments of each command; optional arguments in brackets are included."""
    found = []
    for match in filter(None, (COMMAND.match(re.sub("^ *[A-Z_]+=\\S+ ", "", line.strip())) for line in lines)):
        args = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", "".join(match.groups())), comments=True)
        if args[1].endswith("generate.py"):
            found.append((GENERATE, args[2:]))
            continue
        known = [length for length in (2, 3) if tuple(args[:length]) in MODULES]
        found.extend((MODULES[tuple(args[:length])], args[length:]) for length in known)
        if not known and args[1] in {name.partition(" ")[0] for name in CLI} | {"-m"}:
            found.append((" ".join(args), args[2:]))  # unknown, which the next test reports
    return found


DOCUMENTED = [(page, *command) for page in PAGES for command in parse_commands(code_lines(page))]
WITH_OPTIONS = {f"{page.name}: {name} {shlex.join(args)}": (name, args) for page, name, args in DOCUMENTED}
WITH_OPTIONS = {line: (name, args) for line, (name, args) in WITH_OPTIONS.items() if args and args[-1] != "--help"}


def test_documents_contain_many_commands():
    assert len(WITH_OPTIONS) > 30 and {name for _, name, _ in DOCUMENTED} <= COMMANDS.keys()


@pytest.mark.parametrize("name, args", WITH_OPTIONS.values(), ids=WITH_OPTIONS)
def test_documented_options_exist(name, args, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert "no_such_option" in refusal(capsys, main_of(name), *args, "--no_such_option", "1")


def block_lines(page: Path) -> list[str]:
    """Returns the lines of a page's code blocks; a command continued after a backslash is one line."""
    return "".join(FENCE.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines()


# Commands that wait for a browser or client, or need what these tests don't have, and the tests that run their like.
ELSEWHERE = {
    "calm app . *(#.*)?$": "test_app.py",
    "calm serve ": "test_serve.py",
    "CALM_MATMUL_BACKEND=torch calm bench serving ": "test_benchmark_serving.py",
    "calm convert ": "test_convert_checkpoint.py",
    "calm export |python demo-onnx/generate.py ": "test_export_onnx.py",
    "calm tokenize ": "test_training_sources.py",
    ".* --recipe distil-temperature ": "test_distil_temperature.py",
    ".* --init_backbone ": "test_training_init_backbone.py",
    ".* --data Salesforce/wikitext ": "test_data.py",
}
IN_ORDER = ("README.md", "tutorial.md", "demo.md")  # the tests below run these; README's are the tutorial's
GUIDES = [page for page in PAGES if page.name not in IN_ORDER and parse_commands(block_lines(page))]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """The files that the pages name, of random words, more than a thousand of them."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    syllables = ["".join(rng.sample("aeioubdgklmnprstvz", 3)) for _ in range(600)]
    stories = [" ".join("".join(rng.choices(syllables, k=2)) for _ in range(60)) for _ in range(200)]
    (tmp_path / "DIR").mkdir()
    for path in ("my-text.txt", "held-out.txt"):
        (tmp_path / path).write_text("\n".join(stories))
    rows = "".join(json.dumps({"text": story}) + "\n" for story in stories)
    (tmp_path / "DIR/tinystories-train.jsonl.xz").write_bytes(lzma.compress(rows.encode()))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Once upon a time"}) + "\n")
    return tmp_path


FEW = {
    "train": ["--max_steps", "2", "--per_device_train_batch_size", "2"],
    "app": [],
    "autoencoder_report": [],
    "invented_words": ["--num_texts", "2", "--max_new_tokens", "20"],
    "generate": ["--max_new_tokens", "4"],
    "inspect_text": ["--max_new_tokens", "4", "--num_candidates", "4"],
    "brier_lm": ["--max_positions", "200"],
}


def run_commands(commands: list[tuple[str, list[str]]]) -> None:
    for name, args in commands:
        few = [] if args[0] == "tokenizer" or "--dry_run" in args else FEW[name.rpartition(".")[2]]
        assert not main_of(name)([*args, *few]), (name, args)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
@pytest.mark.slow
def test_the_commands_of_a_guide_run(page, texts):
    """`.`, MODEL and what the tutorial made are the demo model's folder; fewer steps and tokens than documented."""
    for file in [*ROOT.glob("*.json"), *ROOT.glob("*.py"), ROOT / "model.safetensors"]:
        shutil.copy(file, texts)
    (texts / "runs").mkdir()
    for name in ("small-tokenizer", "small-autoencoder"):
        (texts / "runs" / name).symlink_to(texts)
    lines = [line.strip().replace("MODEL", ".") for line in block_lines(page)]
    here = [line for line in lines if not any(re.match(pattern, line) for pattern in ELSEWHERE)]
    run_commands(parse_commands(here))


def test_the_tests_of_other_commands_exist():
    lines = [line.strip() for page in GUIDES for line in block_lines(page)]
    assert [p for p in ELSEWHERE if not any(re.match(p, line) for line in lines)] == []
    assert [test for test in ELSEWHERE.values() if not (ROOT / "tests" / test).exists()] == []


@pytest.mark.slow
def test_the_tutorial_runs_in_order(texts, capsys):
    """As written, except for the number of steps and tokens; interrupted and started again, it resumes."""
    commands = parse_commands(block_lines(DOCS / "tutorial.md"))
    run_commands(commands)
    printed = capsys.readouterr().out
    assert re.findall("the model is in (.*)", printed) == ["runs/small-autoencoder", "runs/small"]
    assert "BrierLM" in printed and (texts / "patches.html").exists()
    run_commands(commands[1:3])
    assert capsys.readouterr().out.count("resuming from checkpoint-2") == 2


@pytest.mark.slow
def test_the_demo_model_is_trained_and_measured_in_order(texts, capsys):
    run_commands(parse_commands(block_lines(DOCS / "results" / "demo.md")))
    printed = capsys.readouterr().out
    demo = [f"runs/demo-{part}" for part in ("autoencoder", "backbone", "transformer")]
    assert re.findall("the model is in (.*)", printed) == [*demo[:2], "runs/demo", demo[2]]
    trained, bundled = (values(CALMConfig.from_pretrained(folder)) for folder in (texts / "runs" / "demo", ROOT))
    for config in (trained, bundled):
        config["autoencoder_config"].pop("transformers_version")
    assert trained == bundled
