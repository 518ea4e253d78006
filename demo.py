"""Continues a story with the bundled demo model, streamed to the terminal: `make demo`, or `python demo.py --help`."""

import sys
from pathlib import Path

import transformers
from transformers import TextStreamer, pipeline, set_seed

from calm.command_line import InputError, Parser, command, known_errors, natural, positive, utf8
from calm.generation_calm import PatchSampling
from calm.inspect_text import check_length
from calm.loading import reading
from calm.weights_calm import check_temperature

MODEL = Path(__file__).parent


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python demo.py", "Continues a story with a CALM.")
    story = "Once upon a time, there was a little girl named Lily."
    parser.add_argument("prompt", nargs="?", type=utf8, default=story)
    parser.add_argument("--model", default=str(MODEL), help="folder or Hub id (default: the bundled demo model)")
    parser.add_argument("--temperature", type=float, default=0.5, help="in (0, 2]; the lower, the surer")
    parser.add_argument("--max_new_tokens", type=positive, default=160)
    parser.add_argument("--seed", type=natural, default=0)
    options = parser.parse_args(argv)
    if options.model == str(MODEL) and not (MODEL / "config.json").is_file():  # an installed package has no weights
        raise InputError("no model lies beside demo.py: name one with --model FOLDER_OR_HUB_ID.")
    transformers.logging.set_verbosity_error()
    with known_errors():
        check_temperature(options.temperature)
        with reading(options.model):
            generator = pipeline("text-generation", model=options.model, trust_remote_code=True)
        stated = generator.model.generation_config
        PatchSampling.from_generation_config(stated, do_sample=True, temperature=options.temperature)  # or refuses it
        assert generator.tokenizer is not None, "a pipeline of this task has one"
        if generator.model.config.model_type != "calm":
            raise ValueError(f"{options.model} is no CALM.")
        check_length(generator.model, len(generator.tokenizer(options.prompt)["input_ids"]), options.max_new_tokens)
    set_seed(options.seed)
    streamer = TextStreamer(generator.tokenizer, skip_special_tokens=True)
    generator(
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        do_sample=True,
        temperature=options.temperature,
        streamer=streamer,
    )


if __name__ == "__main__":
    sys.exit(main())
