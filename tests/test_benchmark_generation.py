"""The generation benchmark: its workloads are what they claim, its figures agree with counts by hand."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from commands import refusal
from tiny import BOS, VOCAB_SIZE, tiny_config, tiny_model
from torch import nn
from transformers import LlamaConfig

from calm_transformers.benchmarks import generation, meters, runs, workloads
from calm_transformers.benchmarks.meters import Meter, Parts, PeakMemory, weight_bytes, wrapped
from calm_transformers.benchmarks.runs import Subject, compare, timed_run
from calm_transformers.benchmarks.workloads import Replay, random_model
from calm_transformers.command_line import InputError
from calm_transformers.model import generation_calm_candidates
from calm_transformers.model.generation_calm_samplers import PatchSampling
from calm_transformers.model.modeling_calm import CALMForCausalLM
from calm_transformers.training import recipe

CPU = torch.device("cpu")
K = 4
CALM_RECIPE = """
kind: calm
model: {vocab_size: 96, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4,
        num_key_value_heads: 4, latent_size: 16, noise_size: 8, num_mlp_layers: 2}
"""
AUTOENCODER_RECIPE = """
kind: autoencoder
model: {vocab_size: 96, hidden_size: 32, intermediate_size: 64, latent_size: 16}
"""
LLAMA_RECIPE = """
kind: ar
model: {vocab_size: 96, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4,
        num_key_value_heads: 4}
"""


def repetitive_model():
    """A CALM whose candidates often repeat: its latents hardly depend on the noise."""
    model = tiny_model()
    with torch.no_grad():
        model.head.out_proj.weight.mul_(0.1)
        model.head.out_proj.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A folder with a repetitive model, and recipes calm-tiny and transformer-tiny in place of the real ones."""
    texts = {"calm-tiny": CALM_RECIPE, "autoencoder": AUTOENCODER_RECIPE, "transformer-tiny": LLAMA_RECIPE}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(recipe, "RECIPE_FOLDER", tmp_path)
    monkeypatch.setitem(meters.MATMUL_SIZE, "cpu", 32)
    monkeypatch.setattr(workloads, "RECORDED_STEPS", 8)
    model = repetitive_model()
    model.generation_config.eos_token_id = list(range(VOCAB_SIZE))  # every token would end the text
    model.save_pretrained(tmp_path / "demo")
    return tmp_path / "demo"


def arguments(demo, *more):
    lengths = ("--prompt_length", "6", "--output_length", "10", "--num_candidates", "8", "--repetitions", "1")
    common = ("--baseline", "transformer-tiny", "--demo", str(demo), "--device", "cpu", "--dtype", "float32")
    return [*common, *lengths, *more]


def run_main(demo, *more):
    generation.main(arguments(demo, "--json", str(demo / "rows.json"), *more))
    return json.loads((demo / "rows.json").read_text())


# The whole command


