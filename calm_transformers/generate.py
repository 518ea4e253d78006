"""Continues a prompt with a CALM and streams the text to stdout: `calm generate . "Once upon a time"`.

`--demo` in place of MODEL continues it with the demo model of this repository. The patches of the text and the speed
follow on stderr.

    calm generate MODEL --input prompts.jsonl --output texts.jsonl

continues the `prompt` of each line or row of files, in batches, and writes lines with `prompt`, `text`,
`finish_reason` and `seed`, which is `--seed` for the first and counts up. After an interruption the same command
writes the others.
"""

import json
import os
import shlex
import sys
import time
from argparse import Namespace
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import TextStreamer, pipeline, set_seed

from calm_transformers.command_line import InputError, Parser, command, known_errors, positive, seed_number, utf8
from calm_transformers.documents import expand_paths, read_documents
from calm_transformers.files import written
from calm_transformers.loading import check_length, load_calm
from calm_transformers.model.generation_calm_samplers import check_temperature
from calm_transformers.pages.app import ROOT
from calm_transformers.pages.app_page import PROMPT, visible
from calm_transformers.pages.inspect_text import texts_between
from calm_transformers.progress import progress_bar
from calm_transformers.serving.batcher import Batcher
from calm_transformers.serving.sequence import GenerationResult

TINTS = (153, 223)  # light blue and light orange of the 256 colours


@command
def main(argv: list[str] | None = None) -> None:
    """Loads the model, checks the options, and prints the prompt and its continuation, or writes those of files."""
    parser = Parser("calm generate", __doc__)
    parser.add_argument("model", nargs="?", type=utf8, help="folder or Hub id; omitted with --demo")
    parser.add_argument("prompt", nargs="?", type=utf8, help=f"default: {PROMPT}")
    parser.add_argument("--demo", action="store_true", help="use the demo model of this repository's clone")
    parser.add_argument("--temperature", type=float, default=0.5, help="in (0, 2]; default: 0.5")
    parser.add_argument("--max_new_tokens", type=positive, default=160)
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--input", nargs="+", help=".jsonl, .parquet or .txt files of prompts, in place of a prompt")
    parser.add_argument("--output", type=Path, help="file of the texts, with --input")
    parser.add_argument("--max_rows", type=positive, default=16, help="texts at a time, with --input (default: 16)")
    options = parser.parse_args(argv)
    if (options.input is None) != (options.output is None):
        parser.error("--input and --output belong together.")
    if options.demo:
        if options.prompt is not None or os.path.isdir(options.model or ""):
            parser.error("MODEL and --demo exclude each other.")
        options.model, options.prompt = demo_model(), options.model
    elif options.model is None:
        parser.error("MODEL or --demo is required.")
    prompt = PROMPT if options.prompt is None else options.prompt
    with known_errors():
        check_temperature(options.temperature)
    if options.input:
        return continue_file(options)
    model, tokenizer = load_calm(options.model, None)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": True, "temperature": options.temperature}
    with known_errors(ValueError):
        num_prompt_tokens = len(tokenizer(prompt)["input_ids"])
        check_length(model, num_prompt_tokens, options.max_new_tokens)
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        set_seed(options.seed)
        streamer, start = TextStreamer(tokenizer, skip_special_tokens=True), time.perf_counter()
        outputs: Any = generator(prompt, streamer=streamer, return_tensors=True, **settings)
    ids, seconds = outputs[0]["generated_token_ids"], time.perf_counter() - start
    num_tokens = len(ids) - max(num_prompt_tokens, 1)  # an empty prompt is BOS
    report = format_patches(tokenizer, ids, num_tokens, model.config.patch_size)
    speed = f"{num_tokens / seconds:.0f} tokens/s · see more: calm app {shlex.quote(options.model)}"
    print(f"{report} · {speed}", file=sys.stderr)


def demo_model() -> str:
    """Returns the folder of the demo model; raises InputError if the package was installed without it."""
    if not (ROOT / "model.safetensors").is_file():
        raise InputError(
            "--demo: the installed package holds no weights; run calm generate FOLDER with a clone of its repository, "
            "which holds them, or with build/release/calm-demo, which make release writes there."
        )
    return str(ROOT)


def format_patches(tokenizer, ids: list[int], num_tokens: int, patch_size: int) -> str:
    """Returns the patches of the last tokens, tinted if stderr shows colours and else separated by |, and counts."""
    starts = range(len(ids) - num_tokens, len(ids), patch_size)
    texts = [visible(text) for text in texts_between(tokenizer, ids, [0, *starts, len(ids)])[1:]]
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        shown = "".join(f"\x1b[38;5;16;48;5;{TINTS[i % 2]}m{text}\x1b[0m" for i, text in enumerate(texts))
    else:
        shown = "|".join(texts)
    title = f"The continuation in its patches of {patch_size} tokens, each generated in one step:"
    return f"\n{title}\n{shown}\n{num_tokens} tokens in {len(texts)} patches"


def continue_file(options: Namespace) -> None:
    """Writes the continuations of all prompts that `--output` doesn't have yet."""
    prompts = list(read_documents(expand_paths(options.input), "prompt"))
    with written(options.output):
        num_done = count_finished(options.output, prompts, options.seed)
    model, tokenizer = load_calm(options.model, None)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for number, prompt_ids in enumerate(ids, 1):
        try:
            check_length(model, len(prompt_ids), options.max_new_tokens)
        except ValueError as error:
            raise InputError(f"prompt {number}: {error}") from None
    settings = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    bar = progress_bar(None, "Generating", "text", len(prompts), initial=num_done)
    batcher = Batcher(model, tokenizer, max_rows=options.max_rows)
    with written(options.output), batcher, bar, open(options.output, "a", encoding="utf-8") as file:
        futures: deque[tuple[str, Future[GenerationResult]]] = deque()

        def write_next() -> None:
            prompt, future = futures.popleft()
            result = future.result()
            line = {"prompt": prompt, "text": result.text, "finish_reason": result.finish_reason, "seed": result.seed}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        for number in range(num_done, len(prompts)):
            if len(futures) == batcher.max_rows + batcher.max_waiting:
                write_next()
            futures.append((prompts[number], batcher.submit(ids[number], seed=options.seed + number, **settings)))
        while futures:
            write_next()


def count_finished(output: Path, prompts: list[str], seed: int) -> int:
    """Returns how many texts of these prompts the file has, after removing an incomplete last line."""
    if not output.exists():
        return 0
    *lines, rest = output.read_bytes().split(b"\n")
    try:
        found = [(line["prompt"], line["seed"]) for line in map(json.loads, lines)]
    except (ValueError, KeyError, TypeError):
        found = None
    if found is None or found != list(zip(prompts, range(seed, seed + len(prompts)), strict=True))[: len(found)]:
        raise InputError(f"{output}: holds other texts than of these prompts and this --seed: name another file.")
    if rest:
        with output.open("r+b") as file:
            file.truncate(output.stat().st_size - len(rest))
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
