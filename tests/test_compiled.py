"""Compiled generation steps: one graph, compiled once, with the same output as uncompiled steps."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tiny import HEAD_TYPES, METHODS, seeded, tiny_model
from transformers import CompileConfig

from calm_transformers.model import generation_calm_compiled

SETTINGS = METHODS | {
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "distilled": {"temperature": 0.5, "sampling_method": "distilled"},
}
PROMPT = torch.randint(10, 60, (2, 17), generator=seeded())
MASK = torch.ones_like(PROMPT)
MASK[0, :9] = 0
NEW_TOKENS = 16
STATIC = {"cache_implementation": "static"}


def small_model(head="energy", **overrides):
    return tiny_model(head, num_hidden_layers=1, num_mlp_layers=1, **overrides)


def config(backend="eager"):
    return CompileConfig(backend=backend, mode=None)


def write(model, seeds=(1, 2), **settings):
    """Generates with per-row generators, whose numbers do not depend on block sizes, or with the global generator."""
    generators = seeds and [seeded(seed) for seed in seeds]
    defaults = {"do_sample": True, "max_new_tokens": NEW_TOKENS, "num_candidates": 12, "eos_token_id": None}
    return model.generate(PROMPT, attention_mask=MASK, generator=generators, **STATIC, **defaults | settings)


@pytest.fixture
def graphs():
    """A backend that counts the graphs that it is given."""
    torch._dynamo.reset()  # a function that was recompiled too often for other models is not compiled for new ones
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph.forward

    backend.captured = captured
    return backend


@pytest.mark.parametrize(
    "head, name",
    [
        *(pytest.param("energy", name, marks=pytest.mark.transformers) for name in ("batch", "exact", "greedy")),
        *(pytest.param("energy", name, marks=pytest.mark.slow) for name in ("T = 1", "adaptive", "1/T not whole")),
        pytest.param("energy", "distilled", marks=pytest.mark.slow),
        *(pytest.param(head, "adaptive", marks=pytest.mark.slow) for head in HEAD_TYPES if head != "energy"),
        ("token_chain", "greedy"),
        pytest.param("token_chain", "top_p", marks=pytest.mark.slow),
    ],
)
def test_one_graph_compiles_all_steps_with_unchanged_output(graphs, head, name):
    model = small_model(head, distilled_temperature=0.25 if name == "distilled" else None)
    compiled = {"compile_config": config(graphs)}
    for seeds in ((1, 2), (3, 4)):
        assert torch.equal(write(model, seeds, **SETTINGS[name], **compiled), write(model, seeds, **SETTINGS[name]))
    assert len(graphs.captured) == 1 and NEW_TOKENS > 2 * model.config.patch_size


@pytest.mark.slow
def test_inductor_gives_the_same_sequences():
    model, settings = small_model(), SETTINGS["adaptive"]
    assert torch.equal(write(model, **settings, compile_config=config("inductor")), write(model, **settings))


@pytest.mark.slow
def test_each_setting_has_its_graph_up_to_the_cache_limit(graphs, monkeypatch):
    """Beyond its limit of recompilations PyTorch runs a function uncompiled; here the limit is two."""
    model, settings = small_model(), {"max_new_tokens": 8, "temperature": 0.5, "compile_config": config(graphs)}
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in (2, 3, 4):
            write(model, num_candidates=number, **settings)
        assert len(graphs.captured) == 3
        monkeypatch.setattr(generation_calm_compiled, "MAX_COMPILED_STEPS", 1)
        for number in (2, 5):
            write(model, num_candidates=number, **settings)
    assert len(generation_calm_compiled.COMPILED[model]) == 1


@pytest.mark.slow
def test_the_global_generator_gives_the_samples_of_uncompiled_steps():
    """With the batch method, whose block sizes are the same, and a prompt prefilled in chunks."""
    sequences = []
    for settings in ({}, {"compile_config": config()}):
        torch.manual_seed(0)
        sequences.append(write(small_model(), None, **SETTINGS["batch"], prefill_chunk_size=8, **settings))
    assert torch.equal(*sequences)


@pytest.mark.slow
def test_finished_rows_and_forbidden_tokens_keep_one_graph(graphs):
    """EOS ends a row, or is forbidden among the first tokens: still one graph and the uncompiled output."""
    model = small_model()
    free = write(model, temperature=0.5)
    begun, rest = free[:, PROMPT.shape[1] :].split([4, NEW_TOKENS - 4], dim=1)
    eos = next(int(token) for token in rest[0] if token not in begun)  # ends a row, but none in the first step
    for settings in ({}, {"min_new_tokens": 9}):
        settings = {"temperature": 0.5, "eos_token_id": eos, "pad_token_id": 0} | settings
        graphs.captured.clear()
        compiled = write(model, compile_config=config(graphs), **settings)
        assert torch.equal(compiled, write(model, **settings)) and len(graphs.captured) == 1
    assert eos not in compiled[:, PROMPT.shape[1] : PROMPT.shape[1] + 9]


@pytest.mark.transformers
def test_disable_compile_compiles_nothing(graphs):
    write(small_model(), temperature=0.5, compile_config=config(graphs), disable_compile=True)
    assert not graphs.captured


@pytest.mark.slow
def test_compiled_steps_neither_block_copies_nor_keep_the_model_alive():
    model = small_model()
    text = write(model, temperature=0.5, compile_config=config())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(write(again, temperature=0.5), text)
    reference = weakref.ref(model)
    assert model in generation_calm_compiled.COMPILED
    del model, again
    gc.collect()
    assert reference() is None


@pytest.mark.transformers
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cache_implementation": "dynamic"}, 'add cache_implementation="static"'),
        ({"use_cache": False}, 'add cache_implementation="static"'),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "return no hidden_states; leave it out"),
        ({"repetition_penalty": 2.0}, "compiled steps call no logits processors"),
    ],
)
def test_settings_that_cannot_be_compiled_raise_an_error(settings, message):
    settings = STATIC | {"compile_config": config(), "max_new_tokens": 8} | settings
    with pytest.raises(ValueError, match=message):
        small_model().generate(PROMPT, **settings)


@pytest.mark.transformers
def test_a_model_that_cannot_be_compiled_raises_an_error():
    model = small_model()
    model.config._attn_implementation = "flex_attention"  # which takes no mask
    with pytest.raises(ValueError, match="attn_implementation='flex_attention'"):
        write(model, compile_config=config())
    model.head._hf_hook = object()  # as accelerate leaves it where weights are offloaded
    with pytest.raises(ValueError, match="offloaded"):
        write(model, compile_config=config())
