"""Checks that copies of a model, saved, pushed or converted, agree in code, weights and output.

The functions run in fresh processes, so they import transformers themselves.
"""

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The files saved with the weights: modeling_calm.py and all that it imports.
CODE_FILES = {
    "configuration_calm.py",
    "kernels_calm.py",
    "modeling_calm.py",
    "modeling_calm_autoencoder.py",
    *(f"heads_calm{part}.py" for part in ("", "_energy", "_flow_diffusion", "_token_chain")),
    *(f"generation_calm{part}.py" for part in ("", "_algorithms", "_candidates", "_compiled")),
    *(f"generation_calm{part}.py" for part in ("_samplers", "_sequences", "_upstream")),
}
AUTO_MAP = {
    "AutoConfig": "configuration_calm.CALMConfig",
    "AutoModel": "modeling_calm.CALMModel",
    "AutoModelForCausalLM": "modeling_calm.CALMForCausalLM",
}
PROMPT = "The key to life is"


def code_digests(folder):
    """Returns the sha256 of each Python file in a folder by name, except the __init__.py that transformers adds."""
    files = sorted(Path(folder).glob("*.py"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.name != "__init__.py"}


def root_code():
    return {name: digest for name, digest in code_digests(ROOT).items() if name in CODE_FILES}


def weights_digest(model):
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sample_text(model, tokenizer):
    """Returns a text sampled at T = 0.5 with a fixed seed."""
    import torch

    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    ids = model.generate(**prompt, do_sample=True, temperature=0.5, max_new_tokens=12)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def run_snippet(folder):
    """In a fresh process: runs the model card's snippet; returns its text, device and dtype."""
    import torch
    from transformers import pipeline

    MODEL = folder
    generator = pipeline(
        "text-generation", MODEL, trust_remote_code=True, torch_dtype=torch.bfloat16, device_map="auto"
    )
    outputs = generator(PROMPT, max_new_tokens=20, do_sample=True)
    model = generator.model
    return {"text": outputs[0]["generated_text"], "device": model.device.type, "dtype": str(model.dtype)}


def load_every_way(folder, copy):
    """In a fresh process: loads a repository in every way, saves it in `copy`, and returns what was loaded."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, TextStreamer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert weights_digest(backbone) == weights_digest(model.model)

    torch.manual_seed(0)
    snippet = run_snippet(folder)
    batch = tokenizer([PROMPT, "The dog"], return_tensors="pt", padding=True)  # the caller looks for complaints
    model.generate(**batch, max_new_tokens=8, do_sample=False, cache_implementation="static")
    model.generate(batch["input_ids"][:1], max_new_tokens=8, do_sample=False, streamer=TextStreamer(tokenizer))
    model.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    return {
        "classes": [type(part).__name__ for part in (config, backbone, model)],
        "weights": weights_digest(model),
        "text": sample_text(model, tokenizer),
        "snippet": snippet["text"],
    }


def assert_carries_its_code(folder):
    """Checks that the folder's code is the root's, and that auto_map names classes in this folder."""
    assert code_digests(folder) == root_code(), f"{folder} lacks code files, holds others, or they differ"
    assert json.loads((Path(folder) / "config.json").read_text())["auto_map"] == AUTO_MAP


def generate_by_batcher(folder):
    """In a fresh process: loads a model with the code in its folder; returns the ids that a Batcher generates."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    from calm_transformers.serving.batcher import Batcher  # registers the package's own classes

    with Batcher(model) as batcher:
        return batcher.submit([1, 40], seed=7, max_new_tokens=20).result().tokens


def reconstruct_by_auto_model(folder, ids):
    """In a fresh process: loads an autoencoder with AutoModel; returns its class and the reconstructed ids."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return type(model).__name__, model.decode_tokens(model.encode(torch.tensor(ids))[0]).tolist()
