"""Mixed generations, and trainings that save and resume: memory stays flat, and a seed's text the same.

SOAK_SECONDS (60) sets how much, as in test_serve_soak.py: `make soak` runs all three with 3600, which are 2,000
generations, and 50 rounds of 100 training steps.
"""

import functools
import gc
import random
import threading

import pytest
import torch
from model_copies import ROOT
from safetensors.torch import load_file
from test_serve_soak import SECONDS
from tiny import HEAD_TYPES, METHODS, PAD, seeded, tiny_model, tiny_tokenizer
from training_helpers import train

from calm_transformers import CALMForCausalLM
from calm_transformers.benchmarks.meters import PeakMemory

NUM_GENERATIONS, NUM_ROUNDS = (max(int(number * SECONDS / 3600), 20) for number in (2000, 50))
BOUND = 1.02 if SECONDS >= 3600 else 1.1  # a short run's first tenth is over before all code has run
SETTINGS = (
    {},
    *({name: True} for name in ("lazy_decoding", "output_scores", "return_dict_in_generate")),
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"min_new_tokens": 9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    {"stop_strings": ["ab", "."], "bad_words_ids": [[5], [6, 7]]},
    {"num_return_sequences": 3, "top_k": 20, "top_p": 0.9},
    {"temperature": 9.0},
)


def resident_megabytes() -> float:
    """Returns the process's memory without what the allocator holds of freed one."""
    gc.collect()
    with PeakMemory(torch.device("cpu")) as meter:
        return meter.bytes_before / 2**20


def check_flat(megabytes: list[float]) -> None:
    """Raises AssertionError if the memory after the first tenth of the work exceeds that at its end by `BOUND`."""
    first, *later = megabytes[len(megabytes) // 10 :]
    print(f"{first:.1f} MB after a tenth, then {min(later):.1f} to {max(later):.1f}", flush=True)
    assert max(later) <= BOUND * first, megabytes


@pytest.mark.slow
def test_generations_leave_nothing_over(monkeypatch):
    monkeypatch.setenv("CALM_MATMUL_BACKEND", "torch")  # oneDNN keeps memory for each of up to 1,024 shapes
    choose, tokenizer, megabytes = random.Random(0), tiny_tokenizer(), []
    models = [tiny_model(head_type).eval() for head_type in HEAD_TYPES] + [CALMForCausalLM.from_pretrained(ROOT)]

    def generate(model, prompt, **settings):
        return model.generate(prompt, tokenizer=tokenizer, **{"do_sample": True, "pad_token_id": PAD} | settings)

    known = functools.partial(generate, prompt=torch.tensor([[1, 5, 6, 7, 8]]), temperature=0.5, max_new_tokens=30)
    texts = [known(model, generator=seeded(3)) for model in models]
    num_threads, num_refused = threading.active_count(), 0
    for _ in range(NUM_GENERATIONS):
        prompt = torch.randint(3, PAD, (choose.randrange(1, 5), choose.randrange(1, 40)))
        settings = {**choose.choice(list(METHODS.values())), **choose.choice(SETTINGS)}
        try:
            generate(choose.choice(models), prompt, max_new_tokens=choose.randrange(1, 60), **settings)
        except ValueError:
            num_refused += 1
        megabytes.append(resident_megabytes())
    print(f"{NUM_GENERATIONS} generations, {num_refused} of them refused")
    check_flat(megabytes)
    assert 0 < num_refused < NUM_GENERATIONS / 2 and threading.active_count() == num_threads
    for model, text in zip(models, texts, strict=True):
        assert torch.equal(known(model, generator=seeded(3)), text)


@pytest.mark.slow
def test_saving_and_resuming_leaves_nothing_over(workshop, tmp_path):
    """Each round resumes from the checkpoint of the last; with all of them the weights are those of one long run."""
    num_steps, megabytes = max(round(100 * SECONDS / 3600), 4), []
    fields = {**workshop, "eval_strategy": "no", "lr_scheduler_type": "constant", "seed": 3, "save_total_limit": 2}

    def run(folder, num_rounds):
        changed = {"max_steps": num_steps * num_rounds, "save_steps": num_steps, "output_dir": str(tmp_path / folder)}
        assert train("calm", **fields, **changed) == 0

    for number in range(NUM_ROUNDS):
        run("rounds", number + 1)
        megabytes.append(resident_megabytes())
        assert len(list((tmp_path / "rounds").glob("checkpoint-*"))) <= 2
    print(f"{NUM_ROUNDS} rounds of {num_steps} steps")
    check_flat(megabytes)
    run("whole", NUM_ROUNDS)
    rounds, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("rounds", "whole"))
    assert rounds.keys() == whole.keys() and all(torch.equal(rounds[name], whole[name]) for name in whole)
