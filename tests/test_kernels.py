"""Tables that are made once, products by oneDNN, the argmax screened in int8: the same values as without them."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from model_copies import ROOT
from tiny import BOS, tiny_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from calm_transformers.model import kernels_calm
from calm_transformers.model.heads_calm_diffusion import diffusion_schedule
from calm_transformers.model.heads_calm_flow import solver_times
from calm_transformers.model.kernels_calm import (
    SWITCH,
    OneDNNProducts,
    VocabularyScreen,
    fast_products,
    numbers_up_to,
    to_device,
)
from calm_transformers.model.modeling_calm import CALMForCausalLM

CPU = torch.device("cpu")
needs_one_dnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Tables


TABLES = {
    "numbers": lambda size: numbers_up_to(size, CPU),
    "times": lambda size: solver_times(size, CPU),
    "schedule": lambda size: diffusion_schedule(size, CPU).log_betas,
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_trace_neither_gets_a_kept_table_nor_leaves_one(kind):
    make, sizes = TABLES[kind], (971, 972)
    kept = make(sizes[0])
    with FakeTensorMode():
        assert all(isinstance(make(size), FakeTensor) for size in sizes)
    assert type(make(sizes[1])) is torch.Tensor and make(sizes[0]) is kept


def test_a_table_of_inference_mode_is_used_in_training():
    with torch.inference_mode():
        numbers_up_to(973, CPU)
    (numbers_up_to(973, CPU) * torch.ones(973, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(("device", "waits_not"), [("cuda", True), ("mps", False), ("xpu", False), ("cpu", False)])
def test_only_cuda_copies_without_waiting(monkeypatch, device, waits_not):
    seen = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: seen.append(non_blocking))
    to_device([1, 2], torch.device(device))
    assert seen == [waits_not]


# float32 products


@pytest.fixture
def always(monkeypatch):
    """Small products, too, on every processor."""
    monkeypatch.setattr(kernels_calm, "LEAST_ROWS", 1)
    monkeypatch.setattr(kernels_calm, "LEAST_WORK", 1)
    monkeypatch.setattr(kernels_calm, "one_dnn_is_faster", lambda: True)


@pytest.fixture
def calls(monkeypatch, always):
    """The shapes of all products that oneDNN makes."""
    seen, product = [], kernels_calm._one_dnn_linear
    monkeypatch.setattr(kernels_calm, "_one_dnn_linear", lambda *args: seen.append(args[0].shape) or product(*args))
    return seen


ROWS = {
    "one": values(1, 24),
    "many": values(33, 24),
    "axes": values(3, 1, 5, 24),
    "columns of a matrix": values(24, 7).T,
    "every other": values(9, 48)[:, ::2],
    "repeated": values(1, 4, 24).expand(3, 4, 24),
    "in the middle of memory": values(300)[17 : 17 + 240].view(10, 24),
}


@needs_one_dnn
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has_bias", [True, False])
@torch.no_grad()
def test_values_are_those_of_pytorch(calls, rows, has_bias):
    rows, weight, bias = ROWS[rows], values(40, 24, seed=1), values(40, seed=2) if has_bias else None
    with fast_products(100, 100):
        product = F.linear(rows, weight, bias)
    assert len(calls) == 1
    torch.testing.assert_close(product, F.linear(rows, weight, bias), atol=1e-5, rtol=1e-5)


@needs_one_dnn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes_are_left_alone(calls, dtype):
    rows, weight = values(8, 24).to(dtype), values(40, 24).to(dtype)
    with fast_products(100, 100):
        assert torch.equal(F.linear(rows, weight), rows @ weight.T) and not calls


@needs_one_dnn
def test_gradients_flow_as_ever(calls):
    layer, rows = torch.nn.Linear(24, 40), values(8, 24)
    with fast_products(100, 100):
        layer(rows).sum().backward()
    assert layer.weight.grad is not None and not calls


@needs_one_dnn
@torch.no_grad()
def test_autocast_is_obeyed(calls):
    with torch.autocast("cpu", dtype=torch.bfloat16), fast_products(100, 100):
        assert torch.nn.Linear(24, 40)(values(8, 24)).dtype == torch.bfloat16
    assert not calls


@needs_one_dnn
@torch.no_grad()
def test_quantised_weights_are_left_alone(calls):
    class Weight(torch.Tensor):
        pass

    weight = values(40, 24).as_subclass(Weight)
    with fast_products(100, 100):
        F.linear(values(8, 24), weight)
    assert not calls


@needs_one_dnn
@pytest.mark.parametrize("num_rows, width", [(3, 4096), (64, 64)])
@torch.no_grad()
def test_small_products_are_not_worth_a_context(monkeypatch, num_rows, width):
    monkeypatch.setattr(kernels_calm, "one_dnn_is_faster", lambda: True)
    assert isinstance(fast_products(num_rows, width), nullcontext)
    assert isinstance(fast_products(64, 512), OneDNNProducts)


@needs_one_dnn
@torch.no_grad()
def test_the_environment_turns_it_off(monkeypatch, always):
    assert isinstance(fast_products(100, 100), OneDNNProducts)
    monkeypatch.setenv(SWITCH, "plain")
    assert isinstance(fast_products(100, 100), nullcontext)


@needs_one_dnn
@torch.no_grad()
def test_less_than_float32_is_left_to_pytorch(always):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert isinstance(fast_products(100, 100), nullcontext)
    finally:
        torch.set_float32_matmul_precision(before)
    assert isinstance(fast_products(100, 100), OneDNNProducts)


@needs_one_dnn
@torch.no_grad()
def test_flops_are_counted_as_ever(always):
    def flops(context):
        with FlopCounterMode(display=False) as counter, context():
            F.linear(values(8, 24), values(40, 24))
        return counter.get_total_flops()

    assert flops(lambda: fast_products(100, 100)) == flops(nullcontext) == 2 * 8 * 24 * 40


@needs_one_dnn
@pytest.mark.parametrize("seconds", [(1.0, 0.9, False), (1.0, 0.5, True)])
def test_what_is_faster_is_measured_once(monkeypatch, seconds):
    pytorch, one_dnn, is_faster = seconds
    measured = []

    def best_seconds(product, rows, weight):
        measured.append(product)
        return pytorch if product is F.linear else one_dnn

    monkeypatch.setattr(kernels_calm, "_best_seconds", best_seconds)
    kernels_calm.one_dnn_is_faster.cache_clear()
    assert [kernels_calm.one_dnn_is_faster() for _ in range(3)] == [is_faster] * 3 and len(measured) == 2
    kernels_calm.one_dnn_is_faster.cache_clear()


@needs_one_dnn
def test_without_the_operator_pytorch_multiplies(monkeypatch):
    def gone(*args):
        raise RuntimeError("no such overload")

    monkeypatch.setattr(kernels_calm, "_one_dnn_linear", gone)
    kernels_calm.one_dnn_is_faster.cache_clear()
    assert not kernels_calm.one_dnn_is_faster()
    kernels_calm.one_dnn_is_faster.cache_clear()


@needs_one_dnn
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


@needs_one_dnn
def test_backbone_head_and_decoder_all_gain(calls):
    model = tiny_model()
    prompt, settings = torch.tensor([[BOS, 5, 6, 7]]), {"temperature": 0.5, "num_candidates": 20}
    model.generate(prompt, do_sample=True, max_new_tokens=8, **settings)
    sizes: set[int | None] = {model.config.hidden_size, model.config.noise_size, model.autoencoder.config.latent_size}
    assert sizes <= {shape[-1] for shape in calls}


@needs_one_dnn
@torch.no_grad()
def test_a_context_is_of_its_own_thread(always):
    rows, weight, plain = values(64, 24), values(40, 24), []

    def product(_):
        plain.append(torch._C._len_torch_function_stack())
        return F.linear(rows, weight)

    with fast_products(100, 100), ThreadPoolExecutor(4) as threads:
        list(threads.map(product, range(16)))
    assert set(plain) == {0}


@needs_one_dnn
def test_texts_by_row_are_the_same_alone(always):
    """As the server's batches have it: a row with a generator of its own is written as it would be alone."""
    model = tiny_model()
    prompt = torch.tensor([[BOS, 5, 6, 7]])

    def texts(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"temperature": 0.5, "num_candidates": 20, "generator": generators, "eos_token_id": None}
        return model.generate(prompt.repeat(len(seeds), 1), do_sample=True, max_new_tokens=24, **settings).tolist()

    assert texts([1, 2, 3]) == [text for seed in (1, 2, 3) for text in texts([seed])]


