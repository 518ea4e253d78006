"""`generate(output_scores=True)`: candidates, counts and weights of each step, with the sequences unchanged."""

from collections import Counter

import pytest
import torch
from tiny import BOS, METHODS, PAD, few_tokens, record_calls, seeded, tiny_model, tiny_tokenizer
from transformers import CompileConfig, pipeline

from calm_transformers.model import generation_calm, generation_calm_samplers
from calm_transformers.model.generation_calm_algorithms import Truncation
from calm_transformers.model.generation_calm_candidates import NO_TOKEN, CandidateBatch, CandidateScores
from calm_transformers.model.generation_calm_upstream import CACHE_ARGUMENT
from calm_transformers.pages.inspect_text import weights_from_counts

PROMPT = torch.tensor([[BOS, 5, 6, 7, 8], [PAD, PAD, BOS, 9, 10], [BOS, 7, 7, 8, 9]])
MASK = (PROMPT != PAD).long()
ROWS = torch.arange(3)
N = 12
COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode=None)}
SETTINGS = METHODS | {
    "exact, T = 1.5": {"temperature": 1.5, "sampling_method": "exact"},
    "top_p": {"top_p": 0.6},
    "top_k, T = 0.5": {"top_k": 2, "temperature": 0.5, "sampling_method": "exact"},
    "min_p, T = 1.5": {"min_p": 0.8, "temperature": 1.5},
}


@pytest.fixture(scope="module")
def model():
    """A model whose patches are 2 of 5 tokens, so that candidates repeat."""
    return few_tokens(tiny_model(patch_size=2), 4)


def write(model, prompt=PROMPT, mask=MASK, output_scores=True, **settings):
    defaults = {"do_sample": True, "num_candidates": N, "max_new_tokens": 7, "eos_token_id": None, "pad_token_id": PAD}
    defaults |= {"generator": seeded(), "return_dict_in_generate": True}
    return model.generate(prompt, attention_mask=mask, output_scores=output_scores, **defaults | settings)


def generated_patches(outputs, prompt_length=PROMPT.shape[1], patch_size=2):
    """Returns the new patches (B, S, K); the last may be truncated."""
    new = outputs.sequences[:, prompt_length:]
    return torch.nn.functional.pad(new, (0, -new.shape[1] % patch_size), value=NO_TOKEN).unflatten(1, (-1, patch_size))


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(generation_calm.logger, "warning", found.append)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_describe_the_candidates_and_leave_the_sequences_unchanged(model, warnings, name):
    outputs, without = write(model, **SETTINGS[name]), write(model, output_scores=False, **SETTINGS[name])
    assert torch.equal(outputs.sequences, without.sequences) and "scores" not in without
    assert torch.equal(write(model, return_dict_in_generate=False, **SETTINGS[name]), outputs.sequences)
    patches_BSK, scores_BS = generated_patches(outputs), model.compute_patch_scores(outputs.scores)
    assert len(outputs.scores) == 4 == patches_BSK.shape[1] and scores_BS.shape == (3, 4)
    bounds = {"adaptive": (0, N), "exact": (0, 10 * N), "1/T not whole": (0, N), "T = 1": (1, 1)}
    least, most = bounds.get(name, (N, N))
    for number, step in enumerate(outputs.scores):
        patches_BMK, counts_BM, weights_BM, chosen_B, is_exact_B = step
        chosen_BK, patch_BK = patches_BMK[ROWS, chosen_B], patches_BSK[:, number]
        assert torch.equal(chosen_BK[patch_BK >= 0], patch_BK[patch_BK >= 0])
        torch.testing.assert_close(scores_BS[:, number], weights_BM[ROWS, chosen_B].log())
        assert (weights_BM[ROWS, chosen_B] > 0).all() and (weights_BM.diff(dim=-1) <= 0).all()
        torch.testing.assert_close(weights_BM.sum(-1), torch.ones(3))
        assert (least <= counts_BM.sum(-1)).all() and (counts_BM.sum(-1) <= most).all()
        is_none_BM = counts_BM == 0
        assert torch.equal(is_none_BM[..., None].expand_as(patches_BMK), patches_BMK == NO_TOKEN)
        assert not weights_BM[is_none_BM].any() and not is_none_BM.all(0).any()
        for row in range(3):
            distinct = patches_BMK[row, ~is_none_BM[row]].unique(dim=0)
            assert len(distinct) == (~is_none_BM[row]).sum() >= 1
        assert is_exact_B.dtype == torch.bool
        if name not in ("adaptive", "exact", "1/T not whole"):
            assert (is_exact_B == (name == "T = 1")).all()
    assert scores_BS.any() == (name != "T = 1") and (not warnings or name == "exact")


