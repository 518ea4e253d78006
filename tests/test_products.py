"""Linear layers by oneDNN: the same values up to rounding, and nothing but what it is meant for."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tiny import BOS, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from calm import products_calm
from calm.products_calm import SWITCH, OneDNNProducts, fast_products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def always(monkeypatch):
    """Small products, too, on every processor."""
    monkeypatch.setattr(products_calm, "LEAST_ROWS", 1)
    monkeypatch.setattr(products_calm, "LEAST_WORK", 1)
    monkeypatch.setattr(products_calm, "one_dnn_is_faster", lambda: True)


@pytest.fixture
def calls(monkeypatch, always):
    """The shapes of all products that oneDNN makes."""
    seen, product = [], products_calm._one_dnn_linear
    monkeypatch.setattr(products_calm, "_one_dnn_linear", lambda *args: seen.append(args[0].shape) or product(*args))
    return seen


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ROWS = {
    "one": values(1, 24),
    "many": values(33, 24),
    "axes": values(3, 1, 5, 24),
    "columns of a matrix": values(24, 7).T,
    "every other": values(9, 48)[:, ::2],
    "repeated": values(1, 4, 24).expand(3, 4, 24),
    "in the middle of memory": values(300)[17 : 17 + 240].view(10, 24),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has_bias", [True, False])
@torch.no_grad()
def test_values_are_those_of_pytorch(calls, rows, has_bias):
    rows, weight, bias = ROWS[rows], values(40, 24, seed=1), values(40, seed=2) if has_bias else None
    with fast_products(100, 100):
        product = F.linear(rows, weight, bias)
    assert len(calls) == 1
    torch.testing.assert_close(product, F.linear(rows, weight, bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes_are_left_alone(calls, dtype):
    rows, weight = values(8, 24).to(dtype), values(40, 24).to(dtype)
    with fast_products(100, 100):
        assert torch.equal(F.linear(rows, weight), rows @ weight.T) and not calls


@torch.no_grad()
def test_mixed_dtypes_are_refused_as_ever(calls):
    with fast_products(100, 100), pytest.raises(RuntimeError, match="dtype"):
        F.linear(values(8, 24), values(40, 24).bfloat16())


def test_gradients_flow_as_ever(calls):
    layer, rows = torch.nn.Linear(24, 40), values(8, 24)
    with fast_products(100, 100):
        layer(rows).sum().backward()
    assert layer.weight.grad is not None and not calls


@torch.no_grad()
def test_autocast_is_obeyed(calls):
    with torch.autocast("cpu", dtype=torch.bfloat16), fast_products(100, 100):
        assert torch.nn.Linear(24, 40)(values(8, 24)).dtype == torch.bfloat16
    assert not calls


@torch.no_grad()
def test_quantised_weights_are_left_alone(calls):
    class Weight(torch.Tensor):
        pass

    weight = values(40, 24).as_subclass(Weight)
    with fast_products(100, 100):
        F.linear(values(8, 24), weight)
    assert not calls


@pytest.mark.parametrize("num_rows, width", [(3, 4096), (64, 64)])
@torch.no_grad()
def test_small_products_are_not_worth_a_context(monkeypatch, num_rows, width):
    monkeypatch.setattr(products_calm, "one_dnn_is_faster", lambda: True)
    assert isinstance(fast_products(num_rows, width), nullcontext)
    assert isinstance(fast_products(64, 512), OneDNNProducts)


@torch.no_grad()
def test_small_layers_within_are_left_alone(monkeypatch):
    monkeypatch.setattr(products_calm, "_one_dnn_linear", lambda *args: pytest.fail("too small"))
    with OneDNNProducts():
        F.linear(values(2, 2048), values(1024, 2048))
        F.linear(values(64, 24), values(40, 24))


@torch.no_grad()
def test_the_environment_turns_it_off(monkeypatch, always):
    assert isinstance(fast_products(100, 100), OneDNNProducts)
    monkeypatch.setenv(SWITCH, "plain")
    assert isinstance(fast_products(100, 100), nullcontext)


@torch.no_grad()
def test_less_than_float32_is_left_to_pytorch(always):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert isinstance(fast_products(100, 100), nullcontext)
    finally:
        torch.set_float32_matmul_precision(before)
    assert isinstance(fast_products(100, 100), OneDNNProducts)


@torch.no_grad()
def test_flops_are_counted_as_ever(always):
    def flops(context):
        with FlopCounterMode(display=False) as counter, context():
            F.linear(values(8, 24), values(40, 24))
        return counter.get_total_flops()

    assert flops(lambda: fast_products(100, 100)) == flops(nullcontext) == 2 * 8 * 24 * 40


@pytest.mark.parametrize("seconds", [(1.0, 0.9, False), (1.0, 0.5, True)])
def test_what_is_faster_is_measured_once(monkeypatch, seconds):
    pytorch, one_dnn, is_faster = seconds
    measured = []

    def best_seconds(product, rows, weight):
        measured.append(product)
        return pytorch if product is F.linear else one_dnn

    monkeypatch.setattr(products_calm, "_best_seconds", best_seconds)
    products_calm.one_dnn_is_faster.cache_clear()
    assert [products_calm.one_dnn_is_faster() for _ in range(3)] == [is_faster] * 3 and len(measured) == 2
    products_calm.one_dnn_is_faster.cache_clear()


def test_without_the_operator_pytorch_multiplies(monkeypatch):
    def gone(*args):
        raise RuntimeError("no such overload")

    monkeypatch.setattr(products_calm, "_one_dnn_linear", gone)
    products_calm.one_dnn_is_faster.cache_clear()
    assert not products_calm.one_dnn_is_faster()
    products_calm.one_dnn_is_faster.cache_clear()


@torch.no_grad()
def test_the_model_is_the_same_function(monkeypatch, always):
    model = tiny_model()
    ids = torch.tensor([[BOS, 5, 6, 7, 8, 9, 10, 11]])
    contexts_BD, noise = values(6, model.config.hidden_size), values(50, 6, model.config.noise_size)
    latents = values(9, model.autoencoder.config.latent_size)

    def results():
        return (
            model(ids).last_hidden_state,
            model.head.sample(contexts_BD, noise=noise),
            model.autoencoder.decode(latents),
            model.autoencoder.decode_states(latents),
        )

    fast = results()
    monkeypatch.setenv(SWITCH, "plain")
    for one, other in zip(fast, results(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_backbone_head_and_decoder_all_gain(calls):
    model = tiny_model()
    prompt, settings = torch.tensor([[BOS, 5, 6, 7]]), {"temperature": 0.5, "num_candidates": 20}
    model.generate(prompt, do_sample=True, max_new_tokens=8, **settings)
    sizes: set[int | None] = {model.config.hidden_size, model.config.noise_size, model.autoencoder.config.latent_size}
    assert sizes <= {shape[-1] for shape in calls}


@torch.no_grad()
def test_a_context_is_of_its_own_thread(always):
    rows, weight, plain = values(64, 24), values(40, 24), []

    def product(_):
        plain.append(torch._C._len_torch_function_stack())
        return F.linear(rows, weight)

    with fast_products(100, 100), ThreadPoolExecutor(4) as threads:
        list(threads.map(product, range(16)))
    assert set(plain) == {0}


def test_texts_by_row_are_the_same_alone(always):
    """As the server's batches have it: a row with a generator of its own is written as it would be alone."""
    model = tiny_model()
    prompt = torch.tensor([[BOS, 5, 6, 7]])

    def texts(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"temperature": 0.5, "num_candidates": 20, "generator": generators, "eos_token_id": None}
        return model.generate(prompt.repeat(len(seeds), 1), do_sample=True, max_new_tokens=24, **settings).tolist()

    assert texts([1, 2, 3]) == [text for seed in (1, 2, 3) for text in texts([seed])]


def test_a_copied_model_is_as_fast(calls):
    model = copy.deepcopy(tiny_model())
    model.generate(torch.tensor([[BOS]]), do_sample=True, max_new_tokens=4)
    assert calls
