"""What the copies of a model must have in common, wherever they were saved, pushed or converted to."""

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Everything that modeling_calm.py needs, and nothing else, travels with the weights.
CODE_FILES = {
    "configuration_calm.py",
    "generation_calm.py",
    "heads_calm.py",
    "modeling_calm.py",
    "modeling_calm_autoencoder.py",
    "samplers_calm.py",
    "scores_calm.py",
}
AUTO_MAP = {
    "AutoConfig": "configuration_calm.CALMConfig",
    "AutoModel": "modeling_calm.CALMModel",
    "AutoModelForCausalLM": "modeling_calm.CALMForCausalLM",
}
PROMPT = "The key to life is"


def code_digests(folder):
    """File name → sha256 of each Python file in a folder, but the __init__.py that transformers puts beside them."""
    files = sorted(Path(folder).glob("*.py"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.name != "__init__.py"}


ROOT_CODE = {name: digest for name, digest in code_digests(ROOT).items() if name in CODE_FILES}


def weights_digest(model):
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sample_text(model, tokenizer):
    """A text sampled at T = 0.5 with a fixed seed."""
    import torch

    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=True, temperature=0.5, max_new_tokens=12)
    return tokenizer.decode(ids[0])


def assert_carries_its_code(folder):
    """The folder's code is the root's, and its config.json names classes in it, not in the place it came from."""
    assert code_digests(folder) == ROOT_CODE
    assert json.loads((Path(folder) / "config.json").read_text())["auto_map"] == AUTO_MAP
