"""Offloaded weights: every head, autoencoder and backbone, on the CPU and on disk, compute what they do in memory.

PyTorch answers `cpu @ meta` with a CPU tensor of no meaning and no error, so texts and losses are compared exactly: a
weight that is read past its module's forward shows in them.
"""

import accelerate
import pytest
import torch
import transformers
from text_and_loss import some_ids, text_and_loss
from tiny import HEAD_TYPES, tiny_model, tiny_tokenizer

from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.serving.engine import Engine

pytestmark = pytest.mark.transformers

CPU = torch.device("cpu")
PARTS = ("model", "head", "autoencoder")


def offload(module, how, folder):
    if how == "cpu":
        accelerate.cpu_offload(module, execution_device=CPU)
    else:
        accelerate.disk_offload(module, folder, execution_device=CPU)
    assert {p.device.type for p in module.parameters()} == {"meta"}


@pytest.mark.parametrize("how, part", [("cpu", ""), *(("disk", part) for part in ("", *PARTS))])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_offloaded_by_accelerate(tmp_path, head_type, part, how):
    model, placed = (tiny_model(head_type, num_context_layers=1) for _ in range(2))
    offload(placed.get_submodule(part), how, tmp_path)
    lazy = {"lazy_decoding": part != "autoencoder"}
    assert text_and_loss(placed, **lazy) == text_and_loss(model, **lazy)
    assert {p.device.type for p in placed.get_submodule(part).parameters()} == {"meta"}


@pytest.mark.parametrize("parts", [["autoencoder"], PARTS], ids="+".join)
def test_loaded_from_disk_as_needed(tmp_path, parts):
    """The autoencoder's tied matrix is in the file once."""
    model = tiny_model("token_chain")
    model.save_pretrained(tmp_path / "model")
    places = {part: "disk" if part in parts else "cpu" for part in PARTS}
    placed = CALMForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    for part in PARTS:
        kinds = {p.device.type for p in placed.get_submodule(part).parameters()}
        assert kinds == ({"meta"} if part in parts else {"cpu"})
    for lazy in (True, False):
        assert text_and_loss(placed, lazy_decoding=lazy) == text_and_loss(model, lazy_decoding=lazy)


@pytest.mark.parametrize("head_type, share", [*((head, 0.3) for head in HEAD_TYPES), ("energy", 0.6)])
def test_a_model_larger_than_the_memory_it_may_take(tmp_path, share, head_type):
    """`device_map="auto"` keeps head and autoencoder whole; what doesn't fit is offloaded to disk."""
    model = tiny_model(head_type)
    model.save_pretrained(tmp_path / "model")
    room = {"cpu": int(share * sum(p.nbytes for p in model.parameters()))}
    options = {"device_map": "auto", "max_memory": room, "offload_folder": tmp_path / "disk"}
    placed = CALMForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert "disk" in placed.hf_device_map.values()
    assert not any(name.startswith(("head.", "autoencoder.")) for name in placed.hf_device_map)
    assert text_and_loss(placed) == text_and_loss(model)


@torch.no_grad()
def test_the_autoencoder_reconstructs(tmp_path):
    model, placed = (tiny_model().autoencoder for _ in range(2))
    offload(placed, "disk", tmp_path)
    outputs = [x(some_ids(), labels=some_ids(), generator=torch.Generator().manual_seed(0)) for x in (placed, model)]
    assert torch.equal(outputs[0].loss, outputs[1].loss) and torch.equal(outputs[0].logits, outputs[1].logits)


def test_inputs_belong_where_weights_are_moved_to(tmp_path):
    """`model.device`, which pipelines, tokenizers' users and our server put inputs on, is no "meta"."""
    model, placed = tiny_model(), tiny_model()
    offload(placed, "cpu", tmp_path)
    assert placed.device == placed.model.device == placed.autoencoder.device == Engine(placed, 8).device == CPU
    texts = []
    for each in (model, placed):
        generate = transformers.pipeline("text-generation", model=each, tokenizer=tiny_tokenizer())
        torch.manual_seed(0)
        texts.append(generate("a fox", max_new_tokens=8, do_sample=True)[0]["generated_text"])
    assert texts[0] == texts[1]