# The argmax


# One tile; several with a last one that is no whole number of groups; fewer rows than a group has.
NUM_ROWS = [5, 512, 4096, 16390, 20001]


def matrix(num_rows, width=48, seed=0):
    return values(num_rows, width, seed=seed)


def assert_is_argmax(ids_M, weight_Vd, states_Md):
    """By the products in float64: the largest up to the rounding of float32."""
    logits_MV = states_Md.double() @ weight_Vd.double().T
    lost_M = logits_MV.amax(-1) - logits_MV.gather(-1, ids_M[:, None])[:, 0]
    rounding_M = 1e-5 * states_Md.double().norm(dim=-1) * weight_Vd.double().norm(dim=-1).max()
    assert (lost_M <= rounding_M).all()
    assert (lost_M == 0).double().mean() > 0.98


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("num_states", [1, 3, 200])
def test_it_is_the_full_products_argmax(num_rows, num_states):
    weight_Vd, states_Md = matrix(num_rows), matrix(num_states, seed=1)
    ids_M = VocabularyScreen(weight_Vd).argmax(states_Md, weight_Vd)
    assert torch.equal(ids_M, (states_Md @ weight_Vd.T).argmax(-1))


def rows_of_many_sizes(num_rows, width):
    return matrix(num_rows, width) * torch.logspace(-6, 3, num_rows)[torch.randperm(num_rows)][:, None]


