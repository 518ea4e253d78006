"""Peak memory of convert_checkpoint.py on a random checkpoint of a published size, in the published layout.

    python -m calm.benchmarks.convert_memory --size XL

Writes the checkpoint and its bundle to a temporary folder ($TMPDIR; for XL 7.6 GB and 3.8 GB), converts in a process
of its own, and prints a table row. The peak is that process's VmHWM: everything resident, PyTorch itself and the pages
of mapped input files included, although the kernel could drop those at any time. Linux only.

Measured on 2 cores with torch 2.13 (the command above, then with --input_dtype bfloat16 --format safetensors, then
with --size M):

| size | parameters without autoencoder | input | written | peak memory | peak / written | seconds |
| --- | --- | --- | --- | --- | --- | --- |
| XL | 1.83 B | float32 .bin | 3.81 GB bfloat16 | 2.37 GB | 0.62 | 27 |
| XL | 1.83 B | bfloat16 .safetensors | 3.81 GB bfloat16 | 1.07 GB | 0.28 | 31 |
| M | 0.37 B | float32 .bin | 0.90 GB bfloat16 | 1.19 GB | 1.33 | 10 |
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from calm.command_line import Parser, command

SIZES = {  # hidden and intermediate size of the published checkpoints
    "M": (1024, 2752),
    "L": (1536, 4096),
    "XL": (2560, 6880),
}
VOCAB_SIZE, LAYERS, HEAD_BLOCKS, NOISE_SIZE = 128257, 16, 4, 64
PATCH_SIZE, LATENT_SIZE, AE_HIDDEN_SIZE, AE_INTERMEDIATE_SIZE, AE_LAYERS = 4, 128, 512, 1280, 2
SHARD_BYTES = 2 * 10**9
CONVERT = """
import sys
from calm.convert_checkpoint import main
code = main(sys.argv[1:])
print(open("/proc/self/status", encoding="utf-8").read().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def layer_norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def gated_mlp(name: str, hidden: int, intermediate: int) -> Shapes:
    return {
        f"{name}.gate_proj.weight": (intermediate, hidden),
        f"{name}.up_proj.weight": (intermediate, hidden),
        f"{name}.down_proj.weight": (hidden, intermediate),
    }


def language_model_shapes(hidden: int, intermediate: int) -> Shapes:
    """Published names and shapes of an energy model, its head under one of its two names."""
    shapes: Shapes = {"transformer.embed_tokens.weight": (VOCAB_SIZE, hidden), "transformer.norm.weight": (hidden,)}
    for number in range(LAYERS):
        layer = f"transformer.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= gated_mlp(f"{layer}.mlp", hidden, intermediate)
    shapes |= linear("embed_proj.0", 2 * hidden, PATCH_SIZE * hidden) | linear("embed_proj.2", hidden, 2 * hidden)
    shapes |= layer_norm("embed_proj.3", hidden)
    head = "mlp_generator"
    shapes |= linear(f"{head}.noise_embd", hidden, NOISE_SIZE) | linear(f"{head}.hidden_embd", hidden, hidden)
    shapes |= layer_norm(f"{head}.norm_noise", hidden) | layer_norm(f"{head}.norm_hidden", hidden)
    for number in range(HEAD_BLOCKS):
        block = f"{head}.mlp_blocks.{number}"
        shapes |= layer_norm(f"{block}.in_ln", hidden) | linear(f"{block}.linears.0", hidden, 2 * hidden)
        shapes |= linear(f"{block}.linears.2", hidden, hidden) | linear(f"{block}.linears.4", 2 * hidden, hidden)
        shapes |= linear(f"{block}.down_proj", hidden, hidden)
    shapes |= layer_norm(f"{head}.final_layer.in_ln", hidden)
    shapes |= linear(f"{head}.final_layer.linears.0", hidden, hidden)
    return shapes | linear(f"{head}.final_layer.linears.2", LATENT_SIZE, hidden)


def autoencoder_shapes() -> Shapes:
    hidden = AE_HIDDEN_SIZE
    shapes: Shapes = {"encoder.embed_tokens.weight": (VOCAB_SIZE, hidden)}
    for part in ("encoder", "decoder"):
        shapes[f"{part}.norm.weight"] = (hidden,)
        for number in range(AE_LAYERS):
            layer = f"{part}.{part}_layers.{number}"
            shapes |= {f"{layer}.layernorm.weight": (hidden,)}
            shapes |= gated_mlp(f"{layer}.mlp", hidden, AE_INTERMEDIATE_SIZE)
    shapes |= linear("encoder.squeeze_layer", hidden, PATCH_SIZE * hidden)
    shapes |= linear("encoder.hidden_to_latent", 2 * LATENT_SIZE, hidden)
    shapes |= linear("decoder.latent_to_hidden", hidden, LATENT_SIZE)
    return shapes | linear("decoder.expand_layer", PATCH_SIZE * hidden, hidden)


def write_checkpoint(folder: Path, shapes: Shapes, config: dict, dtype: torch.dtype, suffix: str) -> None:
    """Writes random weights, a shard at a time."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shards, size = [[]], 0
    for name, shape in shapes.items():
        size += torch.Size(shape).numel() * dtype.itemsize
        if size > SHARD_BYTES * len(shards):
            shards.append([])
        shards[-1].append(name)
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        shard = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        save({name: torch.empty(shapes[name], dtype=dtype).uniform_(-0.1, 0.1) for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = json.dumps({"weight_map": weight_map})
    (folder / f"{stem}.{suffix}.index.json").write_text(index, encoding="utf-8")


def measure(size: str, input_dtype: str, dtype: str, suffix: str, folder: Path) -> dict:
    """Writes the checkpoint, converts it, and returns bytes and seconds."""
    hidden, intermediate = SIZES[size]
    shapes = language_model_shapes(hidden, intermediate)
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    both = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
    positions = {"max_position_embeddings": 2048, "rope_theta": 10000.0}
    config = {"num_attention_heads": 16, "num_key_value_heads": 16, **both, **positions, **tokens}
    write_checkpoint(folder / "calm", shapes, config, getattr(torch, input_dtype), suffix)
    write_checkpoint(folder / "autoencoder", autoencoder_shapes(), both, getattr(torch, input_dtype), suffix)
    Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<s>")).save(
        f"{folder}/calm/tokenizer.json"
    )
    arguments = ["--calm", f"{folder}/calm", "--autoencoder", f"{folder}/autoencoder", "--output", f"{folder}/bundle"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, *arguments, "--dtype", dtype], stdout=subprocess.PIPE, text=True, check=True
    )
    return {
        "parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "peak": int(done.stdout.split()[-1]) * 1024,
        "written": os.path.getsize(folder / "bundle" / "model.safetensors"),
        "seconds": time.perf_counter() - start,
    }


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m calm.benchmarks.convert_memory", __doc__)
    parser.add_argument("--size", choices=SIZES, default="XL")
    parser.add_argument("--input_dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--format", choices=["bin", "safetensors"], default="bin")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.size, args.input_dtype, args.dtype, args.format, Path(folder))
    print("| size | parameters without autoencoder | input | written | peak memory | peak / written | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {args.size} | {result['parameters'] / 1e9:.2f} B | {args.input_dtype} .{args.format} | "
        f"{result['written'] / 1e9:.2f} GB {args.dtype} | {result['peak'] / 1e9:.2f} GB | "
        f"{result['peak'] / result['written']:.2f} | {result['seconds']:.0f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
