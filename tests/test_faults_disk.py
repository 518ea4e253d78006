"""A full disk, places that can't be written, kills: what was there stays whole, and the next run completes it."""

import json
import multiprocessing
import random
import resource
import time
from pathlib import Path

import pytest
from published import PublishedRepository, write_tokenizer
from test_faults_files import run
from training_helpers import RECIPES

CALM = ["--recipe", f"{RECIPES}/calm.yaml", "--tokenizer", "{tokenizer}", "--autoencoder", "{autoencoder}"]
CALM += ["--train_files", "{train_files}", "--validation_files", "{train_files}"]
DATA = ["--model", "{model}", "--data", "{train_files}"]
WRITERS = {  # without the output, the last word
    "generate": ["{model}", "--max_new_tokens", "4", "--input", "{root}/prompts.jsonl", "--output"],
    "pages.inspect_text": ["{model}", "ab", "--max_new_tokens", "4", "--num_candidates", "4", "--html"],
    "pages.app": ["{model}", "--space"],
    "conversion.convert": ["--calm", "{root}/calm", "--autoencoder", "{root}/autoencoder", "--output"],
    "training.tokenize": [*CALM, "--output"],
    "training.train": ["calm", *CALM, "--save_steps", "2", "--cache_dir", "{out}-c", "--output_dir"],
    "evaluation.autoencoder_report": [*DATA, "--json"],
    "evaluation.brier_lm": [*DATA, "--block_size", "8", "--max_positions", "2", "--json"],
}
IN_PLACE = ("generate", "training.train", "training.tokenize")  # the next run resumes with what is there
UNFINISHED = {"training_args.bin", "trainer_state.json"}  # not the same in every run
LIMITS = (0, 1000, 8000, 30_000, 300_000)  # bytes of a file


@pytest.fixture(scope="module")
def sources(workshop, tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for name in ("calm", "autoencoder"):
        PublishedRepository(f"energy_k4/{name}", root / name)
    write_tokenizer(root / "calm")
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"ab {i}"}) + "\n" for i in range(30)))
    return {**workshop, "root": root, "model": tiny_folder}


def write(command: str, output: Path, sources: dict) -> tuple[int, list[str]]:
    return run(command, [word.format(out=output, **sources) for word in [*WRITERS[command], str(output)]])


def contents(output: Path) -> dict[str, bytes]:
    """Returns what an output holds, except what differs from run to run, and checkpoints."""
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    kept = [path for path in files if path.name not in UNFINISHED and "checkpoint-" not in str(path)]
    return {str(path.relative_to(output)): path.read_bytes().replace(bytes(output.parent), b"") for path in kept}


@pytest.fixture(params=WRITERS)
def whole(request, sources, tmp_path):
    """A command, what it writes if nothing fails, and how long that takes."""
    (tmp_path / "whole").mkdir()
    start = time.monotonic()
    assert write(request.param, tmp_path / "whole/out", sources) == (0, [])
    return request.param, contents(tmp_path / "whole/out"), time.monotonic() - start


def test_what_cannot_be_written_is_one_sentence_and_the_next_run_completes_the_output(sources, whole, tmp_path):
    """A limit of file sizes fails in every library like a full disk, but with another error number."""
    command, expected, _ = whole
    output, failed, (soft, hard) = tmp_path / "out", [], resource.getrlimit(resource.RLIMIT_FSIZE)
    for place, limit in [(Path("/dev/null/out"), soft), (Path("/proc/out"), soft), *((output, n) for n in LIMITS)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            code, lines = write(command, place, sources)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if code:
            failed.append(place)
            assert (code, len(lines)) == (2, 1) and lines[0].startswith("error: ") and str(place.parent) in lines[0]
            assert command in IN_PLACE or not place.exists()
    assert output in failed and len(failed) > 2
    assert write(command, output, sources) == (0, []) and contents(output) == expected


@pytest.mark.slow
def test_ten_kills_leave_nothing_incomplete_and_the_next_run_completes_the_output(sources, whole, tmp_path):
    command, expected, seconds = whole
    output, moments = tmp_path / "out", random.Random(0)
    for _ in range(10):
        process = multiprocessing.get_context("fork").Process(target=write, args=(command, output, sources))
        process.start()
        time.sleep(moments.uniform(0, 1.5 * seconds))
        process.kill()
        process.join()
        if output.exists() and command not in IN_PLACE:
            assert contents(output) == expected
            output.rename(tmp_path / f"complete-{time.monotonic()}")
    assert write(command, output, sources) == (0, []) and contents(output) == expected