def rows_with_one_large_weight(num_rows, width):
    weight_Vd = matrix(num_rows, width)
    weight_Vd[:, 7] *= 300  # int8 has next to nothing left for the others
    return weight_Vd


def pairs_that_int8_cannot_tell_apart(num_rows, width):
    weight_Vd = matrix(num_rows, width)
    weight_Vd[1::2] = weight_Vd[::2][: num_rows // 2] + 1e-4 * matrix(num_rows // 2, width, seed=2)
    return weight_Vd


def some_rows_of_zero(num_rows, width):
    weight_Vd = matrix(num_rows, width)
    weight_Vd[::3] = 0
    return weight_Vd


def negative_products(num_rows, width):
    return -matrix(num_rows, width).abs()


@pytest.mark.parametrize(
    "weights",
    [
        rows_of_many_sizes,
        rows_with_one_large_weight,
        pairs_that_int8_cannot_tell_apart,
        some_rows_of_zero,
        negative_products,
    ],
)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_weights_made_to_mislead(weights, scale):
    torch.manual_seed(0)
    weight_Vd = weights(9001, 64)
    states_Md = scale * matrix(100, 64, seed=1).abs()
    states_Md[::2, 3] *= 40  # one large value
    ids_M = VocabularyScreen(weight_Vd).argmax(states_Md, weight_Vd)
    assert ids_M is not None
    assert_is_argmax(ids_M, weight_Vd, states_Md)


def test_largest_products_do_not_overflow():
    """Weights and states at the ends of their ranges: with 8 bits on both sides sums would saturate on AVX2."""
    sign_d = torch.where(matrix(1, 512)[0] > 0, 1.0, -1.0)
    screen = VocabularyScreen(matrix(2))
    for sign in (1, -1):
        tile_Td = (sign * kernels_calm.largest_weight() * torch.ones(16, 512)).to(torch.int8)
        error_M2, screen.step_G, screen.bound_2G = torch.zeros(1, 2), torch.ones(2), torch.zeros(2, 2)
        most_MG = screen._most([tile_Td], torch.full((1, 512), 127, dtype=torch.int8), error_M2)
        assert (most_MG == sign * 127 * kernels_calm.largest_weight() * 512).all()
    weight_Vd = sign_d * torch.linspace(-1, 1, 9001)[:, None]
    ids_M = VocabularyScreen(weight_Vd).argmax(torch.stack([sign_d, -sign_d]), weight_Vd)
    assert ids_M.tolist() == [9000, 0]


@pytest.mark.parametrize("exact, largest", [((127, 63), 127), ((63,), 63), ((), None)])
def test_how_many_bits_products_have_is_tried(monkeypatch, exact, largest):
    def product(states, rows):
        whole = states.int() @ rows.int()
        return whole if int(rows.max()) in exact else whole - 1

    monkeypatch.setattr(torch.ops.aten, "_int_mm", product)
    kernels_calm.largest_weight.cache_clear()
    assert kernels_calm.largest_weight() == largest
    assert VocabularyScreen.is_possible(matrix(5)) == (largest is not None)
    kernels_calm.largest_weight.cache_clear()


def test_of_equal_rows_the_first():
    weight_Vd = matrix(3000).repeat(4, 1)
    ids_M = VocabularyScreen(weight_Vd).argmax(matrix(64, seed=1), weight_Vd)
    assert (ids_M < 3000).all()


@pytest.mark.parametrize("widest", [1, 20])
def test_few_rows_are_left_to_rescore(monkeypatch, widest):
    """Random rows are the worst case: even there int8 leaves less than one in a hundred, also with a wide column."""
    rescored, product = [], torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda rows, states: rescored.append(rows[..., 0].numel()) or product(rows, states)
    )
    weight_Vd = matrix(30_000, 512)
    weight_Vd[:, 7] *= widest
    VocabularyScreen(weight_Vd).argmax(matrix(100, 512, seed=1), weight_Vd)
    assert 0 < sum(rescored) < 0.01 * 100 * 30_000


