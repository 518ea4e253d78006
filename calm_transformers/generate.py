"""Continues a prompt with a CALM and streams the text to the terminal: `calm generate . "Once upon a time"`.

    calm generate MODEL --input prompts.jsonl --output texts.jsonl

continues the `prompt` of each line or row of files, in batches, and writes lines with `prompt`, `text`,
`finish_reason` and `seed`, which is `--seed` for the first and counts up. After an interruption the same command
writes the others.
"""

import json
import sys
from argparse import Namespace
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from transformers import TextStreamer, pipeline, set_seed

from calm_transformers.command_line import InputError, Parser, command, known_errors, positive, seed_number, utf8
from calm_transformers.documents import expand_paths, read_documents
from calm_transformers.files import written
from calm_transformers.loading import check_length, load_calm
from calm_transformers.model.generation_calm_samplers import check_temperature
from calm_transformers.progress import progress_bar
from calm_transformers.serving.batcher import Batcher
from calm_transformers.serving.sequence import GenerationResult


@command
def main(argv: list[str] | None = None) -> None:
    """Loads the model, checks the options, and prints the prompt and its continuation, or writes those of files."""
    parser = Parser("calm generate", __doc__)
    default_prompt = "Once upon a time, there was a little girl named Lily."
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("prompt", nargs="?", type=utf8, default=default_prompt)
    parser.add_argument("--temperature", type=float, default=0.5, help="in (0, 2]; default: 0.5")
    parser.add_argument("--max_new_tokens", type=positive, default=160)
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--input", nargs="+", help=".jsonl, .parquet or .txt files of prompts, in place of a prompt")
    parser.add_argument("--output", type=Path, help="file of the texts, with --input")
    parser.add_argument("--max_rows", type=positive, default=16, help="texts at a time, with --input (default: 16)")
    options = parser.parse_args(argv)
    if (options.input is None) != (options.output is None):
        parser.error("--input and --output belong together.")
    with known_errors():
        check_temperature(options.temperature)
    if options.input:
        return continue_file(options)
    model, tokenizer = load_calm(options.model, None)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": True, "temperature": options.temperature}
    with known_errors(ValueError):
        check_length(model, len(tokenizer(options.prompt)["input_ids"]), options.max_new_tokens)
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        set_seed(options.seed)
        generator(options.prompt, streamer=TextStreamer(tokenizer, skip_special_tokens=True), **settings)


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
