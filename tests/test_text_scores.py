"""`score_texts`: energy and Brier scores against loops over the same samples and an enumerated distribution."""

import itertools

import pytest
import torch
from tiny import BOS, EOS, HEAD_TYPES, few_tokens, record_calls, seeded, tiny_model, tiny_tokenizer

from calm_transformers.evaluation import text_scores
from calm_transformers.evaluation.text_scores import score_texts
from calm_transformers.model.heads_calm import PatchTarget
from calm_transformers.model.heads_calm_energy import energy_score

TEXT = "a text of some patches"
IDS = torch.randint(3, 95, (1, 24), generator=seeded())


def without_randomness(monkeypatch, model):
    """Makes the head's samples a function of the context, and the posterior's sample its mean."""
    offsets_NZ = torch.randn(6, model.config.latent_size, generator=seeded(5))

    def sample(context_mD, num_samples, generator=None):
        return context_mD[None, :, : offsets_NZ.shape[1]] + offsets_NZ[:num_samples, None]

    monkeypatch.setattr(model.head, "sample", sample)
    means = lambda target, num, generator: target.posterior()[0].expand(num, -1, -1)  # noqa: E731
    monkeypatch.setattr(PatchTarget, "sample_latents", means)
    return model


def brier_by_loops(samples_NK, target_K):
    """Returns Brier-n, n = 1 … K, over every pair of samples, and the fraction of samples with the first n tokens."""
    samples, target, size = samples_NK.tolist(), target_K.tolist(), len(samples_NK)
    brier, match_rate = [], []
    for n in range(1, len(target) + 1):
        pairs = [(a[:n], b[:n]) for a, b in itertools.permutations(samples, 2)]
        brier.append(sum((a == target[:n]) + (b == target[:n]) - (a == b) for a, b in pairs) / len(pairs))
        match_rate.append(sum(sample[:n] == target[:n] for sample in samples) / size)
    return brier, match_rate


