"""Texts end where the stopping criteria say, asked a patch or a token at a time."""

import pytest
import torch
from tiny import tiny_tokenizer
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from calm_transformers.model.generation_calm_texts import GrowingTexts
from calm_transformers.model.generation_calm_upstream import GenerateCall

pytestmark = pytest.mark.transformers

PAD, EOS = 0, 2


class Kept:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, tokens):
        self.tokens.append(tokens.tolist())


class Anything(StoppingCriteria):
    """A rule of the user's own, which never stops a text."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


def call_with(*rules, pad=PAD, streamer=None):
    pad_token = None if pad is None else torch.tensor(pad)
    return GenerateCall(StoppingCriteriaList(rules), lambda *_: True, pad_token=pad_token, streamer=streamer)


def written(patches_SBK, call):
    """(Whole texts, rows drawn before each step) of these patches, row by row."""
    texts, drawing = GrowingTexts(torch.full((patches_SBK.shape[1], 3), 9), call), []
    for patches_BK in patches_SBK:
        drawing.append(texts.drawing)
        read_BK = texts.append(texts.rows(patches_BK))
        is_drawn_B1 = torch.tensor([[row in drawing[-1]] for row in range(len(patches_BK))])
        assert torch.equal(read_BK, patches_BK * is_drawn_B1)
        if texts.is_finished:
            break
    return texts.ids_BL, drawing, texts.is_finished


def random_patches(seed, num_steps=6, num_rows=3, patch_size=4, highest=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, highest, (num_steps, num_rows, patch_size), generator=generator)


@pytest.mark.parametrize("pad", [PAD, None])
@pytest.mark.parametrize("num_rows, patch_size", [(1, 4), (3, 4), (3, 1), (2, 5)])
@pytest.mark.parametrize("max_length", [4, 9, 20, 200])
def test_by_patch_as_by_token(pad, num_rows, patch_size, max_length):
    ended = 0
    for seed in range(10):
        patches = random_patches(seed, num_rows=num_rows, patch_size=patch_size)
        eos = [] if pad is None else [EosTokenCriteria([EOS, 7])]
        rules, results = [MaxLengthCriteria(max_length), *eos], []
        for more in ([], [Anything()]):
            streamer = Kept()
            call = call_with(*rules, *more, pad=pad, streamer=streamer)
            assert GrowingTexts(patches[0], call).is_asked_by_patch == (not more)
            ids, *rest = written(patches, call)
            assert torch.equal(torch.tensor(streamer.tokens).T, ids[:, 3:])
            results.append((ids.tolist(), *rest))
        assert results[0] == results[1]
        ended += results[0][2]
    if patch_size > 1:  # of 6 tokens a row few texts have all their rows ended
        assert (ended > 0) == (bool(eos) or max_length < 200)


def test_stop_strings_by_patch_as_by_token():
    tokenizer = tiny_tokenizer()
    rule, ended = StopStringCriteria(tokenizer, ["ab", "o w", "th"]), 0
    ids = tokenizer("another hello world in the cab", add_special_tokens=False)["input_ids"]
    for shift in range(len(ids)):
        for patch_size in (1, 3, 4):
            rows = [ids[shift:] + ids[:shift], ids]
            length = len(ids) // patch_size * patch_size
            patches = torch.tensor(rows)[:, :length].unflatten(1, (-1, patch_size)).transpose(0, 1)
            once, one_by_one = (written(patches, call_with(rule, *more)) for more in ([], [Anything()]))
            assert torch.equal(once[0], one_by_one[0]) and once[1:] == one_by_one[1:]
            ended += once[2]
    assert ended > len(ids)


@pytest.mark.parametrize("rule", [MaxTimeCriteria(100.0), Anything(), type("Own", (EosTokenCriteria,), {})(EOS)])
def test_rules_that_may_look_at_anything_see_each_token(rule):
    assert not GrowingTexts(torch.ones(1, 3), call_with(MaxLengthCriteria(9), rule)).is_asked_by_patch


def test_criteria_that_are_no_list_see_each_token():
    call = GenerateCall(lambda ids, scores: torch.tensor([ids.shape[1] == 5]), lambda *_: True)
    ids, _, finished = written(random_patches(0, num_rows=1), call)
    assert ids.shape == (1, 5) and finished


def test_texts_that_have_ended_stay_as_they_are_while_others_are_waited_for():
    texts = GrowingTexts(torch.tensor([[9]]), call_with(MaxLengthCriteria(3)))
    texts.append(torch.tensor([[5, 6, 7]]))
    assert texts.is_finished and texts.drawing == [0]
    texts.append(torch.tensor([[5, 6, 7]]))
    assert texts.ids_BL.tolist() == [[9, 5, 6]]