def test_rows_of_both_workloads(demo, capsys):
    shapes = ("--shape", "calm-tiny", "demo", "--batch_size", "1", "2", "--temperature", "0.5")
    shapes += ("--sampling_method", "batch")
    rows = run_main(demo, *shapes, "--plot", str(demo / "plot.png"))

    keys = [(row["shape"], row["workload"], row["batch_size"]) for row in rows]
    assert keys == [(s, w, b) for s in ("calm-tiny", "demo") for w in ("worst", "real") for b in (1, 2)]
    for row in rows:
        assert (row["baseline"], row["device"], row["dtype"]) == ("transformer-tiny", "cpu", "float32")
        assert (row["temperature"], row["num_candidates"], row["draws"]) == (0.5, 8, 8)
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["baseline_tokens_per_second"])
        assert row["step_ms"] == pytest.approx(sum(row[f"{part}_ms"] for part in runs.PARTS))
        assert all(row[f"{part}_ms"] > 0 for part in runs.PARTS)
        seconds = 10 * row["batch_size"] / row["tokens_per_second"]  # 10 tokens are 3 steps
        assert row["prompt_ms"] + 3 * row["step_ms"] - row["backbone_ms"] == pytest.approx(1000 * seconds)
        assert (row["distinct_share"] > 0.99) == (row["workload"] == "worst")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:10]] == [[f"| {shape}", workload] for shape, workload, _ in keys]
    assert len({line.count("|") for line in lines[:10]}) == 1
    assert (demo / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_lazy_decoding_can_be_switched_off(demo):
    options = ("--shape", "calm-tiny", "--temperature", "0.5", "--batch_size", "1", "--workload", "worst")
    lazy, plain = (run_main(demo, *options, *more)[0] for more in ([], ["--plain"]))
    assert (lazy["lazy_decoding"], plain["lazy_decoding"]) == (None, False)


def test_adaptive_draws_all_in_the_worst_case_and_fewer_in_the_real_one(demo):
    options = ("--sampling_method", "adaptive", "--temperature", "0.5", "1", "--batch_size", "8")
    draws = {
        (row["workload"], row["temperature"]): row["draws"] for row in run_main(demo, "--shape", "calm-tiny", *options)
    }
    assert draws["worst", 0.5] == 8 > draws["real", 0.5]
    assert draws["worst", 1] == draws["real", 1] == 1


def test_exact_sampling_is_recorded_far_enough(demo):
    (row,) = run_main(
        demo,
        *("--shape", "calm-tiny", "--sampling_method", "exact", "--temperature", "0.2"),
        *("--batch_size", "4", "--workload", "real"),
    )
    assert 8 < row["draws"] <= 80


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--shape", "./no-such"], "no-such is neither a recipe nor a model"),
        (["--shape", "transformer-tiny"], "--shape transformer-tiny is no CALM"),
        (["--shape", "autoencoder"], "does not say the shape of a whole language model"),
        (["--baseline", "calm-tiny"], "--baseline calm-tiny is a CALM"),
        (["--output_length", "7"], "--output_length of 8"),
        (["--prompt_length", "3"], "--prompt_length of at least 4"),
        (["--temperature", "2.5"], "temperature=2.5"),
        (["--temperature", "0.1"], "num_candidates=8 is too few"),
        (["--batch_size", "0"], "--batch_size: 0: must be a whole number of at least 1"),
        (["--json", "nowhere/rows.json"], "nowhere/rows.json: its folder does not exist"),
        (["--demo", "nowhere"], "nowhere holds no demo model"),
    ],
)
def test_bad_options_are_refused_before_any_work(demo, monkeypatch, capsys, options, complaint):
    monkeypatch.setattr(generation, "random_model", None)  # the first work
    assert complaint in refusal(capsys, generation.main, *arguments(demo, "--shape", "calm-tiny", *options))


def test_published_shapes_come_from_the_recipes():
    config = workloads.shape_config("calm-m")
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size, config.vocab_size) == (
        1024,
        16,
        4,
        128257,
    )
    assert config.autoencoder_config.hidden_size == 512
    with torch.device("meta"):
        count = sum(p.numel() for p in CALMForCausalLM(config).parameters())
    assert count == pytest.approx(371e6 + 75.8e6, rel=0.002)


# Worst case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_type", ["energy", "flow", "diffusion"])
def test_random_models_are_whole_and_never_repeat(head_type, dtype):
    autoencoder = {"hidden_size": 96, "latent_size": 64}  # with room for many patches
    model = random_model(tiny_config(head_type, latent_size=64, autoencoder_config=autoencoder), CPU, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.any() for name, p in model.named_parameters() if p.dim() > 1)
    assert model.autoencoder.decoder.lm_head.weight is model.autoencoder.encoder.embed_tokens.weight
    share = workloads.distinct_share(workloads.draw_candidates(model, torch.arange(8).view(1, 8), 50))
    workloads.check_worst_case(share)


