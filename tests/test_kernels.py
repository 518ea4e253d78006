"""Cached tables, linear layers by oneDNN, the argmax screened in int8: outputs equal those of plain PyTorch."""

import ast
import copy
import pickle
import re
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from model_copies import ROOT
from tiny import BOS, record_calls, seeded, tiny_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from calm_transformers.model import kernels_calm
from calm_transformers.model.heads_calm_flow_diffusion import diffusion_schedule
from calm_transformers.model.kernels_calm import SCREENS, SWITCH, VocabularyScreen, arange, as_tensor, cpu_kernels
from calm_transformers.model.modeling_calm import CALMForCausalLM

CPU = torch.device("cpu")
PROMPT = torch.tensor([[BOS, 5, 6, 7, 8]])
needs_one_dnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def values(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def write(model, prompt=PROMPT, **settings):
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 0.5, "num_candidates": 20}
    return model.generate(prompt, max_new_tokens=24, **sampling, **settings)


@contextmanager
def set_to(switch, value, before):
    switch(value)
    try:
        yield
    finally:
        switch(before)


SWITCHES = ("switched off", "deterministic", "autocast", "medium")


def context_of(case, monkeypatch):
    """Returns the context in which neither kernel is used (`SWITCHES`), or one that changes nothing."""
    if case == "switched off":
        monkeypatch.setenv(SWITCH, "torch")
    contexts = {
        "deterministic": set_to(torch.use_deterministic_algorithms, True, False),
        "medium": set_to(torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision()),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    return contexts.get(case, nullcontext())


@pytest.mark.parametrize("make", [lambda n: arange(n, CPU), lambda n: diffusion_schedule(n, CPU).log_betas])
def test_a_trace_neither_reads_nor_fills_the_cache_of_tables(make):
    kept = make(971)
    with FakeTensorMode():
        assert isinstance(make(971), FakeTensor) and isinstance(make(972), FakeTensor)
    assert type(make(972)) is torch.Tensor and make(971) is kept


def test_a_table_cached_in_inference_mode_works_in_training():
    with torch.inference_mode():
        arange(973, CPU)
    (arange(973, CPU) * torch.ones(973, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(("device", "is_async"), [("cuda", True), ("mps", False), ("xpu", False), ("cpu", False)])
def test_only_cuda_copies_are_non_blocking(monkeypatch, device, is_async):
    seen = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: seen.append(non_blocking))
    as_tensor([1, 2], torch.device(device))
    assert seen == [is_async]


def test_a_missing_private_name_of_torch_has_a_default():
    names = ("_guards.no_such_name", "_no_module.name", "_guards.detect_fake_mode")
    found = [kernels_calm.private_function(f"torch.{name}", 7) for name in names]
    assert found[:2] == [7, 7] and found[2] != 7


@pytest.mark.parametrize("path", sorted(ROOT.glob("*_calm*.py")), ids=lambda path: path.name)
def test_no_file_imports_a_private_name_of_torch(path):
    """So that a removed name cannot break the import; `kernels_calm.private_function` has a default."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [each for each in imports if re.match(r"(from|import) torch\b.*\b_", each)] == []


# float32 linear layers


@pytest.fixture
def calls(monkeypatch):
    """Records the shapes of all oneDNN matmuls, and enables them for small shapes and every processor."""
    seen = record_calls(monkeypatch, kernels_calm, "_one_dnn_linear", lambda _, rows, *args: rows.shape)
    monkeypatch.setattr(kernels_calm, "MIN_ROWS", 1)
    monkeypatch.setattr(kernels_calm, "MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(kernels_calm, "one_dnn_is_faster", lambda: True)
    return seen


ROWS = {
    "one": values(1, 24),
    "axes": values(3, 1, 5, 24),
    "columns of a matrix": values(24, 7).T,
    "every other": values(9, 48)[:, ::2],
    "repeated": values(1, 4, 24).expand(3, 4, 24),
    "in the middle of memory": values(300)[17 : 17 + 240].view(10, 24),
}


@needs_one_dnn
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_values_are_those_of_pytorch(calls, rows):
    weight = values(40, 24, seed=1)
    for bias in (None, values(40, seed=2)):
        with cpu_kernels(100, 100):
            product = F.linear(ROWS[rows], weight, bias)
        torch.testing.assert_close(product, F.linear(ROWS[rows], weight, bias), atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


class QuantisedWeight(torch.Tensor):
    pass


@needs_one_dnn
@pytest.mark.parametrize("case", [*SWITCHES, "bfloat16", "float64", "gradients", "quantised", "small"])
@torch.no_grad()
def test_fallbacks_to_pytorch(monkeypatch, calls, case):
    rows, weight, context = values(8, 24), values(40, 24, seed=1), context_of(case, monkeypatch)
    if case in ("bfloat16", "float64"):
        rows, weight = rows.to(getattr(torch, case)), weight.to(getattr(torch, case))
    elif case == "gradients":
        weight, context = weight.requires_grad_(), torch.enable_grad()
    elif case == "quantised":
        weight = weight.as_subclass(QuantisedWeight)
    elif case == "small":
        monkeypatch.setattr(kernels_calm, "MIN_MULTIPLICATIONS", 2**21)
    with context:
        plain = F.linear(rows, weight)
        with cpu_kernels(100, 100):
            product = F.linear(rows, weight)
    assert torch.equal(product, plain) and product.requires_grad == (case == "gradients") and not calls


@needs_one_dnn
@torch.no_grad()
def test_flops_are_counted(calls):
    with FlopCounterMode(display=False) as counter, cpu_kernels(100, 100):
        F.linear(values(8, 24), values(40, 24))
    assert counter.get_total_flops() == 2 * 8 * 24 * 40


@needs_one_dnn
@torch.no_grad()
def test_backbone_head_and_decoder_use_one_dnn_with_equal_outputs(calls):
    model = tiny_model()
    contexts_BD, noise = values(6, model.config.hidden_size), values(50, 6, model.config.noise_size)
    latents = values(9, model.autoencoder.config.latent_size)
    parts = {
        "backbone": lambda: model(torch.tensor([[BOS, 5, 6, 7, 8, 9, 10, 11]])).last_hidden_state,
        "head": lambda: model.head.sample(contexts_BD, noise=noise),
        "decoder": lambda: model.autoencoder.decode(latents),
        "its states": lambda: model.autoencoder.decoder.expand(latents),
    }
    for part in parts.values():
        calls.clear()
        plain = part()
        assert not calls, "outside of the context PyTorch computes everything"
        with cpu_kernels(100, 100):
            fast = part()
        assert calls
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


@needs_one_dnn
def test_per_row_generators_give_the_same_sequences_alone(calls):
    """As in the server's batches: a row with its own generator is generated as it would be alone."""
    model = tiny_model()

    def sequences(*seeds):
        generator = [seeded(seed) for seed in seeds]
        return write(model, PROMPT.repeat(len(seeds), 1), generator=generator, eos_token_id=None).tolist()

    assert sequences(1, 2, 3) == sequences(1) + sequences(2) + sequences(3) and calls


# The argmax


def screened_argmax(weight_Vd, states_Md):
    return VocabularyScreen(weight_Vd).argmax(weight_Vd, states_Md, torch.zeros(len(states_Md), dtype=torch.long))


# One tile; several, the last not divisible into groups; fewer rows than a group has.
@pytest.mark.parametrize("num_rows, num_states", [(5, 3), (512, 1), (4096, 200), (16390, 3), (20001, 200)])
def test_screened_argmax_equals_the_full_matmul_s(num_rows, num_states):
    weight_Vd, states_Md = values(num_rows, 48), values(num_states, 48, seed=1)
    assert torch.equal(screened_argmax(weight_Vd, states_Md), (states_Md @ weight_Vd.T).argmax(-1))


WEIGHTS, PAIRS = values(9001, 64), values(4501, 64).repeat_interleave(2, 0)[1:]
ONE_LARGE = torch.ones(64).index_fill(0, torch.tensor(7), 300)
ADVERSARIAL = {
    "rows of many sizes": WEIGHTS * torch.logspace(-6, 3, 9001)[values(9001).argsort()][:, None],
    "a large column": WEIGHTS * ONE_LARGE,  # int8 has next to nothing left for the others
    "close pairs": PAIRS + 1e-4 * values(9001, 64, seed=2),  # int8 cannot tell them apart
    "negative products": -WEIGHTS.abs(),
}


@pytest.mark.parametrize("weights", ADVERSARIAL)
@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_adversarial_weights(weights, scale):
    """The chosen logit, computed in float64, is the largest up to float32 rounding."""
    weight_Vd, states_Md = ADVERSARIAL[weights], scale * values(100, 64, seed=1).abs()
    states_Md[::2, 3] *= 40  # one large value
    ids_M = screened_argmax(weight_Vd, states_Md)
    logits_MV = states_Md.double() @ weight_Vd.double().T
    lost_M = logits_MV.amax(-1) - logits_MV.gather(-1, ids_M[:, None])[:, 0]
    rounding_M = 1e-5 * states_Md.double().norm(dim=-1) * weight_Vd.double().norm(dim=-1).max()
    assert (lost_M <= rounding_M).all() and (lost_M == 0).double().mean() > 0.98


def test_largest_int8_products_do_not_overflow():
    """Rotated weights and states at the ends of their ranges: with 8 bits on both sides AVX2's sums would saturate."""
    ends_d = torch.ones(512) @ VocabularyScreen(values(5, 512)).rotation_dd.T
    weight_Vd = torch.linspace(-1, 1, 9001)[:, None] * ends_d
    ids_M = VocabularyScreen(weight_Vd).argmax(weight_Vd, torch.stack([ends_d, -ends_d]), torch.arange(2))
    assert ids_M.tolist() == [9000, 0]


@pytest.mark.parametrize("exact, largest", [((127, 63), 127), ((63,), 63), ((), None)])
def test_the_width_of_exact_int8_matmuls_is_probed(monkeypatch, exact, largest):
    def product(states, rows):
        whole = states.int() @ rows.int()
        return whole if int(rows.max()) in exact else whole - 1

    monkeypatch.setattr(torch.ops.aten, "_int_mm", product)
    kernels_calm.largest_weight.cache_clear()
    assert kernels_calm.largest_weight() == largest
    layer = torch.nn.Linear(48, 5, bias=False)
    with torch.no_grad(), cpu_kernels(1, 48):
        assert (kernels_calm.current_screen(layer) is not None) == (largest is not None)
    kernels_calm.largest_weight.cache_clear()


def test_undecidable_screens_return_none():
    weight_Vd = values(9001, 48)
    for states_Md in (torch.zeros(3, 48), torch.full((3, 48), torch.nan)):
        ids_M = screened_argmax(weight_Vd, states_Md)
        assert ids_M is None or torch.equal(ids_M, (states_Md @ weight_Vd.T).argmax(-1))
    everything_KV = torch.ones(4, 9001, dtype=torch.bool)
    assert VocabularyScreen(weight_Vd).argmax(weight_Vd, values(4, 48), torch.arange(4), everything_KV) is None
    weight_Vd = values(1, 48).expand(300_000, -1).contiguous()  # rows that are all alike
    assert screened_argmax(weight_Vd, weight_Vd[:1]) is None


# In the decoder


@pytest.fixture
def autoencoder(screen_always):
    return tiny_model().autoencoder


@pytest.fixture
def screen_always(monkeypatch):
    monkeypatch.setattr(VocabularyScreen, "measure", lambda screen, *_: setattr(screen, "is_faster", True))


STATES, POSITIONS = values(40, 32), torch.arange(40) % 4


def decode(autoencoder, states=None):
    with torch.no_grad(), cpu_kernels(40, 32):
        return autoencoder.decoder.most_probable_tokens(STATES if states is None else states, POSITIONS)


@torch.no_grad()
def decode_by_full_matmul(autoencoder, states):
    return autoencoder.decoder.lm_head(autoencoder.decoder.final_states(states)).argmax(-1)


def screen_of(autoencoder):
    return SCREENS.get(autoencoder.decoder.lm_head)


@pytest.mark.parametrize("case", [*SWITCHES, "float16", "offloaded", "undecided", "dropped meanwhile"])
def test_fallbacks_to_the_full_matmul(monkeypatch, autoencoder, case):
    """Autocast and medium precision, too: the bound counts on products that are exact to float32."""
    states, context = STATES, context_of(case, monkeypatch)
    if case == "float16":
        autoencoder, states = autoencoder.half(), states.half()
    elif case == "offloaded":
        autoencoder.decoder.lm_head.forward = autoencoder.decoder.lm_head.forward  # as hooks are put there
    elif case == "undecided":
        monkeypatch.setattr(kernels_calm, "MAX_SURVIVORS", 0)
    elif case == "dropped meanwhile":  # by another thread
        decode(autoencoder)
        screen_of(autoencoder).tiles = []
    with context:
        assert torch.equal(decode(autoencoder, states), decode_by_full_matmul(autoencoder, states))
    assert (screen_of(autoencoder) is None) == (case not in ("undecided", "dropped meanwhile"))


def test_outside_of_the_context_nothing_is_screened(autoencoder):
    ids = autoencoder.decoder.most_probable_tokens(STATES, POSITIONS)
    assert torch.equal(ids, decode(autoencoder)) and screen_of(autoencoder) is not None
    SCREENS.clear()
    autoencoder.decoder.most_probable_tokens(STATES, POSITIONS)
    assert screen_of(autoencoder) is None


@pytest.mark.parametrize("change", ["in place", "data", "cast"])
@torch.no_grad()
def test_changed_weights_are_quantised_again(autoencoder, change):
    decode(autoencoder)
    before, weight, states = screen_of(autoencoder), autoencoder.decoder.lm_head.weight, STATES
    if change == "in place":
        weight[1:].neg_()  # not what is kept of its values
    elif change == "data":
        weight.data = -weight.data
    else:
        autoencoder, states = autoencoder.bfloat16(), states.bfloat16()
    assert torch.equal(decode(autoencoder, states), decode_by_full_matmul(autoencoder, states))
    assert screen_of(autoencoder) not in (None, before)


@pytest.mark.transformers
def test_a_screened_model_can_be_copied_pickled_and_saved(autoencoder, tmp_path):
    ids = decode(autoencoder)
    autoencoder.save_pretrained(tmp_path)
    loaded = type(autoencoder).from_pretrained(tmp_path)
    for again in (copy.deepcopy(autoencoder), pickle.loads(pickle.dumps(autoencoder)), loaded):
        assert torch.equal(decode(again), ids)


def test_generation_is_the_same_with_and_without_the_screen(monkeypatch, screen_always):
    model = tiny_model()
    monkeypatch.setenv(SWITCH, "torch")
    plain = write(model)
    assert screen_of(model.autoencoder) is None
    monkeypatch.delenv(SWITCH)
    assert torch.equal(write(model), plain) and screen_of(model.autoencoder) is not None


def real_decoder_and_states(num_states):
    """Returns the demo's decoder, and its states for this repository's documents with posterior noise."""
    model = CALMForCausalLM.from_pretrained(ROOT).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "tokenizer.json"))
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = torch.tensor(tokenizer(text[: 5 * num_states])["input_ids"])
    num_ids = min(len(ids), num_states) // model.config.patch_size * model.config.patch_size
    mean, log_std = model.autoencoder.encode(ids[None, :num_ids])
    noises = values(-(-num_states // num_ids), *mean.shape[1:])
    decoder = model.autoencoder.decoder
    states = [decoder.final_states(decoder.expand(mean + log_std.exp() * noise)) for noise in noises]
    return decoder, torch.cat(states).flatten(0, -2)[:num_states]


def random_states(weight_Vd, num_states):
    one, other = weight_Vd[values(2, num_states, seed=1).mul(1e4).long() % len(weight_Vd)]
    noise, kind = values(*one.shape, seed=2) * weight_Vd.std(), torch.arange(num_states)[:, None] % 3
    return torch.where(kind == 0, noise, torch.where(kind == 1, one + 0.3 * noise, one + other))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_states", [10_000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_equal_tokens_on_many_states(dtype, num_states):
    """With duplicate rows, rows of zeros, and tokens that are forbidden at some positions.

    Matmuls of different shapes add in a different order, so a few tokens may differ, whose logits are equal up to the
    error of adding d products in float32 twice, and rounding to the weights' type.
    """
    decoder, real_Nd = real_decoder_and_states(num_states // 2)
    states_Nd = torch.cat([real_Nd, random_states(decoder.lm_head.weight, num_states // 2)]).to(dtype)
    weight_Vd = decoder.to(dtype).lm_head.weight
    weight_Vd[500:600], weight_Vd[600:650] = weight_Vd[200:300], 0
    forbidden_KV, screen = values(4, len(weight_Vd), seed=3) < -2.33, VocabularyScreen(weight_Vd)
    for i, states_Md in enumerate(states_Nd.split(2_000)):
        positions_M, forbidden = torch.arange(len(states_Md)) % 4, forbidden_KV if i % 2 else None
        ids_M = screen.argmax(weight_Vd, states_Md, positions_M, forbidden)
        plain_M = kernels_calm._tiled_argmax(weight_Vd, states_Md, positions_M, forbidden)
        differs_M = ids_M != plain_M
        assert differs_M.double().mean() <= (0.001 if dtype == torch.float32 else 0.01)
        states, rows = states_Md[differs_M].double(), (weight_Vd[ids[differs_M]].double() for ids in (ids_M, plain_M))
        one, other = (states * row for row in rows)
        rounding = torch.finfo(dtype).eps * one.sum(-1).abs()
        adding = states.shape[-1] * torch.finfo(torch.float32).eps * (one.abs() + other.abs()).sum(-1)
        assert ((one.sum(-1) - other.sum(-1)).abs() <= rounding + adding).all()