@pytest.mark.parametrize("states", [torch.zeros(3, 48), torch.full((3, 48), torch.nan)])
def test_it_says_when_it_cannot_tell(states):
    weight_Vd = matrix(9001)
    screen = VocabularyScreen(weight_Vd)
    ids_M = screen.argmax(states, weight_Vd)
    assert ids_M is None or torch.equal(ids_M, (states @ weight_Vd.T).argmax(-1))
    weight_Vd = matrix(1).expand(300_000, -1).contiguous()  # rows that are all alike
    assert VocabularyScreen(weight_Vd).argmax(weight_Vd[:1], weight_Vd) is None


# In the decoder


@pytest.fixture
def autoencoder(monkeypatch):
    """A small vocabulary, screened all the same."""
    screen_always(monkeypatch)
    return tiny_model().autoencoder


def screen_always(monkeypatch):
    monkeypatch.setattr(VocabularyScreen, "measure", lambda screen, *_: setattr(screen, "pays", True))


def some_states(num_states=40):
    return torch.randn(num_states, 32, generator=torch.Generator().manual_seed(0)), torch.arange(num_states) % 4


def read_with_full_product(autoencoder, states):
    return autoencoder.decoder.lm_head(autoencoder.decoder.finish(states)).argmax(-1)


@pytest.mark.parametrize("screened, plain", [(1.0, 2.0), (2.0, 1.0)])
def test_whether_it_pays_is_measured_once(monkeypatch, screened, plain):
    seconds, seen, argmax = [screened, plain], [], VocabularyScreen.argmax
    monkeypatch.setattr(kernels_calm, "_seconds", lambda work: (work(), seconds.pop(0))[1])
    monkeypatch.setattr(VocabularyScreen, "argmax", lambda self, *args: seen.append(1) or argmax(self, *args))
    autoencoder, (states, positions) = tiny_model().autoencoder, some_states()
    for _ in range(3):
        assert torch.equal(autoencoder.read_tokens(states, positions), read_with_full_product(autoencoder, states))
    assert autoencoder.decoder.screen.pays == (screened < plain)
    assert len(seen) == (4 if screened < plain else 1) and not seconds
    assert bool(autoencoder.decoder.screen.tiles) == (screened < plain)