def test_logits_processors_change_sequences_and_candidates(model):
    settings = {"repetition_penalty": 1.5, "suppress_tokens": [1], "temperature": 0.5, "sampling_method": "exact"}
    outputs = write(model, **settings)
    assert torch.equal(outputs.sequences, write(model, output_scores=False, **settings).sequences)
    patches, without = generated_patches(outputs), generated_patches(write(model, temperature=0.5))
    assert 1 not in patches and 1 in without
    assert not any(step.is_exact.any() for step in outputs.scores)  # all candidates are weighed
    assert all(1 not in step.patches for step in outputs.scores[:-1])  # the last is longer than max_new_tokens


@pytest.mark.parametrize("name", ["T = 1", "batch", "adaptive", "top_p", "min_p, T = 1.5", "greedy"])
def test_with_per_row_generators_scores_are_those_of_a_row_alone(model, name):
    """Except that the exact algorithm may draw more candidates, in the blocks that the batch needs."""
    together = write(model, generator=[seeded(3), seeded(4), seeded(5)], **SETTINGS[name])
    for row in range(3):
        rows = slice(row, row + 1)
        alone = write(model, PROMPT[rows], MASK[rows], generator=[seeded(3 + row)], **SETTINGS[name])
        for step, own in zip(together.scores, alone.scores, strict=True):
            assert torch.equal(step.patches[row, step.chosen[row]], own.patches[0, own.chosen[0]])
            num = own.patches.shape[1]
            if name != "adaptive":
                assert torch.equal(step.patches[rows, :num], own.patches)
                assert torch.equal(step.chosen[rows], own.chosen)
                assert (step.patches[row, num:] == NO_TOKEN).all()
                torch.testing.assert_close(step.weights[rows, :num], own.weights)


@pytest.mark.parametrize("name", SETTINGS)
def test_counts_are_those_of_the_samples_and_weights_those_of_the_counts(monkeypatch, model, name):
    """The weights of counts are compared with hand values in test_truncation.py and test_samplers.py."""
    decoded, num_distinct = record_calls(monkeypatch, model.autoencoder, "decode_tokens"), 0
    truncation = Truncation(**{k: v for k, v in SETTINGS[name].items() if k in Truncation._fields})
    for seed in range(6):
        decoded.clear()
        settings = {"max_new_tokens": 2, "generator": seeded(seed)} | SETTINGS[name]
        (step,) = write(model, PROMPT[:1], MASK[:1], **settings).scores
        found = dict(zip(map(tuple, step.patches[0].tolist()), step.counts[0].tolist(), strict=True))
        assert found == Counter(tuple(patch) for patch in torch.cat(decoded)[:, 0].tolist())
        expected = weights_from_counts(step.counts[0].tolist(), SETTINGS[name].get("temperature", 1.0), truncation)
        torch.testing.assert_close(step.weights[0], torch.tensor(expected), rtol=1e-4, atol=1e-6)
        num_distinct += len(found)
    assert num_distinct == 6 if name == "T = 1" else num_distinct > 12


def test_counts_of_a_stopped_row_exclude_later_blocks(monkeypatch, model):
    kept, has_unequal_counts = (lambda _, candidates, rows_R, num: (rows_R.tolist(), num)), False
    blocks = record_calls(monkeypatch, CandidateBatch, "extend", kept)
    for seed in range(8):
        blocks.clear()
        settings = {"temperature": 0.4, "sampling_method": "exact", "generator": seeded(seed)}
        (step,) = write(model, max_new_tokens=2, **settings).scores
        expected = [sum(num for rows, num in blocks if row in rows) for row in range(3)]
        assert step.counts.sum(-1).tolist() == expected
        has_unequal_counts |= len(set(expected)) > 1
    assert has_unequal_counts


