"""The argmax over a large vocabulary, screened in int8: always the full product's, refused where that is unsure."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import BOS, tiny_model

from calm import screening_calm
from calm.screening_calm import VocabularyScreen

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this PyTorch has no fbgemm"
)

# One tile; several with a last one that is no whole number of groups; fewer rows than a group has.
NUM_ROWS = [5, 512, 8192, 16390, 20001]


def matrix(num_rows, width=48, seed=0):
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


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
    ids_M = VocabularyScreen(weight_Vd).argmax(states_Md, weight_Vd)
    if ids_M is None:  # too many to rescore is allowed only where int8 says nothing
        assert weights is rows_with_one_large_weight
    else:
        assert_is_argmax(ids_M, weight_Vd, states_Md)


def test_states_with_one_large_value():
    weight_Vd, states_Md = matrix(9001, 64), matrix(50, 64, seed=1)
    states_Md[:, 3] *= 40
    ids_M = VocabularyScreen(weight_Vd).argmax(states_Md, weight_Vd)
    assert ids_M is not None
    assert_is_argmax(ids_M, weight_Vd, states_Md)


def test_largest_products_do_not_overflow():
    """Weights and states at the ends of their ranges: with 8-bit states fbgemm's sums would saturate on AVX2."""
    sign_d = torch.where(matrix(1, 512)[0] > 0, 1.0, -1.0)
    weight_Vd = sign_d * torch.linspace(-1, 1, 9001)[:, None]
    ids_M = VocabularyScreen(weight_Vd).argmax(torch.stack([sign_d, -sign_d]), weight_Vd)
    assert ids_M.tolist() == [9000, 0]


def test_of_equal_rows_the_first():
    weight_Vd = matrix(3000).repeat(4, 1)
    ids_M = VocabularyScreen(weight_Vd).argmax(matrix(64, seed=1), weight_Vd)
    assert (ids_M < 3000).all()


def test_few_rows_are_left_to_rescore(monkeypatch):
    """Random rows are the worst case: even there int8 leaves less than one in a hundred."""
    rescored, products = [], screening_calm._products
    monkeypatch.setattr(
        screening_calm,
        "_products",
        lambda weight, rows, states: rescored.append(rows.numel()) or products(weight, rows, states),
    )
    weight_Vd = matrix(30_000, 512)
    VocabularyScreen(weight_Vd).argmax(matrix(100, 512, seed=1), weight_Vd)
    assert sum(rescored) < 0.01 * 100 * 30_000


@pytest.mark.parametrize("states", [torch.zeros(3, 48), torch.full((3, 48), torch.nan)])
def test_it_says_when_it_cannot_tell(states):
    weight_Vd = matrix(9001)
    screen = VocabularyScreen(weight_Vd)
    ids_M = screen.argmax(states, weight_Vd)
    assert ids_M is None or torch.equal(ids_M, (states @ weight_Vd.T).argmax(-1))


def test_rows_all_alike_are_left_to_the_full_product():
    weight_Vd = matrix(1).expand(300_000, -1).contiguous()
    assert VocabularyScreen(weight_Vd).argmax(weight_Vd[:1], weight_Vd) is None


# In the decoder


@pytest.fixture
def autoencoder(monkeypatch):
    """A small vocabulary, screened all the same."""
    monkeypatch.setattr(screening_calm, "LEAST_WEIGHTS", 0)
    return tiny_model().autoencoder


def some_states(num_states=40):
    return torch.randn(num_states, 32, generator=torch.Generator().manual_seed(0)), torch.arange(num_states) % 4


def read_with_full_product(autoencoder, states):
    return autoencoder.decoder.lm_head(autoencoder.decoder.finish(states)).argmax(-1)


def test_tokens_are_read_through_the_screen(monkeypatch, autoencoder):
    states, positions = some_states()
    seen, argmax = [], VocabularyScreen.argmax
    monkeypatch.setattr(VocabularyScreen, "argmax", lambda self, *args: seen.append(1) or argmax(self, *args))
    assert torch.equal(autoencoder.read_tokens(states, positions), read_with_full_product(autoencoder, states))
    assert seen


def test_a_small_vocabulary_is_not_screened():
    autoencoder = tiny_model().autoencoder
    autoencoder.read_tokens(*some_states())
    assert autoencoder.decoder.screen is None


@pytest.mark.parametrize("prepare", ["bfloat16", "forbidden", "no engine", "offloaded", "undecided"])
def test_the_full_product_where_it_cannot_be_screened(monkeypatch, autoencoder, prepare):
    states, positions = some_states()
    forbidden_KV = None
    if prepare == "bfloat16":
        autoencoder, states = autoencoder.bfloat16(), states.bfloat16()
    elif prepare == "forbidden":
        forbidden_KV = torch.zeros(4, autoencoder.config.vocab_size, dtype=torch.bool)
    elif prepare == "no engine":
        monkeypatch.setattr(screening_calm, "_pack", lambda *args: (_ for _ in ()).throw(AttributeError("gone")))
    elif prepare == "offloaded":
        autoencoder.decoder.lm_head.forward = autoencoder.decoder.lm_head.forward  # as hooks are put there
    elif prepare == "undecided":
        monkeypatch.setattr(screening_calm, "MOST_SURVIVORS", 0)
    ids = autoencoder.read_tokens(states, positions, forbidden_KV)
    assert torch.equal(ids, read_with_full_product(autoencoder, states))
    assert (autoencoder.decoder.screen is None) == (prepare != "undecided")


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

    plain = text()
    monkeypatch.setattr(screening_calm, "LEAST_WEIGHTS", 0)
    assert torch.equal(text(), plain)
    assert model.autoencoder.decoder.screen is not None


def test_autocast_takes_the_full_product(monkeypatch):
    """Its products are in bfloat16, of which the bound knows nothing."""
    monkeypatch.setattr(screening_calm, "LEAST_WEIGHTS", 0)
    model, texts = tiny_model(), []
    for lazy in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prompt, settings = torch.tensor([[BOS, 5, 6, 7]]), {"temperature": 0.5, "num_candidates": 20}
            texts.append(model.generate(prompt, do_sample=True, max_new_tokens=24, lazy_decoding=lazy, **settings))
    assert torch.equal(*texts) and model.autoencoder.decoder.screen is None


def test_a_cast_model_carries_no_screen(autoencoder):
    autoencoder.read_tokens(*some_states())
    assert autoencoder.decoder.screen is not None
    states, positions = some_states()
    autoencoder.bfloat16().read_tokens(states.bfloat16(), positions)
    assert autoencoder.decoder.screen is None


def test_threads_that_pack_at_once_leave_the_engine_as_it_was():
    before = torch.backends.quantized.engine
    with ThreadPoolExecutor(8) as threads:
        screens = list(threads.map(lambda seed: VocabularyScreen(matrix(2000, seed=seed)), range(32)))
    assert torch.backends.quantized.engine == before and len(screens) == 32


def test_the_engine_that_the_user_chose_stays():
    before = torch.backends.quantized.engine
    VocabularyScreen(matrix(100))
    assert torch.backends.quantized.engine == before
