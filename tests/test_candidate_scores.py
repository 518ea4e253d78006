"""`generate(output_scores=True)`: what each step chose from, counted and weighed by hand, and the text the same."""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from enumerable_laws import seeded
from tiny import BOS, PAD, tiny_model, tiny_tokenizer
from transformers import CompileConfig, pipeline

from calm_transformers.model import generation_calm, generation_calm_samplers
from calm_transformers.model.generation_calm_candidates import (
    NO_TOKEN,
    CandidateScores,
    PlainPool,
    candidate_scores,
    compute_patch_scores,
)
from calm_transformers.model.generation_calm_samplers import PatchSampling
from calm_transformers.model.generation_calm_upstream import CACHE_ARGUMENT
from calm_transformers.model.generation_calm_weights import draw_weights

PROMPT = torch.tensor([[BOS, 5, 6, 7, 8], [PAD, PAD, BOS, 9, 10], [BOS, 7, 7, 8, 9]])
MASK = (PROMPT != PAD).long()
N = 12
LAWS = {
    "T = 1": {},
    "batch": {"temperature": 0.5, "sampling_method": "batch"},
    "adaptive": {"temperature": 0.5},
    "exact": {"temperature": 0.5, "sampling_method": "exact"},
    "1/T not whole": {"temperature": 0.4},
    "T = 1.5": {"temperature": 1.5},
    "top_p": {"top_p": 0.6},
    "top_k, T = 0.5": {"top_k": 2, "temperature": 0.5},
    "min_p, T = 1.5": {"min_p": 0.4, "temperature": 1.5},
    "greedy": {"do_sample": False},
}


@pytest.fixture(scope="module")
def model():
    """Its patches are 2 of 5 tokens, so that candidates repeat."""
    model = tiny_model(patch_size=2)
    with torch.no_grad():
        model.autoencoder.decoder.lm_head.weight[4:] = 0
    return model


def write(model, prompt=PROMPT, mask=MASK, output_scores=True, **settings):
    defaults = {"do_sample": True, "num_candidates": N, "max_new_tokens": 7, "eos_token_id": None, "pad_token_id": PAD}
    defaults |= {"generator": seeded(), "return_dict_in_generate": True}
    return model.generate(prompt, attention_mask=mask, output_scores=output_scores, **defaults | settings)


def patches_written(outputs, prompt_length=PROMPT.shape[1], patch_size=2):
    """(B, S, K); the last may be cut."""
    new = outputs.sequences[:, prompt_length:]
    return torch.nn.functional.pad(new, (0, -new.shape[1] % patch_size), value=NO_TOKEN).unflatten(1, (-1, patch_size))