@pytest.mark.parametrize("patch_size, num_samples", [(1, 7), (2, 3), (4, 2)])
def test_energy_and_brier_of_the_same_samples(monkeypatch, patch_size, num_samples):
    """Which are made in chunks, except with K = 4."""
    monkeypatch.setitem(text_scores.SAMPLES_CHUNK_SIZE, "cpu", 40)
    model = few_tokens(tiny_model(patch_size=patch_size, beta=1.3))
    samples = record_calls(monkeypatch, model.head, "sample")
    targets = record_calls(monkeypatch, PatchTarget, "sample_latents")
    ids_BL = torch.randint(3, (2, 24), generator=seeded(2))
    scores = score_texts(model, ids_BL, num_samples=num_samples, generator=seeded())
    num_scored = 2 * (24 // patch_size - 1)
    assert scores.is_scored.sum() == num_scored and not scores.is_scored[:, 0].any()
    assert max(each.shape[:2].numel() for each in samples) <= 40 and (len(samples) > 1) == (patch_size < 4)
    samples_NMZ, targets_SMZ = torch.cat(samples, dim=1), torch.cat(targets, dim=1)
    assert samples_NMZ.shape[:2] == (num_samples, num_scored) and targets_SMZ.shape[:2] == (10, num_scored)
    energy_M = energy_score(samples_NMZ, targets_SMZ, beta=1.3)
    torch.testing.assert_close(scores.energy[scores.is_scored], energy_M, rtol=1e-4, atol=1e-4)
    tokens_MNK = model.autoencoder.decode_tokens(samples_NMZ).movedim(0, 1)
    expected = [brier_by_loops(*each) for each in zip(tokens_MNK, scores.patches[scores.is_scored], strict=True)]
    brier_MK, match_rate_MK = (torch.tensor(values) for values in zip(*expected, strict=True))
    torch.testing.assert_close(scores.brier[scores.is_scored], brier_MK)
    torch.testing.assert_close(scores.prefix_match_rate[scores.is_scored], match_rate_MK)
    torch.testing.assert_close(scores.means()["brier"], brier_MK.unflatten(0, (2, -1)).mean(1))
    assert len(set(brier_MK.flatten().tolist())) > 2, "all scores are equal"


LENGTHS = [4, 7, 13, 24]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_does_not_change_scores(monkeypatch, side):
    model = without_randomness(monkeypatch, few_tokens(tiny_model(prompt_filler_token_id=5), 20))
    texts = [torch.randint(3, 20, (1, length), generator=seeded(length)) for length in LENGTHS]
    ids_BL, mask_BL = torch.full((4, 26), 77), torch.zeros(4, 26, dtype=torch.long)
    for row, ids_1L in enumerate(texts):
        room = 26 - ids_1L.shape[1]
        start = {"left": room, "right": 0, "both": room // 2}[side]
        ids_BL[row, start : start + ids_1L.shape[1]] = ids_1L
        mask_BL[row, start : start + ids_1L.shape[1]] = 1
    batch = score_texts(model, ids_BL, attention_mask=mask_BL, num_samples=6)
    for row, ids_1L in enumerate(texts):
        alone, num = score_texts(model, ids_1L, num_samples=6), -(-ids_1L.shape[1] // 4)
        assert batch.is_scored[row].tolist() == [False] * (6 - num + 1) + [True] * (num - 1)
        assert alone.is_scored[0].tolist() == [False] + [True] * (num - 1)
        assert torch.equal(batch.patches[row, 6 - num :], alone.patches[0])
        torch.testing.assert_close(batch.energy[row, 6 - num :], alone.energy[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.brier[row, 6 - num :], alone.brier[0])
        assert not batch.energy[row, : 6 - num + 1].any() and not batch.prefix_match_rate[row, : 6 - num + 1].any()
        for name, value in alone.means().items():
            torch.testing.assert_close(batch.means()[name][row], value[0], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_strings_score_as_their_ids():
    """Strings that spell a special token are text; the tokenizer needs no pad token."""
    model, tokenizer = few_tokens(tiny_model(), 20), tiny_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    by_text = score_texts(model, TEXT, tokenizer=tokenizer, num_samples=5, generator=seeded())
    by_ids = score_texts(model, ids, num_samples=5, generator=seeded())
    assert all(torch.equal(by_text[name], by_ids[name]) for name in by_text.keys())
    tokenizer.pad_token = None
    scores = score_texts(model, [TEXT, "a</s>b", ""], tokenizer, num_samples=3)
    assert scores.is_scored.sum(-1).tolist() == [5, 1, 0]
    spelled = tokenizer("a</s>b", split_special_tokens=True)["input_ids"]
    assert scores.patches[1].flatten()[-len(spelled) :].tolist() == spelled and EOS not in spelled


def test_the_first_patch_is_the_partial_one_and_not_scored(monkeypatch):
    """Of 5 tokens, K = 4, the first patch has one and the last four are scored; of 3 tokens none."""
    model = tiny_model()
    sizes = record_calls(monkeypatch, model.head, "sample", lambda samples, *_, **__: samples.numel())
    scores = score_texts(model, IDS[:, :3], num_samples=3)
    assert not sum(sizes) and scores.is_scored.tolist() == [[False]] and scores.brier.shape == (1, 1, 4)
    assert all(value.isnan().all() for value in scores.means().values())
    scores = score_texts(model, IDS[:, :5], num_samples=3)
    assert scores.patches[0, 1].tolist() == IDS[0, 1:5].tolist()
    assert scores.patches[0, 0, 3] == IDS[0, 0] and scores.is_scored.tolist() == [[False, True]]


def test_an_empty_text_starts_with_bos():
    model = tiny_model()
    for ids, mask in ((IDS[:, :0], None), (IDS[:, :4], torch.zeros(1, 4))):
        scores = score_texts(model, ids, attention_mask=mask, num_samples=3)
        assert scores.patches[0, 0, -1] == BOS and not scores.is_scored.any()
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match=r"^score_texts\(\) got an empty text, and the model has no bos_token_id"):
        score_texts(model, IDS[:, :0], num_samples=3)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_every_head(head_type):
    """The training flag is unchanged, and there is no gradient."""
    model = tiny_model(head_type)
    scores = score_texts(model, IDS, num_samples=4, generator=seeded())
    again = score_texts(model.train(), IDS, num_samples=4, generator=seeded())
    other = score_texts(model, IDS, num_samples=4, generator=seeded(1))
    by_samples = not model.head.samples_tokens
    name = "energy" if by_samples else "log_probability"
    assert model.training and not scores[name].requires_grad and scores[name].isfinite().all()
    assert (scores[name][:, 1:] != 0).all() and not scores[name][:, 0].any()
    assert torch.equal(scores[name], again[name]) and torch.equal(scores[name], other[name]) != by_samples
    if not by_samples:
        with torch.no_grad():
            logits_BPKV = model.head.token_logits(model(IDS).last_hidden_state[:, :-1], scores.patches[:, 1:])
        expected_BPK1 = logits_BPKV.log_softmax(-1).gather(-1, scores.patches[:, 1:, :, None])
        torch.testing.assert_close(scores.log_probability[:, 1:], expected_BPK1[..., 0])
        assert scores.energy is None


def test_bfloat16():
    model = few_tokens(tiny_model(), 20)
    wide = score_texts(model, IDS, num_samples=50, generator=seeded())
    narrow = score_texts(model.to(torch.bfloat16), IDS, num_samples=50, generator=seeded())
    assert narrow.energy.dtype == narrow.brier.dtype == torch.float32
    torch.testing.assert_close(narrow.energy.mean(), wide.energy.mean(), rtol=0.1, atol=0)


def test_bad_input_is_one_sentence():
    model = tiny_model()
    for texts, options, message in (
        (TEXT, {"tokenizer": None}, r"got text: pass tokenizer=\.\.\., or ids"),
        (TEXT, {"tokenizer": "."}, r"got text: pass tokenizer=\.\.\., or ids"),
        ([], {}, "a non-empty list of texts"),
        (None, {}, "takes a text"),
        ([TEXT, None], {}, "takes a text"),
        ([TEXT, "ab\ud800"], {}, "got 2 texts; text 2 is invalid at character 2: a lone surrogate"),
        (IDS.tolist(), {}, "or ids as a tensor"),
        (IDS + 90, {}, r"got token id \d+, outside the vocabulary 0 … 95"),
        (IDS, {"attention_mask": torch.ones(1, 3)}, r"attention_mask of shape \(1, 3\), but ids of shape \(1, 24\)"),
        *((IDS, {"num_samples": num}, "num_samples=.*must be an integer of at least 2") for num in (1, 2.5, True)),
    ):
        options = {"tokenizer": tiny_tokenizer(), "num_samples": 3} | options
        with pytest.raises(ValueError, match=message) as error:
            score_texts(model, texts, **options)
        assert str(error.value).startswith(("score_texts()", "num_samples=")) and "\n" not in str(error.value)