def test_scores_of_finished_rows_are_empty(model):
    free = generated_patches(write(model, temperature=0.5, max_new_tokens=16))
    ends = {int(token): (free == token).any(-1).int().argmax(-1).tolist() for token in range(4)}
    eos = next(token for token in ends if len(set(ends[token])) > 1 and all((free == token).flatten(1).any(-1)))
    settings = {"temperature": 0.5, "max_new_tokens": 40, "eos_token_id": eos}
    outputs = write(model, **settings)
    assert torch.equal(outputs.sequences, write(model, output_scores=False, **settings).sequences)
    patches_BSK, scores_BS = generated_patches(outputs), model.compute_patch_scores(outputs.scores)
    num_steps = (patches_BSK == eos).any(-1).int().argmax(-1) + 1
    assert len(set(num_steps.tolist())) > 1 and scores_BS.shape[1] == num_steps.max()
    for row, num in enumerate(num_steps.tolist()):
        assert not scores_BS[row, num:].any()
        for number, step in enumerate(outputs.scores):
            assert (step.chosen[row] >= 0) == (number < num) == bool(step.counts[row].sum() > 0)
            if number >= num:
                assert (step.patches[row] == NO_TOKEN).all() and not step.is_exact[row]
                assert not step.weights[row].any() and not step.counts[row].any()
            elif number < num - 1:
                assert torch.equal(step.patches[row, step.chosen[row]], patches_BSK[row, number])


def test_unsupported_scores_raise_an_error(model):
    outputs = write(model)
    for wrong in (outputs, outputs.scores[0], None, ()):
        with pytest.raises(ValueError, match="takes outputs.scores of generate"):
            model.compute_patch_scores(wrong)
    sentence = "^compute_transition_scores: CALM has no token probabilities; .*model.compute_patch_scores"
    with pytest.raises(ValueError, match=sentence):
        model.compute_transition_scores(outputs.sequences, outputs.scores, normalize_logits=True)
    with pytest.raises(ValueError, match="compiled steps return no scores; leave it out"):
        write(model, **COMPILED)


def test_where_the_batch_rule_chose_is_flagged_per_row_and_step(monkeypatch, model):
    settings = {"temperature": 0.25, "sampling_method": "exact", "num_candidates": 4, "max_new_tokens": 20}
    fell_back = record_calls(
        monkeypatch, generation_calm_samplers, "choose_at_limit", lambda _, first, *__: len(first)
    )
    is_exact_SB = torch.stack([step.is_exact for step in write(model, **settings).scores])
    assert is_exact_SB.shape == (10, 3) and is_exact_SB.any() and not is_exact_SB.all()
    assert (~is_exact_SB).sum() == sum(fell_back)


@pytest.mark.transformers
class TestOutputs:
    def test_like_upstream_s_outputs(self, model):
        outputs = write(model, output_hidden_states=True)
        assert list(outputs.keys()) == ["sequences", "scores", "hidden_states", CACHE_ARGUMENT]
        assert outputs[0] is outputs.sequences is outputs["sequences"] and outputs[1] is outputs.scores
        assert outputs.logits is None and outputs.to_tuple()[1] is outputs.scores
        assert isinstance(outputs.scores[0], CandidateScores) and outputs.scores[0].patches.dtype == torch.long
        assert len(outputs.hidden_states) == len(outputs.scores) == 4
        assert torch.equal(outputs.sequences, write(model, use_cache=False).sequences)

    def test_as_settings_of_the_model(self, monkeypatch, model):
        monkeypatch.setattr(model.generation_config, "output_scores", True)
        monkeypatch.setattr(model.generation_config, "return_dict_in_generate", True)
        outputs = model.generate(PROMPT, attention_mask=MASK, do_sample=True, max_new_tokens=4)
        assert len(outputs.scores) == 2

    def test_pipelines_are_unaffected(self, model):
        """Five sequences, as many as CandidateScores has fields."""
        generator = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
        settings = {"num_return_sequences": 5, "do_sample": True, "max_new_tokens": 6, "eos_token_id": None}
        sequences = []
        for options in ({}, {"output_scores": True, "return_dict_in_generate": True}):
            torch.manual_seed(0)
            sequences.append([each["generated_text"] for each in generator("hello", **settings, **options)])
        assert sequences[0] == sequences[1] and len(sequences[0]) == 5