@pytest.mark.parametrize("prepare", ["float16", "switched off", "offloaded", "undecided", "dropped by another thread"])
def test_the_full_product_where_it_cannot_be_screened(monkeypatch, autoencoder, prepare):
    states, positions = some_states()
    if prepare == "float16":
        autoencoder, states = autoencoder.half(), states.half()
    elif prepare == "switched off":
        monkeypatch.setenv("CALM_PRODUCTS", "plain")
    elif prepare == "offloaded":
        autoencoder.decoder.lm_head.forward = autoencoder.decoder.lm_head.forward  # as hooks are put there
    elif prepare == "undecided":
        monkeypatch.setattr(kernels_calm, "MOST_SURVIVORS", 0)
    elif prepare == "dropped by another thread":
        autoencoder.read_tokens(states, positions)
        autoencoder.decoder.screen.tiles = []
    ids = autoencoder.read_tokens(states, positions)
    assert torch.equal(ids, read_with_full_product(autoencoder, states))
    assert (autoencoder.decoder.screen is None) == (prepare in ("float16", "switched off", "offloaded"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forbidden_tokens_are_not_read(autoencoder, dtype):
    autoencoder, (states, positions) = autoencoder.to(dtype), some_states(400)
    states = states.to(dtype)
    favourites = read_with_full_product(autoencoder, states)
    forbidden_KV = torch.zeros(4, autoencoder.config.vocab_size, dtype=torch.bool)
    for position in range(4):  # those that it would choose most often
        forbidden_KV[position, favourites[positions == position].mode().values] = True
    forbidden_KV[3] |= torch.rand(autoencoder.config.vocab_size, generator=torch.Generator().manual_seed(0)) < 0.5
    ids = autoencoder.read_tokens(states, positions, forbidden_KV)
    logits = autoencoder.decoder.lm_head(autoencoder.decoder.finish(states))
    assert torch.equal(ids, logits.masked_fill(forbidden_KV[positions], -torch.inf).argmax(-1))
    assert (ids != favourites).any() and autoencoder.decoder.screen is not None
    everything_KV = torch.ones_like(forbidden_KV)
    assert (autoencoder.read_tokens(states, positions, everything_KV) == 0).all(), "the full product answers"


@pytest.mark.parametrize("in_place", [True, False])
def test_changed_weights_are_packed_anew(autoencoder, in_place):
    states, positions = some_states()
    autoencoder.read_tokens(states, positions)
    weight = autoencoder.decoder.lm_head.weight
    with torch.no_grad():
        if in_place:
            weight.neg_()
        else:
            weight.data = -weight.data
    assert torch.equal(autoencoder.read_tokens(states, positions), read_with_full_product(autoencoder, states))


@pytest.mark.transformers
def test_a_screened_model_can_be_copied_pickled_and_saved(autoencoder, tmp_path):
    states, positions = some_states()
    ids = autoencoder.read_tokens(states, positions)
    for again in (copy.deepcopy(autoencoder), pickle.loads(pickle.dumps(autoencoder))):
        assert torch.equal(again.read_tokens(states, positions), ids)
    autoencoder.save_pretrained(tmp_path)
    assert torch.equal(type(autoencoder).from_pretrained(tmp_path).read_tokens(states, positions), ids)


def test_the_text_is_the_same_with_and_without(monkeypatch):
    model = tiny_model()
    prompt = torch.tensor([[BOS, 5, 6, 7, 8]])

    def text():
        torch.manual_seed(0)
        return model.generate(prompt, max_new_tokens=24, do_sample=True, temperature=0.5, num_candidates=20)

    monkeypatch.setenv("CALM_PRODUCTS", "plain")
    plain = text()
    assert model.autoencoder.decoder.screen is None
    monkeypatch.delenv("CALM_PRODUCTS")
    screen_always(monkeypatch)
    assert torch.equal(text(), plain)
    assert model.autoencoder.decoder.screen is not None


def test_autocast_takes_the_full_product(monkeypatch):
    """Its products are in bfloat16, of which the bound knows nothing."""
    screen_always(monkeypatch)
    model, texts = tiny_model(), []
    for lazy in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prompt, settings = torch.tensor([[BOS, 5, 6, 7]]), {"temperature": 0.5, "num_candidates": 20}
            texts.append(model.generate(prompt, do_sample=True, max_new_tokens=24, lazy_decoding=lazy, **settings))
    assert torch.equal(*texts) and model.autoencoder.decoder.screen is None


def test_less_than_float32_takes_the_full_product(autoencoder):
    """The bound counts on products that are exact to float32."""
    states, positions = some_states()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        autoencoder.read_tokens(states, positions)
        assert autoencoder.decoder.screen is None
    finally:
        torch.set_float32_matmul_precision(before)
    autoencoder.read_tokens(states, positions)
    assert autoencoder.decoder.screen is not None


def test_a_cast_model_is_screened_anew(autoencoder):
    states, positions = some_states()
    autoencoder.read_tokens(states, positions)
    before = autoencoder.decoder.screen
    ids = autoencoder.bfloat16().read_tokens(states.bfloat16(), positions)
    assert autoencoder.decoder.screen not in (None, before)
    assert torch.equal(ids, read_with_full_product(autoencoder, states.bfloat16()))


def test_threads_that_read_at_once_read_the_same():
    autoencoder, (states, positions) = tiny_model().autoencoder, some_states()
    expected = read_with_full_product(autoencoder, states)
    with ThreadPoolExecutor(8) as threads:
        assert all(
            torch.equal(ids, expected)
            for ids in threads.map(lambda _: autoencoder.read_tokens(states, positions), range(64))
        )


# On many states


STATES_AT_ONCE = 2_000


def real_decoder_and_states(num_states):
    """The demo's decoder, and its states for this repository's texts, with the posterior's noise."""
    model = CALMForCausalLM.from_pretrained(ROOT).eval()
    tokenizer, autoencoder = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "tokenizer.json")), model.autoencoder
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    K = model.config.patch_size
    ids = torch.tensor(tokenizer(text[: 5 * num_states])["input_ids"])[:num_states]
    mean, log_std = autoencoder.encode(ids[: len(ids) // K * K][None])
    draws = -(-num_states // (len(ids) // K * K))
    noise = torch.randn(draws, *mean.shape[1:], generator=torch.Generator().manual_seed(0))
    latents = mean + log_std.exp() * noise
    states_Nd = torch.cat(
        [autoencoder.decoder.finish(autoencoder.decode_states(part)).flatten(0, 2) for part in latents.split(1)]
    )
    return autoencoder.decoder, states_Nd[:num_states]


def random_states(decoder, num_states):
    """Random ones, and such as lie between two rows, or next to one."""
    generator = torch.Generator().manual_seed(1)
    weight_Vd = decoder.lm_head.weight
    rows = weight_Vd[torch.randint(len(weight_Vd), (2, num_states), generator=generator)]
    noise = torch.randn(rows[0].shape, generator=generator) * weight_Vd.std()
    kind = torch.arange(num_states)[:, None] % 3
    return torch.where(kind == 0, noise, torch.where(kind == 1, rows[0] + 0.3 * noise, rows[0] + rows[1]))


def shapes_agree(states_Md, weight_Vd):
    """Whether a logit is the same in products of two shapes; in bfloat16 not on every CPU without instructions."""
    one_by_one = torch.cat([torch.bmm(weight_Vd[None], state_d[None, :, None])[..., 0] for state_d in states_Md])
    return torch.equal(torch.nn.functional.linear(states_Md, weight_Vd), one_by_one)


def assert_is_a_matter_of_rounding(states_Md, weight_Vd, ids_M, others_M):
    """Few differ, and the exact logits of those by no more than a rounding."""
    differs_M = ids_M != others_M
    assert differs_M.double().mean() < 0.01
    states = states_Md[differs_M].double()
    one, other = ((states * weight_Vd[ids[differs_M]].double()).sum(-1) for ids in (ids_M, others_M))
    assert ((one - other).abs() <= torch.finfo(weight_Vd.dtype).eps * one.abs()).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_states", [10_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_equal_tokens_on_many_states(dtype, num_states):
    """With rows that come twice, or are zero, and with tokens that are forbidden at some positions."""
    decoder, real_Nd = real_decoder_and_states(num_states // 2)
    states_Nd = torch.cat([real_Nd, random_states(decoder, num_states // 2)])
    decoder.to(dtype)
    weight_Vd = decoder.lm_head.weight
    weight_Vd[500:600], weight_Vd[600:650] = weight_Vd[200:300], 0
    forbidden_KV = torch.rand(4, len(weight_Vd), generator=torch.Generator().manual_seed(2)) < 0.01
    screen, compared = VocabularyScreen(weight_Vd), 0
    is_exact = dtype == torch.float32 or shapes_agree(states_Nd[:400].to(dtype), weight_Vd)
    for i, states_Md in enumerate(states_Nd.to(dtype).split(STATES_AT_ONCE)):
        positions_M = torch.arange(len(states_Md)) % 4
        forbidden = forbidden_KV if i % 2 else None
        ids_M = screen.argmax(states_Md, weight_Vd, forbidden, positions_M)
        plain_M = decoder._argmax(states_Md, positions_M, forbidden)
        assert ids_M is not None
        if is_exact:
            assert torch.equal(ids_M, plain_M)
        else:
            assert_is_a_matter_of_rounding(states_Md, weight_Vd, ids_M, plain_M)
        compared += len(ids_M)
    assert compared == num_states
