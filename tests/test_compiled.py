"""A compiled step is one graph, compiled once, and writes what the uncompiled step writes."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tiny import HEAD_TYPES, tiny_model
from transformers import CompileConfig

from calm_transformers.model import generation_calm_compiled

pytestmark = pytest.mark.transformers

LAWS = {
    "T = 1": {"temperature": 1.0},
    "batch": {"temperature": 0.5, "sampling_method": "batch"},
    "adaptive": {"temperature": 0.5},
    "1/T not whole": {"temperature": 0.4},
    "exact": {"temperature": 0.5, "sampling_method": "exact"},
    "greedy": {"do_sample": False},
}
PROMPT = torch.randint(10, 60, (2, 17), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(PROMPT)
MASK[0, :9] = 0
NEW_TOKENS = 16
STATIC = {"cache_implementation": "static"}


def small_model(head="energy"):
    return tiny_model(head, num_hidden_layers=1, num_mlp_layers=1)


def config(backend="eager"):
    return CompileConfig(backend=backend, mode=None)


def write(model, seeds=(1, 2), **settings):
    """With a generator a row, whose random numbers are the same however many are drawn at once; or the global one."""
    generators = seeds and [torch.Generator().manual_seed(seed) for seed in seeds]
    defaults = {"do_sample": True, "max_new_tokens": NEW_TOKENS, "num_candidates": 12, "eos_token_id": None}
    return model.generate(PROMPT, attention_mask=MASK, generator=generators, **STATIC, **defaults | settings)


@pytest.fixture
def graphs():
    """A backend that counts what it is given, and refuses a graph that is no whole step."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    backend.made = made
    return backend


@pytest.mark.parametrize(
    "head, law",
    [
        *(("energy", law) for law in ("batch", "exact", "greedy")),
        *(pytest.param("energy", law, marks=pytest.mark.slow) for law in ("T = 1", "adaptive", "1/T not whole")),
        *(pytest.param(head, "adaptive", marks=pytest.mark.slow) for head in HEAD_TYPES if head != "energy"),
    ],
)
def test_one_graph_for_all_steps_of_all_texts_which_are_the_uncompiled_ones(graphs, head, law):
    model, compiled = small_model(head), {"compile_config": config(graphs)}
    for seeds in ((1, 2), (3, 4)):
        assert torch.equal(write(model, seeds, **LAWS[law], **compiled), write(model, seeds, **LAWS[law]))
    assert len(graphs.made) == 1 and NEW_TOKENS > 2 * model.config.patch_size


@pytest.mark.slow
def test_the_same_text_with_the_inductor():
    model, law = small_model(), LAWS["adaptive"]
    assert torch.equal(write(model, **law, compile_config=config("inductor")), write(model, **law))


@pytest.mark.slow
def test_many_laws_each_have_their_graph_and_no_more_are_kept_than_may_be(graphs, monkeypatch):
    """PyTorch by itself compiles a function eight times at most."""
    model = small_model()
    for number in range(2, 11):
        write(model, max_new_tokens=8, temperature=0.5, num_candidates=number, compile_config=config(graphs))
    assert len(graphs.made) == 9
    monkeypatch.setattr(generation_calm_compiled, "MAX_COMPILED_STEPS", 1)
    for number in (2, 11):
        write(model, max_new_tokens=8, temperature=0.5, num_candidates=number, compile_config=config(graphs))
    assert len(generation_calm_compiled.COMPILED[model]) == 1


@pytest.mark.slow
def test_the_global_generator_gives_the_draws_of_uncompiled_steps():
    """Of the batch method, which draws as many at once; of a prompt read in chunks."""
    texts = []
    for settings in ({}, {"compile_config": config()}):
        torch.manual_seed(0)
        texts.append(write(small_model(), None, **LAWS["batch"], prefill_chunk_size=8, **settings))
    assert torch.equal(*texts)


@pytest.mark.slow
def test_rows_that_end_and_tokens_that_may_not_stand(graphs):
    """EOS ends a row and is kept out of the first tokens: the graph stays one, and the text the uncompiled one's."""
    model = small_model()
    free = write(model, temperature=0.5)
    begun, rest = free[:, PROMPT.shape[1] :].split([4, NEW_TOKENS - 4], dim=1)
    eos = next(int(token) for token in rest[0] if token not in begun)  # ends a row, but none in the first step
    for settings in ({}, {"min_new_tokens": 9}):
        settings = {"temperature": 0.5, "eos_token_id": eos, "pad_token_id": 0} | settings
        graphs.made.clear()
        compiled = write(model, compile_config=config(graphs), **settings)
        assert torch.equal(compiled, write(model, **settings)) and len(graphs.made) == 1
    assert eos not in compiled[:, PROMPT.shape[1] : PROMPT.shape[1] + 9]


def test_disable_compile_leaves_steps_as_they_are(graphs):
    write(small_model(), temperature=0.5, compile_config=config(graphs), disable_compile=True)
    assert not graphs.made


@pytest.mark.slow
def test_nothing_is_kept_in_the_model_nor_the_model_by_what_is_kept():
    model = small_model()
    text = write(model, temperature=0.5, compile_config=config())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(write(again, temperature=0.5), text)
    reference = weakref.ref(model)
    assert model in generation_calm_compiled.COMPILED
    del model, again
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cache_implementation": "dynamic"}, 'add cache_implementation="static"'),
        ({"use_cache": False}, 'add cache_implementation="static"'),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "return no hidden_states; leave it out"),
        ({"repetition_penalty": 2.0}, "compiled steps call no logits processors"),
    ],
)
def test_what_cannot_be_compiled_is_refused(settings, message):
    settings = STATIC | {"compile_config": config(), "max_new_tokens": 8} | settings
    with pytest.raises(ValueError, match=message):
        small_model().generate(PROMPT, **settings)


def test_a_model_that_cannot_be_compiled_is_refused():
    model = small_model()
    model.config._attn_implementation = "flex_attention"  # which takes no mask
    with pytest.raises(ValueError, match="attn_implementation='flex_attention'"):
        write(model, compile_config=config())
    model.head._hf_hook = object()  # as accelerate leaves it where weights are offloaded
    with pytest.raises(ValueError, match="offloaded"):
        write(model, compile_config=config())
