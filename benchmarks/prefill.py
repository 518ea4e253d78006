"""Time to the first patch's hidden state: a CALM's prompt pass against a Llama's with the same backbone.

    python -m calm.benchmarks.prefill --shape calm-m --prompt_length 2048 --device cpu --dtype float32 --repetitions 3

CALM reads its prompt in patches of K tokens, so its backbone has 1 / K of the positions. The Llama has the same
layers, random weights too, and reads as many tokens as CALM has patches, with the logits of the last one alone.
"""

from __future__ import annotations

import sys
from statistics import median

import torch
from transformers import LlamaConfig

from calm.benchmarks.meters import Meter, synchronise
from calm.benchmarks.workloads import random_model, random_prompts, shape_config
from calm.command_line import InputError, Parser, command, known_errors, positive
from calm.configuration_calm import CALMConfig
from calm.loading import device_of

BACKBONE_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def same_backbone(config: CALMConfig) -> LlamaConfig:
    """A Llama with the layers of a CALM's backbone."""
    fields = {name: getattr(config, name) for name in (*BACKBONE_FIELDS, "num_key_value_heads", "rms_norm_eps")}
    return LlamaConfig(**fields, max_position_embeddings=config.max_position_embeddings)


@torch.no_grad()
def seconds(passes: list, device: torch.device, repetitions: int) -> list[float]:
    """The median time of each of the passes, which take turns, after one round to warm up."""
    clock = Meter.clock(device)
    times = [[] for _ in passes]
    for _ in range(1 + repetitions):
        for pass_, taken in zip(passes, times, strict=True):
            synchronise(device)
            start = clock.read()
            pass_()
            end = clock.read()
            synchronise(device)
            taken.append(clock.difference(start, end))
    return [median(taken[1:]) for taken in times]


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm.benchmarks.prefill", __doc__)
    parser.add_argument("--shape", default="calm-m", help="a CALM: calm-m, calm-l, calm-xl, or a model")
    parser.add_argument("--prompt_length", type=positive, default=2048, help="tokens")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repetitions", type=positive, default=3)
    options = parser.parse_args(argv)
    with known_errors():
        config = shape_config(options.shape)
        if not isinstance(config, CALMConfig):
            raise InputError(f"--shape {options.shape} is no CALM.")
        if options.prompt_length % config.patch_size:
            raise InputError(f"--prompt_length {options.prompt_length}: must be whole patches of {config.patch_size}.")
        device, dtype = device_of(options.device), getattr(torch, options.dtype)
    calm, llama = (random_model(c, device, dtype) for c in (config, same_backbone(config)))
    positions = options.prompt_length // config.patch_size
    calm_prompt, llama_prompt = random_prompts(calm, 1, options.prompt_length), random_prompts(llama, 1, positions)
    passes = [lambda: calm(calm_prompt, use_cache=True), lambda: llama(llama_prompt, use_cache=True, logits_to_keep=1)]
    of_calm, of_llama = seconds(passes, device, options.repetitions)
    print(f"{options.shape}, {options.prompt_length} tokens: {1000 * of_calm:.0f} ms")
    print(f"Llama of the same backbone, {positions} tokens: {1000 * of_llama:.0f} ms")
    print(f"ratio: {of_calm / of_llama:.2f}")


if __name__ == "__main__":
    sys.exit(main())
