"""On a GPU: outputs equal those on a CPU, and the commands run there (`make test-gpu`)."""

import copy

import fresh_process
import pytest
import torch
from commands import main_of
from evaluation_folder import EVALUATIONS, evaluations
from model_copies import PROMPT, ROOT, run_snippet
from tiny import BOS, HEAD_TYPES, VOCAB_SIZE, tiny_model
from training_helpers import log_of, train

from calm_transformers.benchmarks import golden
from calm_transformers.evaluation.models import brier_counts
from calm_transformers.loading import load_causal_lm
from calm_transformers.model.modeling_calm import CALMForCausalLM

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # float32 on both; sums run in another order
IDS = torch.tensor([[BOS, *range(10, 33)], [BOS, *range(40, 63)]])
SAMPLED = {"do_sample": True, "temperature": 0.5, "num_candidates": 20, "max_new_tokens": 12, "eos_token_id": None}


@pytest.fixture(scope="module", params=HEAD_TYPES)
def models(request):
    model = tiny_model(request.param)
    return model, copy.deepcopy(model).to(DEVICE)


def generate(model, ids=IDS, seed=0, **settings):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return model.generate(ids.to(DEVICE), generator=generator, **SAMPLED | settings).cpu()


@pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the root holds no trained model")
def test_the_model_cards_snippet_runs_on_the_gpu(tmp_path):
    """In a fresh process, in bfloat16, with the repository's own code: `device_map="auto"` finds the GPU."""
    result = fresh_process.call(run_snippet, tmp_path, folder=str(ROOT)).result
    assert (result["device"], result["dtype"]) == (DEVICE, "torch.bfloat16")
    assert result["text"].startswith(PROMPT) and len(result["text"]) > len(PROMPT)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("head_type", golden.HEAD_TYPES)
def test_golden_outputs_are_reproduced(head_type, dtype, tolerance):
    errors = golden.golden_errors(head_type, torch.device(DEVICE), dtype)
    assert len(errors) == 3 and max(errors.values()) <= tolerance


@torch.no_grad()
def test_latents_of_the_same_noise_are_those_of_the_cpu(models):
    on_cpu, on_gpu = models
    context_RD = torch.randn(3, on_cpu.config.hidden_size, generator=torch.Generator().manual_seed(0))
    noise = on_cpu.head.predrawn_noise(5, 1, context_RD, torch.Generator().manual_seed(1))
    expected = on_cpu.head.sample(context_RD, num_samples=5, **noise)
    noise = {name: value.to(DEVICE) for name, value in noise.items()}
    found = on_gpu.head.sample(context_RD.to(DEVICE), num_samples=5, **noise)
    torch.testing.assert_close(found.cpu(), expected, **CLOSE)


def test_generation_keeps_the_prompt_and_is_reproducible(models):
    model = models[1]
    ids = generate(model)
    assert torch.equal(ids[:, : IDS.shape[1]], IDS) and ids.shape[1] == IDS.shape[1] + 12
    assert torch.equal(generate(model), ids) and not torch.equal(generate(model, seed=1), ids)


@pytest.mark.parametrize("settings", [{}, {"sampling_method": "batch"}, {"temperature": 0.4}, {"do_sample": False}])
def test_lazy_and_eager_decoding_agree(models, settings):
    assert torch.equal(*(generate(models[1], lazy_decoding=lazy, **settings) for lazy in (True, False)))


@pytest.mark.parametrize("part", ["model", "head", "autoencoder"])
def test_a_part_may_be_offloaded_to_the_cpu(models, part, tmp_path):
    models[0].save_pretrained(tmp_path)
    places = {"model": DEVICE, "head": DEVICE, "autoencoder": DEVICE, part: "cpu"}
    placed = CALMForCausalLM.from_pretrained(tmp_path, device_map=places)
    torch.manual_seed(0)
    ids = placed.generate(IDS.to(DEVICE), **SAMPLED)
    assert torch.equal(ids.cpu()[:, : IDS.shape[1]], IDS) and ids.shape[1] == IDS.shape[1] + 12


@pytest.mark.parametrize("head_type, bf16", [*((head, "true") for head in HEAD_TYPES), ("energy", "false")])
def test_training_steps_are_finite(workshop, tmp_path, head_type, bf16):
    """Training uses the GPU by default."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    fields = {**workshop, "head_type": head_type, "auxiliary_weight": 0.5, "bf16": bf16}
    assert train("calm", **fields, output_dir=str(tmp_path)) == 0
    assert torch.cuda.max_memory_allocated() > before
    steps = [entry for entry in log_of(tmp_path) if "loss" in entry]
    figures = torch.tensor([[entry["loss"], entry["auxiliary_loss"], entry["grad_norm"]] for entry in steps])
    assert len(figures) == 4 and figures.isfinite().all() and (figures[:, 2] > 0).all()


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_runs_on_the_gpu(folder, name):
    torch.cuda.reset_peak_memory_stats()
    assert main_of(f"calm_transformers.evaluation.{name}")(evaluations(folder)[name]) == 0
    assert torch.cuda.max_memory_allocated() > 0


def test_brier_1_of_a_llama_is_the_cpus(folder):
    """Exact probabilities: no sampling is involved."""
    blocks = torch.randint(VOCAB_SIZE, (6, 12), generator=torch.Generator().manual_seed(0))
    scores = [brier_counts(load_causal_lm(str(folder / "ar"), device=d), blocks).score() for d in ("cpu", DEVICE)]
    assert scores[1].brier[0] == pytest.approx(scores[0].brier[0], rel=1e-4)