@pytest.mark.parametrize("kind", ["calm", "llama"])
def test_random_models_compute_what_ordinary_ones_do(kind):
    """Nothing but parameters is left undefined by building without memory: rotary tables, for one."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    config = tiny_config() if kind == "calm" else LlamaConfig(**sizes)
    model = random_model(config, CPU, torch.float32)
    ordinary = type(model)(config).eval()
    ordinary.load_state_dict(model.state_dict())
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        first, second = (m.base_model(input_ids=ids).last_hidden_state for m in (model, ordinary))
    assert torch.equal(first, second) and first.std() > 0.1


def test_zero_initialised_heads_are_no_worst_case():
    model = CALMForCausalLM(tiny_config()).eval()  # as before training: every candidate is the same
    share = workloads.distinct_share(workloads.draw_candidates(model, torch.arange(8).view(1, 8), 20))
    assert share == 1 / 20
    with pytest.raises(InputError, match="only 5.0% of the random model's candidates are distinct"):
        workloads.check_worst_case(share)


def test_distinct_share_by_hand():
    patches_CNK = torch.tensor([[[1, 2], [1, 2], [2, 1], [1, 2]], [[0, 0], [0, 1], [0, 2], [0, 3]]])
    assert workloads.distinct_share(patches_CNK) == (2 + 4) / 8


# Recorded candidates


def test_a_recording_is_that_of_a_number_of_texts(monkeypatch):
    monkeypatch.setattr(workloads, "RECORDED_ROWS", 3)
    monkeypatch.setattr(workloads, "RECORDED_STEPS", 2)
    model = workloads._never_stopping(repetitive_model())
    patches_CNK = workloads.record(model, temperature=0.5, num_draws=10)
    assert patches_CNK.shape == (2 * 3, 10, K)
    assert workloads.distinct_share(patches_CNK) < 0.9


def labelled_recording(num_contexts, num_draws):
    """Draw j of context c is the patch (c, j, 0, 0)."""
    recorded_CNK = torch.zeros(num_contexts, num_draws, K, dtype=torch.long)
    recorded_CNK[..., 0] = torch.arange(num_contexts)[:, None]
    recorded_CNK[..., 1] = torch.arange(num_draws)
    return recorded_CNK


@pytest.mark.parametrize("lazy", [True, False])
def test_a_replay_gives_each_row_one_context_and_its_draws_in_order(lazy):
    """The rows that draw on are fewer in each block: here row 1 is done after the first."""
    model, replay = tiny_model(), Replay(labelled_recording(50, 16))
    sampling, all_rows = PatchSampling(lazy_decoding=lazy), torch.arange(3)

    def draw(rows, num_draws):
        return torch.randn(num_draws, len(rows), 16)

    with replay.on(model):
        pool = model.new_pool(draw, all_rows, sampling)
        for rows, num_draws in (([0, 1, 2], 4), ([0, 2], 8), ([2], 16)):
            pool.extend(torch.tensor(rows), num_draws - pool.num_drawn)
            classes = pool.classes(torch.tensor(rows))
            assert classes.tolist() == [list(range(num_draws))] * len(rows), "every recorded draw is another patch"
        patches = pool.tokens(all_rows, torch.tensor([2, 2, 2]))
        assert patches[:, 1].tolist() == [2, 2, 2] and patches[:, 0].unique().numel() == 3
        later = model.new_pool(draw, all_rows, sampling)
        later.extend(all_rows, 1)
        later = later.tokens(all_rows, torch.zeros(3, dtype=torch.long))
        assert (later[:, 0] != patches[:, 0]).any(), "the next step has other contexts"
    assert "new_pool" not in vars(model)


@pytest.mark.parametrize("method", ["batch", "adaptive"])
def test_a_replay_leaves_the_work_as_it_was(method):
    """The decoder sees as many rows as the sampler asks for, and the sampler sees only the recording."""
    model = tiny_model()
    replay, work = Replay(labelled_recording(5, 16)), []  # every recorded draw is distinct: nothing stops early
    decode = model.autoencoder.decoder.forward
    with wrapped(model.autoencoder.decoder, "forward", lambda _: lambda z: work.append(len(z)) or decode(z)):
        with replay.on(model):
            patches_RK = model.next_patches(
                torch.randn(2, 48), PatchSampling(True, 0.5, 16, method, lazy_decoding=False)
            )
    assert sum(work) == 2 * 16
    assert (patches_RK[:, 2:] == 0).all()


def test_a_replay_says_which_tokens_are_read(monkeypatch):
    """Recorded draws (c, j, 0, 0): tokens 3 and 2 are all the same, so that three tokens of each must be read."""
    monkeypatch.setattr(generation_calm_candidates, "FEW_TOKENS", 0)
    model, work = tiny_model(), []
    read = model.autoencoder.read_tokens
    with wrapped(model.autoencoder, "read_tokens", lambda _: lambda s, *args: work.append(len(s)) or read(s, *args)):
        with Replay(labelled_recording(5, 16)).on(model):
            patches_RK = model.next_patches(torch.randn(2, 48), PatchSampling(True, 0.5, 16, "batch"))
    assert sum(work) == 2 * (3 * 16 + 1)
    assert (patches_RK[:, 2:] == 0).all()


def test_a_replay_refuses_other_patches_and_too_many_draws():
    model = tiny_model(patch_size=2)
    with pytest.raises(InputError, match="patches have 4 tokens, the model's 2"):
        with Replay(labelled_recording(2, 8)).on(model):
            pass
    model = tiny_model()
    with pytest.raises(InputError, match="16 draws of a row, of 8 recorded"):
        with Replay(labelled_recording(2, 8)).on(model):
            model.next_patches(torch.randn(1, 48), PatchSampling(True, 0.5, 16))


def test_texts_that_end_early_are_no_measurement():
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(VOCAB_SIZE))
    with pytest.raises(InputError, match="1 tokens were generated instead of 8"):
        workloads.write(model, torch.full((1, 4), BOS), 8)


# Meters


def test_parts_are_read_around_calls_and_taken_off_again():
    values = iter([1, 4, 10, 15, 20, 100])
    owner = SimpleNamespace(work=lambda x: 2 * x, more=lambda: None)
    before = dict(vars(owner))
    parts = Parts(Meter(lambda: next(values), lambda a, b: b - a), {"work": (owner, "work"), "more": (owner, "more")})
    with parts.measured():
        assert (owner.work(3), owner.work(x=4)) == (6, 8)
        owner.more()
    assert vars(owner) == before
    assert (parts.calls("work"), parts.calls("more"), parts.calls("nothing")) == ([3, 5], [80], [])


def test_wrappers_nest():
    linear = nn.Linear(2, 2)
    with (
        wrapped(linear, "forward", lambda f: lambda x: f(x) + 1),
        wrapped(linear, "forward", lambda f: lambda x: -f(x)),
    ):
        with wrapped(linear, "extra_repr", lambda f: lambda: "wrapped"):
            assert "wrapped" in repr(linear)
        assert torch.equal(linear(torch.ones(2)), -(linear.weight.sum(1) + linear.bias + 1))
    assert "forward" not in vars(linear) and "wrapped" not in repr(linear)


def test_time_lands_on_the_part_that_took_it():
    model = workloads._never_stopping(tiny_model())

    def slow(method):
        def call(*args, **kwargs):
            time.sleep(0.05)
            return method(*args, **kwargs)

        return call

    subject = Subject(
        model, torch.full((1, 4), BOS), {"temperature": 0.5, "num_candidates": 4, "sampling_method": "batch"}
    )
    methods = subject.methods()
    plain = next((owner, name) for owner, name in methods["decode"] if name == "decode_tokens")
    subject.settings["lazy_decoding"] = False
    for part, method in {"backbone": methods["backbone"], "head": methods["head"], "decode": plain}.items():
        with wrapped(*method, slow):
            run = timed_run(subject, 12, seed=0)
        assert max(run.step_ms, key=run.step_ms.get) == part
        assert run.step_ms[part] > 50
        assert (run.prompt_seconds > 0.05) == (part == "backbone")
        assert run.draws == 3 * 4 and run.seconds > 0.15


def test_peak_memory_counts_what_the_block_needs():
    with PeakMemory(CPU) as memory:
        torch.ones(2**24)  # 64 MiB, freed again
    if memory.extra is None:
        pytest.skip("the process's memory can't be read here")
    assert memory.extra == pytest.approx(2**26, rel=0.1)
    with PeakMemory(CPU) as memory:
        torch.ones(2**18)
    assert memory.extra < 2**24


def test_runs_take_turns_and_medians_are_reported(monkeypatch):
    order = []

    def fake_run(subject, length, seed):
        order.append((subject.prompts_BL.item(), seed))
        seconds = {0: (1, 9, 2), 1: (4, 5, 6)}[subject.prompts_BL.item()][seed]
        return runs.Run(seconds, 0.5, dict.fromkeys(runs.PARTS, seconds), 12 * seconds, extra_bytes=seconds)

    monkeypatch.setattr(runs, "timed_run", fake_run)
    monkeypatch.setattr(Subject, "write", lambda *_: 0)  # which warms up
    calm, baseline = (Subject(tiny_model(), torch.tensor([[number]]), {}) for number in (0, 1))
    figures = compare(calm, baseline, length=12, repetitions=3)
    assert order == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert (figures["tokens_per_second"], figures["baseline_tokens_per_second"]) == (12 / 2, 12 / 5)
    assert figures["tokens_per_second_range"] == [12 / 9, 12]
    assert (figures["ratio"], figures["decode_ms"], figures["step_ms"]) == (2.5, 2, 10)
    assert (figures["draws"], figures["prompt_ms"]) == (12 * 2 / 3, 500)
    assert figures["peak_memory_bytes"] == weight_bytes(calm.model) + 9  # of the worst run
