"""The argmax over a large vocabulary, screened in int8: always the full product's, refused where that is unsure."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from model_copies import ROOT
from tiny import BOS, tiny_model
from transformers import PreTrainedTokenizerFast

from calm import screening_calm
from calm.modeling_calm import CALMForCausalLM
from calm.screening_calm import VocabularyScreen

# One tile; several with a last one that is no whole number of groups; fewer rows than a group has.
NUM_ROWS = [5, 512, 4096, 16390, 20001]


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
    assert ids_M is not None
    assert_is_argmax(ids_M, weight_Vd, states_Md)


def test_states_with_one_large_value():
    weight_Vd, states_Md = matrix(9001, 64), matrix(50, 64, seed=1)
    states_Md[:, 3] *= 40
    ids_M = VocabularyScreen(weight_Vd).argmax(states_Md, weight_Vd)
    assert ids_M is not None
    assert_is_argmax(ids_M, weight_Vd, states_Md)


def test_largest_products_do_not_overflow():
    """Weights and states at the ends of their ranges: with 8 bits on both sides sums would saturate on AVX2."""
    sign_d = torch.where(matrix(1, 512)[0] > 0, 1.0, -1.0)
    screen = VocabularyScreen(matrix(2))
    for sign in (1, -1):
        tile_Td = (sign * screening_calm.largest_weight() * torch.ones(16, 512)).to(torch.int8)
        error_M2, screen.step_G, screen.bound_2G = torch.zeros(1, 2), torch.ones(2), torch.zeros(2, 2)
        most_MG = screen._most([tile_Td], torch.full((1, 512), 127, dtype=torch.int8), error_M2)
        assert (most_MG == sign * 127 * screening_calm.largest_weight() * 512).all()
    weight_Vd = sign_d * torch.linspace(-1, 1, 9001)[:, None]
    ids_M = VocabularyScreen(weight_Vd).argmax(torch.stack([sign_d, -sign_d]), weight_Vd)
    assert ids_M.tolist() == [9000, 0]


@pytest.mark.parametrize("exact, largest", [((127, 63), 127), ((63,), 63), ((), None)])
def test_how_many_bits_products_have_is_tried(monkeypatch, exact, largest):
    def product(states, rows):
        whole = states.int() @ rows.int()
        return whole if int(rows.max()) in exact else whole - 1

    monkeypatch.setattr(torch.ops.aten, "_int_mm", product)
    screening_calm.largest_weight.cache_clear()
    assert screening_calm.largest_weight() == largest
    assert VocabularyScreen.is_possible(matrix(5)) == (largest is not None)
    screening_calm.largest_weight.cache_clear()


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


def test_rows_all_alike_are_left_to_the_full_product():
    weight_Vd = matrix(1).expand(300_000, -1).contiguous()
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


def test_tokens_are_read_through_the_screen(monkeypatch, autoencoder):
    states, positions = some_states()
    seen, argmax = [], VocabularyScreen.argmax
    monkeypatch.setattr(VocabularyScreen, "argmax", lambda self, *args: seen.append(1) or argmax(self, *args))
    assert torch.equal(autoencoder.read_tokens(states, positions), read_with_full_product(autoencoder, states))
    assert seen


@pytest.mark.parametrize("screened, plain", [(1.0, 2.0), (2.0, 1.0)])
def test_whether_it_pays_is_measured_once(monkeypatch, screened, plain):
    seconds, seen, argmax = [screened, plain], [], VocabularyScreen.argmax
    monkeypatch.setattr(screening_calm, "_seconds", lambda work: (work(), seconds.pop(0))[1])
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
        monkeypatch.setattr(screening_calm, "MOST_SURVIVORS", 0)
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


def test_where_every_token_is_forbidden_the_full_product_answers(autoencoder):
    states, positions = some_states()
    forbidden_KV = torch.ones(4, autoencoder.config.vocab_size, dtype=torch.bool)
    assert (autoencoder.read_tokens(states, positions, forbidden_KV) == 0).all()


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


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_less_than_float32_takes_the_full_product(autoencoder, precision):
    """The bound counts on products that are exact to float32."""
    states, positions = some_states()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
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


NUM_STATES, STATES_AT_ONCE = 100_000, 2_000


def real_decoder_and_states():
    """The demo's decoder, and its states for this repository's texts, with the posterior's noise."""
    model = CALMForCausalLM.from_pretrained(ROOT).eval()
    tokenizer, autoencoder = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "tokenizer.json")), model.autoencoder
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    K = model.config.patch_size
    ids = torch.tensor(tokenizer(text)["input_ids"])
    mean, log_std = autoencoder.encode(ids[: len(ids) // K * K][None])
    draws = -(-NUM_STATES // (len(ids) // K * K))
    noise = torch.randn(draws, *mean.shape[1:], generator=torch.Generator().manual_seed(0))
    latents = mean + log_std.exp() * noise
    states_Nd = torch.cat(
        [autoencoder.decoder.finish(autoencoder.decode_states(part)).flatten(0, 2) for part in latents.split(1)]
    )
    return autoencoder.decoder, states_Nd[:NUM_STATES]


def random_states(decoder):
    """Random ones, and such as lie between two rows, or next to one."""
    generator = torch.Generator().manual_seed(1)
    weight_Vd = decoder.lm_head.weight
    rows = weight_Vd[torch.randint(len(weight_Vd), (2, NUM_STATES), generator=generator)]
    noise = torch.randn(rows[0].shape, generator=generator) * weight_Vd.std()
    kind = torch.arange(NUM_STATES)[:, None] % 3
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
def test_equal_tokens_on_200_000_states(dtype):
    """With rows that come twice, or are zero, and with tokens that are forbidden at some positions."""
    decoder, real_Nd = real_decoder_and_states()
    states_Nd = torch.cat([real_Nd, random_states(decoder)])
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
    assert compared == 200_000
