"""The generation benchmark: its workloads have the claimed properties, its results agree with counts by hand."""

import json
from unittest import mock

import pytest
import torch
from commands import refusal
from tiny import BOS, VOCAB_SIZE, tiny_config, tiny_model

from calm_transformers.benchmarks import generation, runs, workloads
from calm_transformers.benchmarks.meters import Meter, PeakMemory
from calm_transformers.benchmarks.runs import Workload, timed_run
from calm_transformers.benchmarks.workloads import Replay, random_model
from calm_transformers.command_line import InputError
from calm_transformers.model import generation_calm_candidates, generation_calm_samplers
from calm_transformers.model.generation_calm_samplers import PatchSampling

CPU = torch.device("cpu")
LENGTHS = "--prompt_length 6 --output_length 10 --num_candidates 8 --repetitions 1".split()


def arguments(*more):
    return ["--baseline", "transformer-tiny", "--device", "cpu", "--dtype", "float32", *LENGTHS, *more]


def run_main(demo, options):
    generation.main([str(word) for word in arguments("--json", demo / "rows.json", *options.split())])
    return json.loads((demo / "rows.json").read_text())


def test_rows_of_both_workloads(demo, capsys):
    options = "--shape calm-tiny demo --batch_size 1 2 --temperature 0.5 --sampling_method batch"
    rows = run_main(demo, f"{options} --plot {demo / 'plot.png'}")

    keys = [(row["shape"], row["workload"], row["batch_size"]) for row in rows]
    assert keys == [(s, w, b) for s in ("calm-tiny", "demo") for w in ("worst", "real") for b in (1, 2)]
    for row in rows:
        assert (row["baseline"], row["device"], row["dtype"]) == ("transformer-tiny", "cpu", "float32")
        assert (row["temperature"], row["num_candidates"], row["draws"]) == (0.5, 8, 8)
        assert row["lazy_decoding"] is None
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


def test_draws_by_method_and_workload(demo, monkeypatch):
    """Adaptive: all N in the worst case, fewer in the real one, one at T = 1, or distilled. Exact: more than N."""
    adaptive = "--shape calm-tiny --sampling_method adaptive --temperature 0.5 1 --batch_size 8"
    monkeypatch.setattr(generation_calm_samplers, "FIRST_BLOCK_SIZE", 2)
    draws = {(row["workload"], row["temperature"]): row["draws"] for row in run_main(demo, adaptive)}
    assert draws["worst", 0.5] == 8 > draws["real", 0.5] and draws["worst", 1] == draws["real", 1] == 1
    distilled = "--shape calm-tiny --sampling_method distilled --temperature 0.5 --batch_size 1 --workload worst"
    assert run_main(demo, distilled)[0]["draws"] == 1
    exact = "--shape calm-tiny --sampling_method exact --temperature 0.2 --batch_size 4 --workload real --plain"
    (row,) = run_main(demo, exact)
    assert 8 < row["draws"] <= 80 and row["lazy_decoding"] is False


@pytest.mark.parametrize(
    "options, message",
    [
        ("--shape ./no-such", "no-such is neither a recipe nor a model"),
        ("--shape transformer-tiny", "--shape transformer-tiny is not a CALM"),
        ("--shape autoencoder", "does not define a complete language model"),
        ("--baseline calm-tiny", "--baseline calm-tiny is a CALM"),
        ("--output_length 7", "--output_length of 8"),
        ("--prompt_length 3", "--prompt_length of at least 4"),
        ("--temperature 2.5", "temperature=2.5"),
        ("--temperature 0.1", "num_candidates=8 is too few"),
        ("--json nowhere/rows.json", "nowhere/rows.json: its folder does not exist"),
        ("--workload real --num_candidates 81", "don't fit calm-tiny: 80 patches of 4 tokens, ids up to 4"),
        ("--device cuda", "--device cuda: PyTorch finds no GPU"),
    ],
)
def test_invalid_options_raise_before_any_work(demo, monkeypatch, capsys, options, message):
    monkeypatch.setattr(generation, "random_model", None)  # the first work
    error = refusal(capsys, generation.main, *arguments("--shape", "calm-tiny", *options.split()))
    assert message in error


