"""Continues a prompt with a CALM and streams the text to the terminal: `calm generate . "Once upon a time"`."""

import sys

import transformers
from transformers import TextStreamer, pipeline, set_seed

from calm_transformers.command_line import Parser, command, known_errors, positive, seed_number, utf8
from calm_transformers.loading import check_length, format_load_errors
from calm_transformers.model.generation_calm_samplers import PatchSampling, check_temperature


@command
def main(argv: list[str] | None = None) -> None:
    """Loads the model, checks the options, and prints the prompt and its continuation."""
    parser = Parser("calm generate", __doc__)
    default_prompt = "Once upon a time, there was a little girl named Lily."
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("prompt", nargs="?", type=utf8, default=default_prompt)
    parser.add_argument("--temperature", type=float, default=0.5, help="in (0, 2]; default: 0.5")
    parser.add_argument("--max_new_tokens", type=positive, default=160)
    parser.add_argument("--seed", type=seed_number, default=0)
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    with known_errors():
        check_temperature(options.temperature)
        with format_load_errors(options.model):
            generator = pipeline("text-generation", model=options.model, trust_remote_code=True)
        config = generator.model.generation_config
        PatchSampling.from_generation_config(config, do_sample=True, temperature=options.temperature)  # or raises
        assert generator.tokenizer is not None, "a pipeline of this task has one"
        if generator.model.config.model_type != "calm":
            raise ValueError(f"{options.model} is no CALM.")
        check_length(generator.model, len(generator.tokenizer(options.prompt)["input_ids"]), options.max_new_tokens)
    set_seed(options.seed)
    streamer = TextStreamer(generator.tokenizer, skip_special_tokens=True)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": True, "temperature": options.temperature}
    generator(options.prompt, streamer=streamer, **settings)


if __name__ == "__main__":
    sys.exit(main())
