"""Exports a CALM to ONNX: a folder that onnxruntime generates text from, without torch and transformers.

    calm export MODEL --output FOLDER
    python FOLDER/generate.py "Once upon a time" --max_new_tokens 40 --temperature 0.5 --seed 0

FOLDER holds backbone.onnx (patches → hidden states, with the cache as inputs and outputs), head.onnx (hidden state and
noise → latent samples), decoder.onnx (latent vectors → tokens), each with float32 weights in .onnx.data; calm.json,
tokenizer.json, and generate.py, whose docstring documents the graphs. Every graph is compared with the model at other
sizes than it was traced at. A failure is one line on stderr and exit code 2, and leaves no file behind.
"""

# B batch, P new patches, S cached patches, K tokens per patch, D hidden size, N samples, Z latent size, V vocabulary,
# M latent vectors

from __future__ import annotations

import importlib
import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.generation.configuration_utils import GenerationConfig

from calm_transformers.command_line import (
    InputError,
    Parser,
    command,
    first_line,
    known_errors,
    positive,
    require_package,
)
from calm_transformers.files import new_folder
from calm_transformers.loading import check_tokenizer, format_load_errors, load_checked, load_tokenizer
from calm_transformers.model import heads_calm_flow_diffusion
from calm_transformers.model.generation_calm_samplers import PatchSampling
from calm_transformers.model.generation_calm_upstream import (
    LENGTH_SETTINGS,
    PROCESSOR_SETTINGS,
    SUPPORTED_ROPE_TYPES,
    UNSUPPORTED_SETTINGS,
)
from calm_transformers.model.heads_calm import GenerativeHead
from calm_transformers.model.heads_calm_flow_diffusion import ModulatedMLP, Modulation
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.model.modeling_calm_autoencoder import CALMAutoencoder
from calm_transformers.onnx_export import generate_onnx

TOLERANCE = 1e-4  # relative to the largest output
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MIN_OPSET = 18  # the lowest that torch's exporter supports
DYNAMIC = torch.export.Dim.DYNAMIC
# Distributions of each head's noise inputs, by their names in `predrawn_noise`.
NOISE_SPECS: dict[str, dict[str, dict[str, Any]]] = {
    "energy": {"noise": {"law": "uniform", "range": [-0.5, 0.5]}},
    "flow": {"noise": {"law": "normal"}},
    "diffusion": {"noise": {"law": "normal"}, "step_noise": {"law": "normal"}},
    "token_chain": {"noise": {"law": "uniform", "range": [0.0, 1.0]}},
}
SUPPORTED_LENGTH_SETTINGS = {"eos_token_id", "max_new_tokens"}  # by generate.py
# Settings that it doesn't support, with the values besides None that have no effect.
NEUTRAL_VALUES: dict[str, tuple] = {
    "do_sample": (True,),
    "sampling_method": ("auto", "adaptive", "batch"),
    "num_return_sequences": (1,),
    "max_length": (20,),  # upstream's old default
    "min_length": (0,),
    "min_new_tokens": (0,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "remove_invalid_values": (False,),
}


# The graphs


@dataclass
class Graph:
    """Arguments of torch.onnx.export for one file, such as backbone.onnx, and test cases for the result."""

    module: nn.Module
    example: tuple
    dynamic_shapes: tuple  # for each argument its axes of any size
    inputs: list[str]  # names
    outputs: list[str]
    # Inputs of other sizes and the model's own outputs, by name.
    cases: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=list)