@pytest.mark.parametrize(
    "head_type, dtype", [("energy", torch.bfloat16), ("flow", torch.float32), ("diffusion", torch.float32)]
)
def test_random_models_are_complete_and_candidates_never_repeat(head_type, dtype):
    autoencoder = {"hidden_size": 96, "latent_size": 64}  # so that many patches are possible
    model = random_model(tiny_config(head_type, latent_size=64, autoencoder_config=autoencoder), CPU, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.any() for name, p in model.named_parameters() if p.dim() > 1)
    assert model.autoencoder.decoder.lm_head.weight is model.autoencoder.encoder.embed_tokens.weight
    candidates = workloads.sample_candidates(model, torch.arange(8).view(1, 8), 50)
    assert workloads.distinct_fraction(candidates) >= 0.99


def test_the_distinct_fraction_is_a_mean_over_contexts():
    patches_CNK = torch.tensor([[[1, 2], [1, 2], [2, 1], [1, 2]], [[0, 0], [0, 1], [0, 2], [0, 3]]])
    assert workloads.distinct_fraction(patches_CNK) == (2 + 4) / 8


@pytest.mark.parametrize("method, lazy", [("batch", False), ("adaptive", False), ("adaptive", True)])
def test_a_replay_returns_recorded_patches_with_unchanged_work(monkeypatch, method, lazy):
    """All recorded candidates are distinct, so nothing stops early. Their tokens 3 and 2 are equal, so lazy decoding
    reads three tokens of each candidate, and the fourth of one."""
    monkeypatch.setattr(generation_calm_candidates, "FEW_TOKENS", 0)
    model, work = tiny_model(), []
    decoding = (model.autoencoder.decoder, "most_probable_tokens") if lazy else (model.autoencoder.decoder, "forward")
    sampling = PatchSampling(True, 0.5, 16, method, lazy_decoding=lazy)
    call, grid = getattr(*decoding), torch.cartesian_prod(torch.arange(50), torch.arange(16))
    recording = torch.nn.functional.pad(grid, (0, 2)).view(50, 16, 4)  # candidate j of context c: (c, j, 0, 0)
    with mock.patch.object(*decoding, lambda first, *more: work.append(len(first)) or call(first, *more)):
        with Replay(recording).on(model):
            (first, *_), (later, *_) = (model.sample_patches(torch.randn(3, 48), sampling).patches.T for _ in range(2))
            patches_3K = model.sample_patches(torch.randn(3, 48), sampling).patches
    assert sum(work) == 3 * 3 * (3 * 16 + 1 if lazy else 16)
    assert (patches_3K[:, 2:] == 0).all() and (patches_3K[:, 1] < 16).all()
    assert first.unique().numel() == 3, "each row has its own context"
    assert (later != first).any(), "the next step has other contexts"
    assert "new_candidates" not in vars(model)


def test_early_stopping_raises():
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(VOCAB_SIZE))
    with pytest.raises(InputError, match="1 tokens were generated instead of 8"):
        workloads.generate_tokens(model, torch.full((1, 4), BOS), 8)


@pytest.mark.parametrize("part", ["backbone", "head", "decode"])
def test_time_is_attributed_to_the_right_part(monkeypatch, part):
    """With a clock that only advances during calls of one part: the prefill, and three steps."""
    now = [0.0]
    monkeypatch.setattr(Meter, "clock", lambda device: Meter(lambda: now[0], lambda before, after: after - before))
    model = workloads._disable_stopping(tiny_model())
    settings = {"temperature": 0.5, "num_candidates": 4, "sampling_method": "batch", "lazy_decoding": False}
    workload = Workload(model, torch.full((1, 4), BOS), settings)
    methods = workload.methods()[part]
    method = methods[0] if isinstance(methods, list) else methods
    call = getattr(*method)
    with mock.patch.object(*method, lambda *args, **kwargs: now.__setitem__(0, now[0] + 1) or call(*args, **kwargs)):
        run = timed_run(workload, 12, seed=0)
    assert run.step_ms == {name: 1000.0 * (name == part) for name in runs.PARTS}
    assert (run.prompt_seconds, run.seconds, run.num_candidates) == (part == "backbone", 3, 3 * 4)
    assert not {"sample", "sample_patches"} & (vars(model).keys() | vars(model.head).keys()), "all patches are removed"


def test_peak_memory_of_a_block():
    with PeakMemory(CPU) as memory:
        torch.ones(2**24)  # 64 MiB, freed immediately
    if memory.extra is None:
        pytest.skip("the process's memory can't be read here")
    assert memory.extra == pytest.approx(2**26, rel=0.1)
    with PeakMemory(CPU) as memory:
        torch.ones(2**18)
    assert memory.extra < 2**24
