"""A full disk, a place that can't be written, kills: what was there stays whole, and the next run completes it."""

import json
import multiprocessing
import os
import random
import resource
import time
from pathlib import Path

import pytest
from published import PublishedRepository, write_tokenizer
from test_faults_files import run
from training_helpers import RECIPES

LIMITS = (0, 1000, 8000, 30_000, 300_000)  # bytes of a file
COMMANDS = ("generate", "pages.inspect_text", "pages.app", "conversion.convert", "training.tokenize", "training.train")
COMMANDS += ("evaluation.autoencoder_report", "evaluation.brier_lm")
IN_PLACE = ("generate", "training.train", "training.tokenize")  # the next run goes on with what is there
UNFINISHED = {"training_args.bin", "trainer_state.json", "optimizer.pt"}  # not the same in every run


@pytest.fixture(scope="module")
def writers(workshop, tiny_folder, tmp_path_factory):
    """Commands that write, without their output: name → words."""
    folder, model = tmp_path_factory.mktemp("sources"), str(tiny_folder)
    pair = [str(PublishedRepository(f"energy_k4/{name}", folder / name).folder) for name in ("calm", "autoencoder")]
    write_tokenizer(folder / "calm")
    prompts, calm, text = folder / "prompts.jsonl", ["--recipe", str(RECIPES / "calm.yaml")], workshop["train_files"]
    prompts.write_text("".join(json.dumps({"prompt": f"ab {i}"}) + "\n" for i in range(30)))
    fields = [word for name, value in workshop.items() for word in (f"--{name}", value) if name != "cache_dir"]
    data = ["--model", model, "--data", text]
    new = ["--max_new_tokens", "4"]
    return {
        "generate": [model, *new, "--input", str(prompts), "--output"],
        "pages.inspect_text": [model, "ab", *new, "--num_candidates", "4", "--html"],
        "pages.app": [model, "--space"],
        "conversion.convert": ["--calm", pair[0], "--autoencoder", pair[1], "--output"],
        "training.tokenize": [*calm, *fields, "--output"],
        "training.train": ["calm", *calm, *fields, "--save_steps", "2", "--cache_dir", "{out}-c", "--output_dir"],
        "evaluation.autoencoder_report": [*data, "--json"],
        "evaluation.brier_lm": [*data, "--block_size", "8", "--max_positions", "2", "--json"],
    }


def write(writers: dict, command: str, output: Path) -> tuple[int, list[str]]:
    return run(command, [word.format(out=output) for word in [*writers[command], str(output)]])


def contents(output: Path) -> dict[str, bytes]:
    """Returns what an output holds, except what differs from run to run, and checkpoints."""
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    kept = [path for path in files if path.name not in UNFINISHED and "checkpoint-" not in str(path)]
    return {str(path.relative_to(output)): path.read_bytes().replace(bytes(output.parent), b"") for path in kept}


@pytest.fixture(params=COMMANDS)
def whole(request, writers, tmp_path):
    """A command, what it writes if nothing fails, and how long that takes."""
    (tmp_path / "whole").mkdir()
    start = time.monotonic()
    assert write(writers, request.param, tmp_path / "whole/out") == (0, [])
    return request.param, contents(tmp_path / "whole/out"), time.monotonic() - start


def test_a_full_disk_is_one_sentence_and_the_next_run_completes_the_output(writers, whole, tmp_path):
    """A limit of file sizes fails in every library like a full disk, but with another error number."""
    command, expected, _ = whole
    output, (soft, hard) = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    num_failed = 0
    for limit in LIMITS:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            code, lines = write(writers, command, output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        num_failed += code == 2
        if code == 2:
            assert len(lines) == 1 and lines[0].startswith("error: ") and "oo large" in lines[0], lines
            assert str(tmp_path) in lines[0] and (command in IN_PLACE or not output.exists()), lines
    assert num_failed and write(writers, command, output) == (0, []) and contents(output) == expected


@pytest.mark.parametrize("place", ["/dev/null/out", "/proc/out", "{tmp}/readonly/out"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_written_is_named_in_one_sentence(writers, command, place, tmp_path):
    (tmp_path / "readonly").mkdir(mode=0o555)
    if "readonly" in place and os.access(tmp_path / "readonly", os.W_OK):
        pytest.skip("root may write everywhere")
    code, lines = write(writers, command, Path(place.format(tmp=tmp_path)))
    assert code == 2 and len(lines) == 1 and place.format(tmp=tmp_path).removesuffix("/out") in lines[0], lines


@pytest.mark.slow
def test_ten_kills_leave_nothing_incomplete_and_the_next_run_completes_the_output(writers, whole, tmp_path):
    command, expected, seconds = whole
    output, moments = tmp_path / "out", random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["calm_transformers.training.train", "test_faults_disk"])
    is_started = context.Event()
    for _ in range(10):
        is_started.clear()
        process = context.Process(target=write_when_started, args=(is_started, writers, command, output))
        process.start()
        is_started.wait(60)
        time.sleep(moments.uniform(0, 1.5 * seconds))
        process.kill()
        process.join()
        if output.exists() and command not in IN_PLACE:
            assert contents(output) == expected
            output.rename(tmp_path / f"complete-{time.monotonic()}")
    assert write(writers, command, output) == (0, []) and contents(output) == expected


def write_when_started(is_started, *args) -> None:
    is_started.set()
    write(*args)