class Backbone(nn.Module):
    """Maps patches (B, P, K), a mask (B, S + P) and a cache of S patches to hidden states (B, P, D) and the new cache.

    The causal mask is built here because upstream's control flow can't be traced.
    """

    def __init__(self, model: CALMForCausalLM):
        super().__init__()
        self.model = model.model

    def forward(self, tokens: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        num_patches, num_past = tokens.shape[1], past[0].shape[2]
        cache = build_cache(past)
        index_P = torch.arange(num_patches) + num_past
        is_causal_PT = torch.arange(num_past + num_patches) <= index_P[:, None]
        is_attended_B1PT = is_causal_PT[None, None] & (mask[:, None, None, :] > 0)
        bias = torch.zeros(is_attended_B1PT.shape).masked_fill(~is_attended_B1PT, torch.finfo(torch.float32).min)
        positions_BT = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs = self.model(
            input_ids=tokens.flatten(1),
            attention_mask=bias,
            position_ids=positions_BT.index_select(1, index_P),
            cache=cache,
            use_cache=True,
        )
        return outputs.last_hidden_state, cache_tensors(cache)


def build_cache(tensors: list[Tensor]) -> DynamicCache:
    """Builds a cache from the keys and values [key of layer 0, value of layer 0, key of layer 1, …]."""
    cache = DynamicCache()
    for layer in range(len(tensors) // 2):
        cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
    return cache


def cache_tensors(cache: DynamicCache) -> list[Tensor]:
    """Returns a cache's keys and values in the order of `build_cache`."""
    layers: list[Any] = cache.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


class Head(nn.Module):
    """Maps hidden states (B, D) and noise tensors to latent samples (N, B, Z), or to tokens (N, B, K)."""

    def __init__(self, head: GenerativeHead, names: list[str]):
        super().__init__()
        self.head, self.names = head, names

    def forward(self, hidden: Tensor, noise_tensors: list[Tensor]) -> Tensor:
        noise: dict[str, Any] = dict(zip(self.names, noise_tensors, strict=True))
        return self.head.sample(hidden, **noise)


class Decoder(nn.Module):
    """Maps latent vectors (M, Z) to their most probable tokens (M, K) and logits (M, K, V)."""

    def __init__(self, autoencoder: CALMAutoencoder):
        super().__init__()
        self.decoder = autoencoder.decoder

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.decoder(latents)
        return logits.argmax(-1), logits


def backbone_graph(model: CALMForCausalLM) -> Graph:
    config, generator = model.config, torch.Generator().manual_seed(0)
    cache_names = [f"{kind}.{layer}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]

    def random_inputs(batch: int, num_new: int, num_past: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        tokens = torch.randint(config.vocab_size, (batch, num_new, config.patch_size), generator=generator)
        mask = torch.ones(batch, num_past + num_new, dtype=torch.long)
        shape: Any = batch, config.num_key_value_heads, num_past, config.head_dim
        return tokens, mask, [torch.randn(shape, generator=generator) for _ in cache_names]

    axes = {0: DYNAMIC, 1: DYNAMIC}
    graph = Graph(
        Backbone(model),
        example=random_inputs(2, 3, 5),
        dynamic_shapes=(axes, axes, [{0: DYNAMIC, 2: DYNAMIC} for _ in cache_names]),
        inputs=["tokens", "mask", *(f"past_{name}" for name in cache_names)],
        outputs=["hidden", *(f"present_{name}" for name in cache_names)],
    )
    for batch, num_new, num_past, num_masked in ((1, 4, 0, 0), (1, 1, 7, 0), (3, 2, 4, 2)):
        tokens, mask, past = random_inputs(batch, num_new, num_past)
        mask[0, :num_masked] = 0  # as of a shorter, left-padded sequence
        cache = build_cache(past)
        outputs = model.model(input_ids=tokens.flatten(1), attention_mask=mask, cache=cache, use_cache=True)
        expected = dict(zip(graph.outputs, [outputs.last_hidden_state, *cache_tensors(cache)], strict=True))
        graph.cases.append((dict(zip(graph.inputs, [tokens, mask, *past], strict=True)), expected))
    return graph


def head_graph(model: CALMForCausalLM) -> Graph:
    head, generator = model.head, torch.Generator().manual_seed(1)

    def random_inputs(num_samples: int, batch: int) -> tuple[Tensor, dict[str, Any]]:
        hidden = torch.randn(batch, model.config.hidden_size, generator=generator)
        return hidden, head.predrawn_noise(num_samples, batch, hidden, generator)

    hidden, noise = random_inputs(5, 2)
    # The axes of samples and of the batch come before the last one.
    noise_axes = [{tensor.dim() - 3: DYNAMIC, tensor.dim() - 2: DYNAMIC} for tensor in noise.values()]
    graph = Graph(
        Head(head, list(noise)),
        example=(hidden, list(noise.values())),
        dynamic_shapes=({0: DYNAMIC}, noise_axes),
        inputs=["hidden", *noise],
        outputs=["tokens" if head.samples_tokens else "latents"],
    )
    for num_samples, batch in ((1, 1), (7, 3), (64, 1)):
        hidden, noise = random_inputs(num_samples, batch)
        graph.cases.append(({"hidden": hidden, **noise}, {graph.outputs[0]: head.sample(hidden, **noise)}))
    return graph


def decoder_graph(model: CALMForCausalLM) -> Graph:
    generator, latent_size = torch.Generator().manual_seed(2), model.config.latent_size
    graph = Graph(
        Decoder(model.autoencoder),
        example=(torch.randn(3, latent_size, generator=generator),),
        dynamic_shapes=({0: DYNAMIC},),
        inputs=["latents"],
        outputs=["tokens", "logits"],
    )
    for num_latents in (1, 17):
        latents = torch.randn(num_latents, latent_size, generator=generator)
        logits = model.autoencoder.decode(latents)
        graph.cases.append(({"latents": latents}, {"tokens": logits.argmax(-1), "logits": logits}))
    return graph


GRAPH_BUILDERS = {"backbone": backbone_graph, "head": head_graph, "decoder": decoder_graph}


# Tracing


@contextmanager
def traceable(head: GenerativeHead) -> Iterator[None]:
    """Makes the flow and diffusion heads traceable.

    Their time and noise schedules become constants, since ONNX lacks operators that compute them, and the modulation
    is computed for all times at once, since the number of chunks would depend on the batch.
    """
    num_steps, device = getattr(head, "num_steps", 1), torch.device("cpu")
    times = heads_calm_flow_diffusion.solver_times(num_steps, device)
    schedule = heads_calm_flow_diffusion.diffusion_schedule(num_steps, device)

    def precompute_modulation(net: ModulatedMLP, times_T: Tensor, context: Tensor) -> Iterator[Modulation]:
        all_times = net.modulation(times_T.view(-1, *[1] * (context.dim() - 1)), context)
        for index in range(len(times_T)):
            yield [tuple(values[index] for values in layer) for layer in all_times]

    with (
        mock.patch.object(heads_calm_flow_diffusion, "solver_times", lambda *_: times),
        mock.patch.object(heads_calm_flow_diffusion, "diffusion_schedule", lambda *_: schedule),
        mock.patch.object(ModulatedMLP, "precompute_modulation", precompute_modulation),
    ):
        yield


@contextmanager
def silence_exporter() -> Iterator[None]:
    """Suppresses the exporter's warnings about missing packages and its own internals."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def translation_table() -> dict:
    """Returns ONNX translations of the PyTorch operators that the exporter lacks."""
    op: Any = importlib.import_module("onnxscript").opset18

    def searchsorted(ordered, values, out_int32=False, right=False, side=None, sorter=None):
        """Counts the entries of `ordered` (..., V) below each of `values` (..., N), or not above it if `right`."""
        is_below = (op.LessOrEqual if right else op.Less)(op.Unsqueeze(ordered, [-2]), op.Unsqueeze(values, [-1]))
        return op.ReduceSum(op.Cast(is_below, to=7), [-1], keepdims=0)  # 7 is int64

    return {torch.ops.aten.searchsorted.Tensor: searchsorted}


def write_graph(name: str, graph: Graph, path: Path, opset: int | None) -> None:
    """Traces a graph and writes it, with the weights in a separate file."""
    try:
        with silence_exporter():
            program = torch.onnx.export(
                graph.module.eval(),
                graph.example,
                dynamo=True,
                dynamic_shapes=graph.dynamic_shapes,
                input_names=graph.inputs,
                output_names=graph.outputs,
                opset_version=opset,
                custom_translation_table=translation_table(),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(f"the {name} can't be exported by torch.onnx.export: {first_line(error)}") from error
    assert program is not None, "the dynamo exporter returns one"
    exported_opset = program.model.opset_imports[""]
    if opset is not None and exported_opset != opset:
        raise InputError(f"--opset {opset}: the {name} could only be exported to opset {exported_opset}.")
    for part in (program.model.graph, *program.model.functions.values()):
        for node in part.all_nodes():  # stack traces with local paths
            node.metadata_props.clear()
    program.save(path, external_data=True)


def max_relative_error(path: Path, graph: Graph) -> float:
    """Returns the largest error of onnxruntime over all cases, relative to the output's largest value; NaN if any is.

    The error of a decoded token is the gap between its logit and the largest one, that of sampled tokens their part
    that differs.
    """
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    errors = [0.0]
    for inputs, expected in graph.cases:
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        outputs = dict(zip(graph.outputs, map(torch.from_numpy, session.run(graph.outputs, feed)), strict=True))
        for name, value in expected.items():
            if outputs[name].shape != value.shape:
                raise InputError(f"{path.name} returns {name} {tuple(outputs[name].shape)}, not {tuple(value.shape)}.")
            error, scale = (outputs[name] - value).abs(), value.abs().max()
            if name == "hidden":  # masked patches don't count
                error = error[inputs["mask"][:, -value.shape[1] :] > 0]
            elif name == "tokens" and "logits" not in expected:
                error, scale = (outputs[name] != value).float().mean(), torch.ones(())
            elif name == "tokens":
                logits = expected["logits"]
                chosen = logits.gather(-1, outputs[name].unsqueeze(-1)).squeeze(-1)
                error, scale = logits.amax(-1) - chosen, logits.abs().max()
            errors.append(float(error.max() / scale.clamp(min=torch.finfo(torch.float32).tiny)))
    return float(np.max(errors))  # unlike max, propagates NaN


# The folder


def export_config(model: CALMForCausalLM) -> dict[str, Any]:
    """Returns the contents of calm.json."""
    config, generation = model.config, model.generation_config
    assert generation is not None, "a generative model has one"
    sampling = PatchSampling.from_generation_config(generation, do_sample=True)
    eos = generation.eos_token_id
    fillers = (config.prompt_filler_token_id, config.pad_token_id, generation.pad_token_id, 0)
    specs = NOISE_SPECS[config.head_type]
    noise = model.head.predrawn_noise(1, 1, torch.zeros(1, config.hidden_size), None)
    return {
        "patch_size": config.patch_size,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "num_key_value_heads": config.num_key_value_heads,
        "head_size": config.head_dim,
        "head_type": config.head_type,
        "noises": [
            {"name": name, "shape": [*tensor.shape[:-3], "draws", "rows", tensor.shape[-1]], **specs[name]}
            for name, tensor in noise.items()
        ],
        "filler_token_id": next(token for token in fillers if token is not None),
        "bos_token_id": generation.bos_token_id if generation.bos_token_id is not None else config.bos_token_id,
        "eos_token_ids": [] if eos is None else eos if isinstance(eos, list) else [eos],
        "max_new_tokens": generation.max_new_tokens,
        **{name: getattr(sampling, name) for name in generate_onnx.Sampling._fields},
    }


def ignored_settings(generation: GenerationConfig) -> list[str]:
    """Returns the settings of a generation configuration that generate.py doesn't support, as "field=value"."""
    names = {*LENGTH_SETTINGS, *PROCESSOR_SETTINGS} - SUPPORTED_LENGTH_SETTINGS
    names |= UNSUPPORTED_SETTINGS.keys() | NEUTRAL_VALUES.keys()
    values = {name: getattr(generation, name, None) for name in sorted(names)}
    values["do_sample"] = bool(values["do_sample"])  # upstream's default is off
    # In UNSUPPORTED_SETTINGS a reason comes before the neutral values.
    neutral = {name: (*NEUTRAL_VALUES.get(name, ()), *UNSUPPORTED_SETTINGS.get(name, ())[1:]) for name in names}
    return [f"{name}={value!r}" for name, value in values.items() if value is not None and value not in neutral[name]]


def load(name: str, opset: int | None) -> tuple[CALMForCausalLM, Any]:
    """Loads a CALM in float32 and its tokenizer, and checks that it can be exported."""
    with format_load_errors(name):
        config = PretrainedConfig.get_config_dict(name)[0]
    if config.get("model_type") != "calm":
        raise InputError(f"{name} is no CALM.")
    if (head_type := config.get("head_type", "energy")) not in NOISE_SPECS:
        raise InputError(f"{name} has a head of type {head_type!r}: those exported are {', '.join(NOISE_SPECS)}.")
    require_package(PACKAGES, "onnx", "calm export")
    onnx: Any = importlib.import_module("onnx")
    latest = onnx.defs.onnx_opset_version()
    if opset is not None and not MIN_OPSET <= opset <= latest:
        raise InputError(f"--opset {opset}: must be at least {MIN_OPSET}, and at most the installed onnx's {latest}.")
    tokenizer = load_tokenizer(name)
    model = load_checked(CALMForCausalLM.from_pretrained, name, dtype=torch.float32, attn_implementation="eager")
    rotation = model.model.rotary_emb.rope_type
    if rotation not in SUPPORTED_ROPE_TYPES:  # others depend on the longest sequence of the batch
        raise InputError(f"{name} has rope_type={rotation!r}: those exported are {', '.join(SUPPORTED_ROPE_TYPES)}.")
    if getattr(model, "is_quantized", False):
        raise InputError(f"{name} is quantised: export the original model.")
    check_tokenizer(model, tokenizer, name)
    return model.eval(), tokenizer


def write_folder(model: CALMForCausalLM, tokenizer, folder: Path, opset: int | None, tolerance: float) -> None:
    """Writes the graphs, compares each with the model, and writes the other files; prints a line for each graph."""
    for name, build_graph in GRAPH_BUILDERS.items():
        print(f"{name}: traced, written and compared …", flush=True)
        start, path = time.perf_counter(), folder / f"{name}.onnx"
        with torch.no_grad():
            graph = build_graph(model)
            with traceable(model.head):
                write_graph(name, graph, path, opset)
        difference = max_relative_error(path, graph)
        size = sum(file.stat().st_size for file in folder.glob(f"{name}.onnx*"))
        seconds = time.perf_counter() - start
        print(f"{name}: {size / 1e6:.1f} MB in {seconds:.0f} s, largest relative difference {difference:.1e}")
        if not difference <= tolerance:  # also if it is NaN
            raise InputError(
                f"{name}.onnx differs from the model by {difference:.1e} of the largest output, more than the "
                f"{tolerance:.1e} of --tolerance."
            )
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "calm.json").write_text(json.dumps(export_config(model), indent=2) + "\n", encoding="utf-8")
    shutil.copy(generate_onnx.__file__, folder / "generate.py")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("calm export", __doc__)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a CALM; `.` is the demo model")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the new folder to write")
    opset = f"ONNX opset, at least {MIN_OPSET} (default: torch's)"
    parser.add_argument("--opset", type=positive, metavar="N", help=opset)
    tolerance = f"largest allowed error, relative to the largest output (default: {TOLERANCE})"
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=tolerance)
    options = parser.parse_args(argv)
    with known_errors(InputError, OSError), new_folder(options.output) as folder:
        with known_errors():
            model, tokenizer = load(options.model, options.opset)
            assert model.generation_config is not None, "a generative model has one"
            if settings := ignored_settings(model.generation_config):
                print(f"warning: generate.py ignores {', '.join(settings)} of {options.model}.", file=sys.stderr)
        write_folder(model, tokenizer, folder, options.opset, options.tolerance)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f'Wrote {options.output} ({size / 1e6:.1f} MB): python {options.output / "generate.py"} "Once upon a time"')


if __name__ == "__main__":
    sys.exit(main())