def weights_by_hand(counts, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Of counts in descending order: C(c, 1/T), above T = 1 with Chao's share of the unseen, then the truncations."""
    s = 1 / temperature

    def binomial(c, s):
        if c <= s - 1:
            return 0.0
        return math.exp(math.lgamma(c + 1) - math.lgamma(s + 1) - math.lgamma(c - s + 1))

    while s > 1 and not any(binomial(c, s) for c in counts):
        s = math.ceil(s) - 1
    weights = [binomial(c, s) for c in counts]
    if temperature > 1:
        once, twice = counts.count(1), counts.count(2)
        unseen = once * (once - 1) / (2 * (twice + 1)) * binomial(0, s)
        weights = [w + unseen / once if c == 1 else w for w, c in zip(weights, counts, strict=True)]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept, so_far = [], 0.0
    for rank, i in enumerate(order):
        if (top_k and rank >= top_k) or (kept and so_far >= top_p * sum(weights[j] for j in order[: top_k or None])):
            break
        so_far += weights[i]
        kept.append(i)
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


class TestText:
    @pytest.mark.parametrize("law", LAWS)
    @pytest.mark.parametrize("lazy", [True, False])
    def test_is_the_same_with_and_without(self, model, law, lazy):
        settings = LAWS[law] | {"lazy_decoding": lazy}
        outputs, without = write(model, **settings), write(model, output_scores=False, **settings)
        assert torch.equal(outputs.sequences, without.sequences) and "scores" not in without
        ids = write(model, return_dict_in_generate=False, **settings)
        assert torch.equal(ids, outputs.sequences)

    def test_is_the_same_with_rules(self, model):
        settings = {"repetition_penalty": 1.5, "suppress_tokens": [1], "temperature": 0.5}
        outputs = write(model, **settings)
        assert torch.equal(outputs.sequences, write(model, output_scores=False, **settings).sequences)
        written, without = patches_written(outputs), patches_written(write(model, temperature=0.5))
        assert 1 not in written and 1 in without
        assert all(1 not in step.patches for step in outputs.scores[:-1])  # the last goes on past the length

    @pytest.mark.parametrize("law", LAWS)
    def test_the_chosen_candidate_stands_in_it(self, model, law):
        outputs = write(model, **LAWS[law])
        written_BSK = patches_written(outputs)
        assert len(outputs.scores) == 4 == written_BSK.shape[1]
        for step, written_BK in zip(outputs.scores, written_BSK.unbind(1), strict=True):
            chosen_BK = step.patches[torch.arange(3), step.chosen]
            assert torch.equal(chosen_BK[written_BK >= 0], written_BK[written_BK >= 0])
            assert (step.weights[torch.arange(3), step.chosen] > 0).all()

    @pytest.mark.parametrize("law", LAWS)
    def test_a_list_of_generators_gives_each_row_what_it_has_alone(self, model, law):
        """But that the exact algorithm may draw more of them, in the blocks that the batch needs."""
        together = write(model, generator=[seeded(3), seeded(4), seeded(5)], **LAWS[law])
        for row in range(3):
            rows = slice(row, row + 1)
            alone = write(model, PROMPT[rows], MASK[rows], generator=[seeded(3 + row)], **LAWS[law])
            for step, own in zip(together.scores, alone.scores, strict=True):
                chosen_K = step.patches[row, step.chosen[row]]
                assert torch.equal(chosen_K, own.patches[0, own.chosen[0]])
                if law in ("adaptive", "exact", "1/T not whole"):
                    continue
                num = own.patches.shape[1]
                assert torch.equal(step.patches[rows, :num], own.patches)
                assert (step.patches[row, num:] == NO_TOKEN).all() and torch.equal(step.chosen[rows], own.chosen)
                torch.testing.assert_close(step.weights[rows, :num], own.weights)


class TestCandidates:
    @pytest.mark.parametrize("law", LAWS)
    def test_shapes_order_padding_and_sums(self, model, law):
        for patches_BMK, counts_BM, weights_BM, chosen_B, is_exact_B in write(model, **LAWS[law]).scores:
            num_rows, most, _ = patches_BMK.shape
            assert counts_BM.shape == weights_BM.shape == (num_rows, most)
            assert chosen_B.shape == is_exact_B.shape == (num_rows,) and is_exact_B.dtype == torch.bool
            torch.testing.assert_close(weights_BM.sum(-1), torch.ones(num_rows))
            assert (weights_BM.diff(dim=-1) <= 0).all()
            is_none_BM = counts_BM == 0
            assert torch.equal(is_none_BM[..., None].expand_as(patches_BMK), patches_BMK == NO_TOKEN)
            assert not weights_BM[is_none_BM].any() and not is_none_BM.all(0).any()
            for row in range(num_rows):
                patches = [tuple(patch) for patch in patches_BMK[row, ~is_none_BM[row]].tolist()]
                assert len(set(patches)) == len(patches) >= 1

    @pytest.mark.parametrize("law", LAWS)
    def test_counts_are_those_of_the_draws_and_weights_by_hand(self, monkeypatch, model, law):
        decoded, decode_tokens = [], model.autoencoder.decode_tokens

        def note(latents_nRZ, forbidden_KV=None):
            decoded.append(decode_tokens(latents_nRZ, forbidden_KV))
            return decoded[-1]

        monkeypatch.setattr(model.autoencoder, "decode_tokens", note)
        num_distinct = 0
        for seed in range(6):
            decoded.clear()
            rows = slice(0, 1)
            (step,) = write(
                model, PROMPT[rows], MASK[rows], max_new_tokens=2, generator=seeded(seed), **LAWS[law]
            ).scores
            drawn = Counter(tuple(patch) for patch in torch.cat(decoded)[:, 0].tolist())
            found = dict(zip(map(tuple, step.patches[0].tolist()), step.counts[0].tolist(), strict=True))
            assert found == drawn
            settings = {k: v for k, v in LAWS[law].items() if k in ("temperature", "top_k", "top_p", "min_p")}
            expected = weights_by_hand(step.counts[0].tolist(), **settings)
            torch.testing.assert_close(step.weights[0], torch.tensor(expected), rtol=1e-4, atol=1e-6)
            num_distinct += len(found)
        assert num_distinct == 6 if law == "T = 1" else num_distinct > 12

    @pytest.mark.parametrize("law", LAWS)
    def test_counts_sum_to_the_draws_made(self, model, law):
        sums = torch.stack([step.counts.sum(-1) for step in write(model, **LAWS[law]).scores])
        if law == "T = 1":
            assert (sums == 1).all()
        elif law in ("adaptive", "exact", "1/T not whole"):
            bound = N * 10 if law == "exact" else N
            assert (sums <= bound).all() and (sums < bound).any() == (law != "1/T not whole")
        else:
            assert (sums == N).all()

    def test_adaptive_counts_what_each_row_drew(self, monkeypatch, model):
        """Not what the pool holds: a row that has stopped has nothing in later blocks."""
        drawn, extend = [], PlainPool.extend

        def note(pool, rows_R, num_draws):
            drawn.append((rows_R.tolist(), num_draws))
            extend(pool, rows_R, num_draws)

        monkeypatch.setattr(PlainPool, "extend", note)
        is_told_apart = False
        for seed in range(8):
            drawn.clear()
            settings = {"temperature": 0.4, "sampling_method": "exact", "generator": seeded(seed)}
            (step,) = write(model, max_new_tokens=2, **settings).scores
            expected = [sum(num for rows, num in drawn if row in rows) for row in range(3)]
            assert step.counts.sum(-1).tolist() == expected
            is_told_apart |= len(set(expected)) > 1
        assert is_told_apart


class Reader:
    """Latents are the patches themselves."""

    class config:
        patch_size = 2
        vocab_size = 10

    def decode_tokens(self, latents, forbidden_KV=None):
        return latents


class TestPool:
    A, B, C, D = [1, 1], [2, 1], [1, 2], [3, 3]

    def pool(self, *rows):
        drawn_NRK = torch.tensor(rows).transpose(0, 1)
        pool = PlainPool(lambda rows_R, num: drawn_NRK[:num, rows_R], torch.arange(len(rows)), Reader())
        pool.extend(pool.rows_B, len(drawn_NRK))
        return pool

    def test_hand_values_at_one_half(self):
        """Counts 3, 2, 1 weigh C(c, 2) = 3, 1, 0."""
        pool = self.pool([self.A, self.B, self.C, self.B, self.C, self.B])
        scores = candidate_scores(pool, torch.tensor([4]), partial(draw_weights, temperature=0.5))
        assert scores.patches.tolist() == [[self.B, self.C, self.A]] and scores.counts.tolist() == [[3, 2, 1]]
        torch.testing.assert_close(scores.weights, torch.tensor([[0.75, 0.25, 0.0]]))
        assert scores.chosen.tolist() == [1]  # draw 4 is C, which draw 2 was first

    def test_equal_weights_keep_the_order_of_the_draws(self):
        pool = self.pool([self.C, self.A, self.B, self.A, self.C, self.D])
        scores = candidate_scores(pool, torch.tensor([5]), partial(draw_weights, temperature=1.0))
        assert scores.patches.tolist() == [[self.C, self.A, self.B, self.D]] and scores.chosen.tolist() == [3]

        many = torch.arange(400).view(1, 200, 2)
        scores = candidate_scores(self.pool(*many.tolist()), torch.tensor([7]), partial(draw_weights, temperature=1.0))
        assert torch.equal(scores.patches, many) and scores.chosen.tolist() == [7]

    def test_without_sampling_neither_temperature_nor_truncation_weighs(self):
        pool = self.pool([self.A, self.B, self.A, self.C])
        scores = candidate_scores(
            pool, torch.tensor([0]), PatchSampling(do_sample=False, temperature=0.5, top_k=1).weigh
        )
        torch.testing.assert_close(scores.weights, torch.tensor([[0.5, 0.25, 0.25]]))

    def test_rows_with_fewer_candidates_are_filled_up(self):
        pool = self.pool([self.A, self.A, self.A], [self.B, self.C, self.B])
        scores = candidate_scores(pool, torch.tensor([2, 0]), PatchSampling(do_sample=False).weigh)
        assert scores.patches.tolist() == [[self.A, [-1, -1]], [self.B, self.C]]
        assert scores.counts.tolist() == [[3, 0], [2, 1]] and scores.chosen.tolist() == [0, 0]
        torch.testing.assert_close(scores.weights, torch.tensor([[1, 0], [2 / 3, 1 / 3]]))

    def test_rows_that_are_not_drawn(self):
        scores = candidate_scores(
            self.pool([self.A, self.B], [self.C, self.C]),
            torch.tensor([0, 1]),
            partial(draw_weights, temperature=1.0),
            torch.tensor([True, True]),
        )
        assert scores.in_rows([0, 1], 2) is scores
        spread = scores.in_rows([2, 0], 4)
        assert spread.chosen.tolist() == [0, -1, 0, -1]
        assert spread.patches.tolist() == [[self.C, [-1, -1]], [[-1, -1]] * 2, [self.A, self.B], [[-1, -1]] * 2]
        assert spread.counts.tolist() == [[2, 0], [0, 0], [1, 1], [0, 0]]
        assert spread.is_exact.tolist() == [True, False, True, False]
        assert spread.weights.tolist() == [[1, 0], [0, 0], [0.5, 0.5], [0, 0]]


class TestPatchScores:
    def test_by_hand(self):
        patches, is_exact = torch.zeros(2, 2, 1, dtype=torch.long), torch.tensor([True, True])
        first = CandidateScores(
            patches, torch.ones(2, 2), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([1, 0]), is_exact
        )
        last = CandidateScores(
            patches, torch.ones(2, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([-1, 0]), is_exact
        )
        expected = torch.tensor([[math.log(0.25), 0], [math.log(0.5), 0]])
        torch.testing.assert_close(compute_patch_scores([first, last]), expected)

    def test_of_a_text(self, model):
        outputs = write(model, temperature=0.5, sampling_method="batch")
        scores_BS = model.compute_patch_scores(outputs.scores)
        assert scores_BS.shape == (3, 4) and (scores_BS < 0).any()
        step = outputs.scores[2]
        shares_B = step.weights[torch.arange(3), step.chosen]
        torch.testing.assert_close(scores_BS[:, 2], shares_B.log())

    def test_at_temperature_1_nothing_was_left_to_chance(self, model):
        assert not model.compute_patch_scores(write(model).scores).any()

    def test_without_sampling_it_is_the_share_of_the_draws(self, model):
        outputs = write(model, do_sample=False)
        shares_BS = torch.stack([step.counts[:, 0] / N for step in outputs.scores], dim=1)
        torch.testing.assert_close(model.compute_patch_scores(outputs.scores), shares_BS.log())
        assert all((step.counts[:, :1] >= step.counts).all() and not step.chosen.any() for step in outputs.scores)

    def test_rows_that_end_before_others(self, model):
        free = patches_written(write(model, temperature=0.5, max_new_tokens=16))
        ends = {int(token): (free == token).any(-1).int().argmax(-1).tolist() for token in range(4)}
        eos = next(token for token in ends if len(set(ends[token])) > 1 and all((free == token).flatten(1).any(-1)))
        settings = {"temperature": 0.5, "max_new_tokens": 40, "eos_token_id": eos}
        outputs = write(model, **settings)
        assert torch.equal(outputs.sequences, write(model, output_scores=False, **settings).sequences)
        written_BSK, scores_BS = patches_written(outputs), model.compute_patch_scores(outputs.scores)
        num_steps = (written_BSK == eos).any(-1).int().argmax(-1) + 1
        assert len(set(num_steps.tolist())) > 1 and scores_BS.shape[1] == num_steps.max()
        for row, num in enumerate(num_steps.tolist()):
            assert not scores_BS[row, num:].any()
            for number, step in enumerate(outputs.scores):
                assert (step.chosen[row] >= 0) == (number < num) == bool(step.counts[row].sum() > 0)
                if number >= num:
                    assert (step.patches[row] == NO_TOKEN).all() and not step.weights[row].any()
                elif number < num - 1:
                    assert torch.equal(step.patches[row, step.chosen[row]], written_BSK[row, number])

    def test_of_something_else_it_says_what_it_takes(self, model):
        outputs = write(model)
        for wrong in (outputs, outputs.scores[0], None, ()):
            with pytest.raises(ValueError, match="takes outputs.scores of generate"):
                model.compute_patch_scores(wrong)

    def test_of_tokens_there_are_none(self, model):
        outputs = write(model)
        with pytest.raises(ValueError, match="model.compute_patch_scores") as error:
            model.compute_transition_scores(outputs.sequences, outputs.scores, normalize_logits=True)
        assert str(error.value).startswith("compute_transition_scores: CALM has no token probabilities; ")
        assert "\n" not in str(error.value)


class TestExact:
    """`sampling_method="exact"` says where it was not."""

    SETTINGS = {"temperature": 0.25, "sampling_method": "exact", "num_candidates": 4, "max_new_tokens": 20}

    @pytest.fixture
    def warnings(self, monkeypatch):
        found = []
        monkeypatch.setattr(generation_calm.logger, "warning", found.append)
        return found

    def test_each_row_and_step_tells_and_a_call_warns_once(self, monkeypatch, warnings, model):
        fell_back, choose = [], generation_calm_samplers.choose_from_full_pool

        def note(class_RN, *args):
            fell_back.append(len(class_RN))
            return choose(class_RN, *args)

        monkeypatch.setattr(generation_calm_samplers, "choose_from_full_pool", note)
        is_exact_SB = torch.stack([step.is_exact for step in write(model, **self.SETTINGS).scores])
        assert is_exact_SB.shape == (10, 3) and is_exact_SB.any() and not is_exact_SB.all()
        assert (~is_exact_SB).sum() == sum(fell_back)
        (warning,) = warnings
        assert warning.startswith(f'sampling_method="exact": {sum(fell_back)} of 30 patches were chosen by the batch')
        assert "40 candidates held no accepted attempt; raise num_candidates" in warning

        monkeypatch.setattr(generation_calm_samplers, "choose_from_full_pool", choose)
        write(model, output_scores=False, **self.SETTINGS)
        compiled = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode=None)}
        write(model, output_scores=False, **self.SETTINGS, **compiled)
        assert warnings[1] == warning and len(warnings) == 3
        assert 0 < int(warnings[2].split()[1]) < 30 and warnings[2].split()[3] == "30"

    @pytest.mark.parametrize("asked", [{"temperature": 1.5}, {"top_k": 2}, {"repetition_penalty": 1.5}], ids=str)
    def test_what_weighs_all_candidates_is_never_exact(self, warnings, model, asked):
        outputs = write(model, sampling_method="exact", **asked)
        assert not any(step.is_exact.any() for step in outputs.scores)
        (warning,) = warnings
        assert "12 of 12 patches were chosen by the batch rule, which logits processors, top_k" in warning

    @pytest.mark.parametrize("law", LAWS)
    def test_other_methods_tell_and_do_not_warn(self, warnings, model, law):
        is_exact_SB = torch.stack([step.is_exact for step in write(model, **LAWS[law]).scores])
        if law == "T = 1":
            assert is_exact_SB.all()
        elif law not in ("adaptive", "exact", "1/T not whole"):
            assert not is_exact_SB.any()
        assert not warnings or law == "exact"

    def test_an_exact_text_needs_no_warning(self, warnings, model):
        outputs = write(model, temperature=0.5, sampling_method="exact", num_candidates=200)
        assert all(step.is_exact.all() for step in outputs.scores) and not warnings


