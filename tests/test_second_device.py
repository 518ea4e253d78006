"""On a second device every part computes what it does on the CPU, and the host waits as seldom as promised."""

import copy

import peft
import pytest
import torch
from evaluation_folder import tiny_llama
from second_device import NAME, on_second_device, waits
from tiny import BOS, EOS, HEAD_TYPES, METHODS, PAD, exact_model, seeded, tiny_tokenizer

from calm_transformers.evaluation.autoencoder_report import noise_accuracy
from calm_transformers.evaluation.invented_words import continuations, log_likelihood
from calm_transformers.evaluation.models import brier_counts
from calm_transformers.evaluation.text_scores import score_texts
from calm_transformers.model.generation_calm_algorithms import candidate_weights, first_occurrences
from calm_transformers.model.generation_calm_upstream import USED_SETTINGS
from calm_transformers.model.heads_calm_energy import EnergyHead
from calm_transformers.serving.batcher import Batcher
from calm_transformers.training import distil_temperature as distillation
from calm_transformers.training.auxiliary import WithAuxiliary
from calm_transformers.training.diagnostics import diagnose

pytestmark = pytest.mark.transformers

IDS = torch.randint(3, 90, (3, 24), generator=seeded())
IDS[1, :5] = PAD
ON_DEVICE = {  # by processors of upstream's that know no value on the host
    **{"bad_words_ids": [[40], [41, 42]], "sequence_bias": [[[43], 2.0], [[44, 45], -2.0]]},
    **{"begin_suppress_tokens": list(range(30, 50)), "suppress_tokens": list(range(50, 70)), "forced_eos_token_id": 7},
    **{"exponential_decay_length_penalty": (2, 1.5), "remove_invalid_values": True, "repetition_penalty": 2.0},
}
OTHER_PROCESSORS = {
    **{"no_repeat_ngram_size": 2, "prefix_allowed_tokens_fn": lambda row, ids: range(3 + row, 60)},
    "logits_processor": [lambda ids, scores: scores.roll(int(ids[0, -1]), -1)],
}
SETTINGS = [
    *METHODS.values(),
    *({name: value, "temperature": 0.5} for name, value in (ON_DEVICE | OTHER_PROCESSORS).items()),
    {"forced_bos_token_id": 9, "inputs": IDS[:, :1] * 0 + BOS, "attention_mask": None, "bos_token_id": BOS},
    {"temperature": 0.5, "lazy_decoding": True, "min_new_tokens": 9, "use_cache": False, "num_return_sequences": 2},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "eos_token_id": [EOS, 5], "pad_token_id": 0},
    {"cache_implementation": "static", "max_cache_len": 80, "prefill_chunk_size": 8, "max_time": 1e6},
    {"cache_config": {}, "min_length": 30, "stop_strings": ["e", "xy"], "tokenizer": tiny_tokenizer()},
    {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True, "max_length": 33},
    # Candidates end within a patch.
    {"sequence_bias": [[[EOS], 4.0]], "suppress_tokens": list(range(40, 90)), "temperature": 0.5},
]


def both(model):
    """Returns the model and a copy on the device, each with its device."""
    return (model, torch.device("cpu")), (copy.deepcopy(model).to(NAME), torch.device(NAME, 0))


def generate(model, device, kind="the device's", **settings):
    options = {"inputs": IDS, "attention_mask": (IDS != PAD).long(), "num_candidates": 12, "do_sample": True}
    options |= settings if "max_length" in settings else {"max_new_tokens": 11, **settings}
    rows = range(len(options["inputs"]) * options.get("num_return_sequences", 1))
    of_kind = {"of each row": [seeded(row) for row in rows], "the device's": torch.Generator(device).manual_seed(0)}
    options["generator"] = of_kind.get(kind)
    options |= {name: options[name].to(device) for name in ("inputs", "attention_mask") if options[name] is not None}
    torch.manual_seed(0)
    waits.clear()
    output = model.generate(**options)
    return output if isinstance(output, torch.Tensor) else output.sequences


def with_loss(kind, head_type):
    model = exact_model(head_type, distilled_temperature=0.4 if kind == "distilled" else None)
    if kind == "auxiliary":
        return WithAuxiliary(model, 0.5, num_targets=3).double()
    if kind == "lora":
        config = peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=r"autoencoder\..*")
        return peft.get_peft_model(model, config).double()
    if kind == "plain":
        return model
    old, is_chain = exact_model(head_type, seed=1).head, head_type == "token_chain"
    teacher = distillation.ChainTeacher(old.chain) if is_chain else distillation.HeadTeacher(old, model.autoencoder)
    return distillation.TemperatureDistillation(model, teacher, 3)


def training_step(model, device):
    """Returns the loss and the trained weights after a step, in which the host waits for nothing."""
    weights = [weight for weight in model.train().parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.01)
    batch = {"input_ids": IDS.to(device), "labels": IDS.masked_fill(IDS == PAD, -100).to(device)}
    torch.manual_seed(1)
    waits.clear()
    loss = model(**batch, num_items_in_batch=40).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    assert waits == []
    return [each.detach().cpu() for each in (loss, *weights)]


