"""What quantisation does to a CALM: its tokens, the memory of its weights, and its speed on a CPU.

    python -m calm.benchmarks.quantised . --tokens 256

The agreement of tokens is measured step by step. The model in float32 writes a text; every method then reads it, so
that one other token doesn't derail the rest, and chooses the patch after each of its patches, at T = 0.5, with the
same random numbers as float32: each place in the text has a generator of its own. What is counted is the share of
tokens that are the same. The speed is that of the fastest of several texts of one row, the methods in turns. Memory is
what `torch.save` writes of the weights, tied ones once. A method whose package is missing, or that can't take the
model, has a row that says so.
"""

from __future__ import annotations

import io
import logging
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from calm.command_line import Parser, command, known_errors, positive
from calm.evaluation.models import load_causal_lm
from calm.generation_calm import PatchSampling
from calm.modeling_calm import CALMForCausalLM

TEMPERATURE = 0.5
LEAST_TOKENS = 8
BLOCK = 64  # values that bitsandbytes scales together in 4 bits


def bitsandbytes(**settings) -> Callable[[str], CALMForCausalLM]:
    """Loads the linear layers in the bits of `BitsAndBytesConfig`."""

    def make(name: str) -> CALMForCausalLM:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
        from transformers import BitsAndBytesConfig

        # A line of its own for each product in float32.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        skipped = layers_to_keep(load_causal_lm(name, torch.float32, "cpu")) if settings.get("load_in_4bit") else None
        config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skipped, **settings)
        return CALMForCausalLM.from_pretrained(
            name, quantization_config=config, device_map="cpu", dtype=torch.float32
        ).eval()

    return make


def layers_to_keep(model: nn.Module) -> list[str]:
    """The linear layers that stay as they are in 4 bits: those whose sizes are no multiples of bitsandbytes' blocks,
    and those tied to an embedding."""
    embedded = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return [
        name
        for name, layer in layers
        if layer.in_features % BLOCK or layer.out_features % BLOCK or id(layer.weight) in embedded
    ]


def torchao(config_name: str) -> Callable[[str], CALMForCausalLM]:
    """Quantises the linear layers of a loaded model by `torchao.quantization.quantize_`."""

    def make(name: str) -> CALMForCausalLM:
        import torchao.quantization  # pyright: ignore[reportMissingImports]

        model = load_causal_lm(name, torch.float32, "cpu")
        torchao.quantization.quantize_(model, getattr(torchao.quantization, config_name)())
        return model

    return make


def dynamic(name: str) -> CALMForCausalLM:
    """PyTorch's own dynamic quantisation of the linear layers."""
    return torch.ao.quantization.quantize_dynamic(load_causal_lm(name, torch.float32, "cpu"), {nn.Linear}, torch.qint8)


FULL = "float32"
METHODS: dict[str, Callable[[str], CALMForCausalLM]] = {
    FULL: lambda name: load_causal_lm(name, torch.float32, "cpu"),
    "bfloat16": lambda name: load_causal_lm(name, torch.bfloat16, "cpu"),
    "bitsandbytes, 8 bits": bitsandbytes(load_in_8bit=True),
    "bitsandbytes, 4 bits (nf4)": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao, int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao, int8 weights and activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "PyTorch, dynamic int8": dynamic,
}


def write(model: CALMForCausalLM, num_tokens: int, seed: int = 0) -> Tensor:
    """A text of one row from BOS on, (1, L), at T = 0.5."""
    start = torch.full((1, 1), model.config.bos_token_id or 0)
    return model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=TEMPERATURE,
        max_new_tokens=num_tokens,
        generator=torch.Generator().manual_seed(seed),
        eos_token_id=None,
        pad_token_id=0,
    )


@torch.no_grad()
def chosen_patches(model: CALMForCausalLM, ids_1L: Tensor) -> Tensor:
    """The patch that the model chooses after each patch of a text, (P, K), each place with its own generator."""
    hidden_PD = model(ids_1L).last_hidden_state[0]
    generators = [torch.Generator().manual_seed(place) for place in range(len(hidden_PD))]
    return model.next_patches(hidden_PD, PatchSampling(temperature=TEMPERATURE), generators)


def size_in_bytes(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def row(
    name: str, model: CALMForCausalLM, ids_1L: Tensor, expected_PK: Tensor, seconds: float, num_tokens: int
) -> str:
    agreement = (chosen_patches(model, ids_1L) == expected_PK).float().mean()
    megabytes = size_in_bytes(model) / 1e6
    return f"| {name} | {100 * agreement:.1f} % | {megabytes:.1f} MB | {num_tokens / seconds:.0f} |"


def table(model_name: str, num_tokens: int, rounds: int, methods=METHODS) -> list[str]:
    """The rows of the table, one a method."""
    models, failed, seconds = {}, {}, {}
    for name, make in methods.items():
        try:
            models[name] = make(model_name)
            write(models[name], LEAST_TOKENS)  # packs weights, and fails if it must
        except (ImportError, RuntimeError, ValueError, AttributeError, TypeError, AssertionError) as error:
            if name == FULL:
                raise
            models.pop(name, None)
            failed[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for seed in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            write(model, num_tokens, seed)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    patch_size = models[FULL].config.patch_size
    text_1L = write(models[FULL], num_tokens)
    text_1L = text_1L[:, : text_1L.shape[1] // patch_size * patch_size]
    expected_PK = chosen_patches(models[FULL], text_1L)
    return [
        row(name, models[name], text_1L, expected_PK, min(seconds[name]), num_tokens)
        if name in models
        else f"| {name} | – | – | {failed[name]} |"
        for name in methods
    ]


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm.benchmarks.quantised", __doc__)
    parser.add_argument("model", help="folder or Hub id of a trained CALM")
    parser.add_argument("--tokens", type=positive, default=256, help="of the text that is read, and of those timed")
    parser.add_argument("--rounds", type=positive, default=3, help="texts of each method, of which the fastest counts")
    options = parser.parse_args(argv)
    with known_errors(ValueError, OSError):
        if options.tokens < LEAST_TOKENS:
            raise ValueError(f"--tokens {options.tokens}: must be at least {LEAST_TOKENS}.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each library's, that it will be another's
            rows = table(options.model, options.tokens, options.rounds)
    print("| method | same tokens | weights | tokens/s at T = 0.5 |\n|" + " --- |" * 4)
    print("\n".join(rows))


if __name__ == "__main__":
    sys.exit(main())