@pytest.mark.transformers
class TestReturned:
    def test_like_upstream_s_outputs(self, model):
        outputs = write(model)
        assert list(outputs.keys()) == ["sequences", "scores", CACHE_ARGUMENT]
        assert outputs[0] is outputs.sequences is outputs["sequences"] and outputs[1] is outputs.scores
        assert outputs.logits is None and outputs.to_tuple()[1] is outputs.scores
        assert isinstance(outputs.scores[0], CandidateScores) and outputs.scores[0].patches.dtype == torch.long

    def test_with_hidden_states_and_without_a_cache(self, model):
        outputs = write(model, output_hidden_states=True, use_cache=False)
        assert len(outputs.hidden_states) == len(outputs.scores) == 4
        assert torch.equal(outputs.sequences, write(model).sequences)

    def test_as_settings_of_the_model(self, model):
        config = model.generation_config
        try:
            config.output_scores = config.return_dict_in_generate = True
            outputs = model.generate(PROMPT, attention_mask=MASK, do_sample=True, max_new_tokens=4)
        finally:
            config.output_scores = config.return_dict_in_generate = False
        assert len(outputs.scores) == 2

    def test_compiled_steps_return_none(self, model):
        settings = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode=None)}
        with pytest.raises(ValueError, match="compiled steps return no scores; leave it out"):
            write(model, **settings)

    @pytest.mark.parametrize("num_texts", [1, 5])
    def test_pipelines_are_unaffected(self, model, num_texts):
        """Five texts are as many as a candidate has fields."""
        writer = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
        settings = {"num_return_sequences": num_texts, "do_sample": True, "max_new_tokens": 6, "eos_token_id": None}
        texts = []
        for asked in ({}, {"output_scores": True, "return_dict_in_generate": True}):
            torch.manual_seed(0)
            texts.append([text["generated_text"] for text in writer("hello", **settings, **asked)])
        assert texts[0] == texts[1] and len(texts[0]) == num_texts