@pytest.mark.parametrize("kind", ["plain", "auxiliary", "distilled", "lora"])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
@on_second_device
def test_a_training_step_is_the_cpus_and_never_waits(head_type, kind):
    expected, found = (training_step(*place) for place in both(with_loss(kind, head_type)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_weighs_each_row_by_the_batch_rule():
    first_RN = first_occurrences(torch.randint(5, (40, 30, 2), generator=seeded()))
    temperature_R = torch.cat([torch.tensor([1, 0.5, 1 / 3, 0.25]), torch.linspace(0.05, 0.99, 36)])
    expected = [candidate_weights(*row) for row in zip(first_RN.split(1), temperature_R.tolist(), strict=True)]
    torch.testing.assert_close(distillation.weights_by_row(first_RN, temperature_R), torch.cat(expected))


def test_every_setting_of_generation_is_below():
    names = {name for settings in SETTINGS for name in settings} | {"max_new_tokens", "do_sample"}
    assert set(USED_SETTINGS) <= names | {"compile_config", "disable_compile", "output_attentions"}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: min(settings))
@on_second_device
def test_the_same_seeds_give_the_cpus_tokens(settings):
    places = both(exact_model())
    for kind in ("global", "the device's", "of each row"):
        expected, found = (generate(*place, kind, **settings) for place in places)
        assert found.device.type == NAME and found.tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
@on_second_device
def test_every_head_gives_the_cpus_tokens(head_type, dtype):
    places = both(exact_model(head_type, attn_implementation="eager").to(dtype))
    for settings in (*METHODS.values(), {"cache_implementation": "static"}, {"repetition_penalty": 2.0}):
        expected, found = (generate(*place, **settings, lazy_decoding=False) for place in places)
        assert found.tolist() == expected.tolist()


def waits_per_step(place, **settings):
    counts = []
    for num_tokens in (12, 20):
        generate(*place, **settings, inputs=IDS[:1], attention_mask=None, max_new_tokens=num_tokens)
        counts.append(len([wait for wait in waits if "logits_process.py" not in wait]))  # upstream's, before 5.24
    return (counts[1] - counts[0]) / 2


@on_second_device
def test_the_host_waits_once_a_step_and_once_for_processors():
    model = exact_model()
    model.autoencoder.decoder.lm_head.weight.data[EOS] = 0  # never sampled
    place = both(model)[1]
    for kind in ("global", "of each row"):
        assert waits_per_step(place, kind=kind) == waits_per_step(place, kind=kind, min_new_tokens=20) == 1
    for name, value in ON_DEVICE.items():
        assert waits_per_step(place, **{name: value}) == 2, (name, waits)


@pytest.mark.parametrize("head_type", ["energy", *(pytest.param(h, marks=pytest.mark.slow) for h in HEAD_TYPES[1:])])
@on_second_device
def test_a_batcher_gives_the_cpus_tokens(head_type):
    requests, texts = [*METHODS.values(), {"repetition_penalty": 2.0}, {"min_new_tokens": 9}, {"stop": ["e"]}], []
    common = {"seed": 3, "max_new_tokens": 13} | ({"num_logprobs": 2} if head_type == "token_chain" else {})
    for model, _ in both(exact_model(head_type)):
        with Batcher(model, tiny_tokenizer(), max_rows=3, prefill_chunk_size=8) as batcher:
            futures = [batcher.submit(IDS[i % 3, 5 : 9 + i], **common, **each) for i, each in enumerate(requests)]
            texts.append([future.result(60).tokens for future in futures])
    assert texts[0] == texts[1]


@torch.no_grad()
def scores(calm, device, llama):
    """Returns what the evaluations compute, as numbers."""
    ids, tokenizer = IDS.to(device), tiny_tokenizer()
    texts = continuations(calm, tokenizer, "ab", 2, seed=0, max_new_tokens=8, num_candidates=8)
    generator = torch.Generator(device).manual_seed(0)
    of_texts = score_texts(calm, ids, attention_mask=(ids != PAD).long(), num_samples=8, generator=generator)
    return [
        *(value for model in (calm, llama) for value in brier_counts(model, IDS, batch_size=2).score().brier),
        *(row["token_accuracy"] for row in noise_accuracy(calm.autoencoder, ids[0].view(-1, 2))),
        *torch.cat([each.flatten() for each in vars(of_texts).values() if each is not None]).tolist(),
        *diagnose(calm, ids, calm(input_ids=ids).last_hidden_state, 0).values(),
        log_likelihood(llama, tokenizer, "ab", texts),
    ]


@on_second_device
def test_evaluations_give_the_cpus_figures():
    (calm, device), (moved, place) = both(exact_model(patch_size=2))
    llama = tiny_llama().double()
    expected, found = scores(calm, device, llama), scores(moved, place, copy.deepcopy(llama).to(place))
    assert len(expected) > 100 and found == pytest.approx(expected)


@pytest.mark.parametrize("work", ["training", "generation", "batcher"])
@on_second_device
def test_a_tensor_made_without_a_device_is_found(monkeypatch, work):
    model, device = both(exact_model())[1]
    monkeypatch.setattr(EnergyHead, "initial_noise", lambda self, shape, *_: torch.zeros(*shape, 8).double())
    with pytest.raises(RuntimeError, match="tensors of two devices"):
        if work == "batcher":
            with Batcher(model) as batcher:
                batcher.submit([BOS, 9], max_new_tokens=4).result(60)
        (training_step if work == "training" else generate)(model, device)


@on_second_device
def test_what_is_emulated():
    x, mask = torch.tensor([1.0, 2.0], device=NAME), torch.tensor([True, False]).to(NAME)
    reads = [x.tolist, x[0].item, x.cpu, mask.nonzero, lambda: x[mask], lambda: bool(mask.any()), x.unique]
    writes = [lambda: torch.tensor([1], device=NAME), lambda: x.copy_(torch.ones(2)), lambda: x.add_(1).to("cpu")]
    for number, wait in enumerate(reads + writes, start=len(waits) + 1):
        wait()
        assert len(waits) == number, waits[-2:]
    waits.clear()
    assert type((x + torch.tensor(1.0))[None, :1].double().sum()) is type(x) and waits == []
    with pytest.raises(RuntimeError, match="a CPU's generator"):
        torch.rand(2, device=NAME, generator=torch.Generator())
