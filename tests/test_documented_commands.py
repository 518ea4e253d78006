"""Every command line that README and the documents show is one that its command takes; the guide's sections run."""

import json
import lzma
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import CLI, COMMANDS, ROOT, main_of, refusal

PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md")]
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(python -m calm_transformers\.[\w.]+|python [\w/-]+\.py|calm \w+)\b([^…]*)$")
GENERATE = "calm_transformers.onnx_export.generate_onnx"  # is called generate.py where it is copied to
MODULES = {tuple(typed.split()): module for module, typed in COMMANDS.items()}


def lines_of(page: Path) -> list[str]:
    """Every line of a block, fenced or indented, and every text in backquotes."""
    text = page.read_text(encoding="utf-8")
    blocks, rest = "".join(FENCE.findall(text)).replace("\\\n", " "), FENCE.sub("", text)
    indented = re.findall(r"^    (.*)", rest, re.MULTILINE)
    return [*blocks.splitlines(), *indented, *(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest))]


def commands_in(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Module and words of each command; what stands in brackets may be given."""
    found = []
    for match in filter(None, (COMMAND.match(line.strip()) for line in lines)):
        words = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", "".join(match.groups())), comments=True)
        if words[1].endswith("generate.py"):
            found.append((GENERATE, words[2:]))
            continue
        known = [length for length in (2, 3) if tuple(words[:length]) in MODULES]
        found.extend((MODULES[tuple(words[:length])], words[length:]) for length in known)
        if not known and words[1] in {name.partition(" ")[0] for name in CLI} | {"-m"}:
            found.append((" ".join(words), words[2:]))  # no command, which a test says
    return found


DOCUMENTED = [(page, *command) for page in PAGES for command in commands_in(lines_of(page))]
WITH_OPTIONS = [(page, name, words) for page, name, words in DOCUMENTED if words and words != ["--help"]]


def test_the_documents_show_many_commands():
    assert len(WITH_OPTIONS) > 30 and {name for _, name, _ in DOCUMENTED} <= COMMANDS.keys()


@pytest.mark.parametrize(
    "page, name, words",
    WITH_OPTIONS,
    ids=[f"{page.name}: {name} {' '.join(words)}" for page, name, words in WITH_OPTIONS],
)
def test_a_documented_command_has_these_options(page, name, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert "no_such_option" in refusal(capsys, main_of(name), *words, "--no_such_option", "1")


def section(title: str) -> list[tuple[str, list[str]]]:
    """The commands of the first block of a section of the guide."""
    block = FENCE.search((ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition(f"\n## {title}\n")[2])
    assert block is not None
    return commands_in(block[1].splitlines())


@pytest.mark.slow
def test_the_sections_train_and_measure_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    """As written, but for the number of steps; the text is random words, more than a thousand of them."""
    rng = random.Random(0)
    syllables = ["".join(rng.sample("aeioubdgklmnprstvz", 3)) for _ in range(600)]
    for name in ("my-text.jsonl.xz", "held-out.jsonl.xz"):
        with lzma.open(tmp_path / name, "wt", encoding="utf-8") as file:
            for _ in range(200):
                words = ["".join(rng.choices(syllables, k=2)) for _ in range(60)]
                file.write(json.dumps({"text": " ".join(words)}) + "\n")
    monkeypatch.chdir(tmp_path)
    few = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--validation_blocks", "2"]
    for name, words in section("Train"):
        assert main_of(name)([*words, *(few if words[0] != "tokenizer" else [])]) == 0
    printed = capsys.readouterr().out
    assert re.findall("the model is in (.*)", printed) == ["runs/demo-autoencoder", "runs/demo-backbone", "runs/demo"]
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "runs" / "demo" / file, tmp_path)  # `.` is the demo model's folder
    ((name, words),) = section("Measure")
    assert main_of(name)([*words, "--max_positions", "200"]) == 0
    assert "BrierLM" in capsys.readouterr().out
