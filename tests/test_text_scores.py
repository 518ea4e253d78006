"""`score_texts`: energy and Brier scores by patch against loops over the same draws and against a law enumerated."""

import pytest
import torch
from tiny import BOS, EOS, HEAD_TYPES, tiny_model, tiny_tokenizer

from calm_transformers.evaluation import text_scores
from calm_transformers.evaluation.text_scores import score_texts
from calm_transformers.model.heads_calm import PatchTarget
from calm_transformers.model.heads_calm_energy import energy_score

TEXT = "a text of some patches"
IDS = torch.randint(3, 95, (1, 24), generator=torch.Generator().manual_seed(0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def drawn(monkeypatch):
    """`drawn(model)`: from now on what the head draws is kept in `.samples`, posteriors' draws in `.targets`."""

    class Drawn:
        samples: list
        targets: list

        def __call__(self, model):
            self.samples, self.targets = [], []

            def kept(function, where):
                return lambda *args, **kwargs: where.append(function(*args, **kwargs)) or where[-1]

            monkeypatch.setattr(model.head, "sample", kept(model.head.sample, self.samples))
            monkeypatch.setattr(PatchTarget, "sample_latents", kept(PatchTarget.sample_latents, self.targets))
            return model

    return Drawn()


def without_randomness(monkeypatch, model):
    """A head whose draws are a function of the context, and posteriors of which the mean is drawn."""
    offsets_NZ = torch.randn(6, model.config.latent_size, generator=seeded(5))

    def sample(context_mD, num_samples, generator=None):
        return context_mD[None, :, : offsets_NZ.shape[1]] + offsets_NZ[:num_samples, None]

    monkeypatch.setattr(model.head, "sample", sample)
    monkeypatch.setattr(
        PatchTarget, "sample_latents", lambda self, num, generator: self.posterior()[0].expand(num, -1, -1)
    )
    return model


def brier_by_loops(samples_NK, target_K):
    """Brier-n, n = 1 … K, over every pair of samples; and the share of samples that have the first n tokens."""
    samples, target, size = samples_NK.tolist(), target_K.tolist(), len(samples_NK)
    brier, hits = [], []
    for n in range(1, len(target) + 1):
        pairs = [(i, j) for i in range(size) for j in range(size) if i != j]
        terms = [
            (samples[i][:n] == target[:n]) + (samples[j][:n] == target[:n]) - (samples[i][:n] == samples[j][:n])
            for i, j in pairs
        ]
        brier.append(sum(terms) / len(pairs))
        hits.append(sum(sample[:n] == target[:n] for sample in samples) / size)
    return brier, hits


def few_tokens(model, num_tokens=3):
    """The decoder writes these alone, so that samples hit and collide."""
    with torch.no_grad():
        model.autoencoder.decoder.lm_head.weight[num_tokens:] = 0
    return model


@pytest.mark.parametrize("patch_size, num_samples", [(1, 7), (2, 3), (4, 2)])
def test_energy_and_brier_of_the_same_draws(drawn, patch_size, num_samples):
    model = drawn(few_tokens(tiny_model(patch_size=patch_size, beta=1.3)))
    ids_BL = torch.randint(3, (2, 24), generator=seeded(2))
    scores = score_texts(model, ids_BL, num_samples=num_samples, generator=seeded())
    num_scored = 2 * (24 // patch_size - 1)
    assert scores.is_scored.sum() == num_scored and not scores.is_scored[:, 0].any()
    samples_NMZ, targets_SMZ = torch.cat(drawn.samples, dim=1), torch.cat(drawn.targets, dim=1)
    assert samples_NMZ.shape[:2] == (num_samples, num_scored) and targets_SMZ.shape[:2] == (10, num_scored)
    energy_M = energy_score(samples_NMZ, targets_SMZ, beta=1.3)
    torch.testing.assert_close(scores.energy[scores.is_scored], energy_M, rtol=1e-4, atol=1e-4)
    tokens_MNK = model.autoencoder.decode_tokens(samples_NMZ).movedim(0, 1)
    expected = [brier_by_loops(*each) for each in zip(tokens_MNK, scores.patches[scores.is_scored], strict=True)]
    brier_MK, hits_MK = (torch.tensor(values) for values in zip(*expected, strict=True))
    torch.testing.assert_close(scores.brier[scores.is_scored], brier_MK)
    torch.testing.assert_close(scores.hits[scores.is_scored], hits_MK)
    torch.testing.assert_close(scores.means()["brier"], brier_MK.unflatten(0, (2, -1)).mean(1))
    assert len(set(brier_MK.flatten().tolist())) > 2, "nothing to tell apart"


@torch.no_grad()
def enumerated_law(model, context_D):
    """P of each patch (8, 8) that the token-chain head draws over 8 tokens, K = 2, and the decoder reads."""
    every_AK = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    context_AD = model.head.context_layers(context_D).expand(64, -1)
    log_AKV = model.head.chain.teacher_forced(context_AD, every_AK).log_softmax(-1)
    drawn_A = log_AKV.gather(-1, every_AK[..., None])[..., 0].sum(-1).exp()
    read_AK = model.autoencoder.decode_tokens(sum(model.head.codes[k, every_AK[:, k]] for k in range(2)))
    return torch.zeros(64).index_add(0, read_AK[:, 0] * 8 + read_AK[:, 1], drawn_A).view(8, 8)


def test_brier_is_unbiased():
    model = tiny_model("token_chain", 2, vocab_size=8, pad_token_id=0, autoencoder_config={"vocab_size": 8})
    with torch.no_grad():
        model.head.chain.lm_head.weight.mul_(2)  # a law that is neither flat nor certain
    num_rows, num_samples, ids_L = 4000, 5, torch.tensor([1, 3, 4, 5])
    law_VV = enumerated_law(model, model(ids_L[None]).last_hidden_state[0, 0])
    assert law_VV.sum() == pytest.approx(1, abs=1e-5)
    target = torch.unravel_index(law_VV.argmax(), (8, 8))
    ids_L[2:] = torch.stack(target)
    hits_K = torch.tensor([law_VV.sum(1)[target[0]], law_VV[target]])
    collisions_K = torch.tensor([law_VV.sum(1).square().sum(), law_VV.square().sum()])
    scores = score_texts(model, ids_L.repeat(num_rows, 1), num_samples=num_samples, generator=seeded())
    errors_K = scores.brier[:, 1].std(0) / num_rows**0.5
    assert ((scores.brier[:, 1].mean(0) - (2 * hits_K - collisions_K)).abs() < 4 * errors_K).all()
    plug_in_bias_K = (1 - collisions_K) / num_samples  # of ΣP̂², pairs of a sample with itself included
    assert (plug_in_bias_K > 8 * errors_K).all(), "the test could not tell an estimate with bias"
    assert (scores.hits[:, 1].mean(0) - hits_K).abs().max() < 0.02


LENGTHS = [4, 7, 13, 24]


@pytest.mark.parametrize("side, context", [("left", 0), ("right", 0), ("both", 2)])
def test_a_padded_text_scores_as_alone(monkeypatch, side, context):
    overrides = {"prompt_filler_token_id": 5, "autoencoder_config": {"encoder_context": context}}
    model = without_randomness(monkeypatch, few_tokens(tiny_model(**overrides), 20))
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
        assert not batch.energy[row, : 6 - num + 1].any() and not batch.hits[row, : 6 - num + 1].any()
        for name, value in alone.means().items():
            torch.testing.assert_close(batch.means()[name][row], value[0], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_strings_are_their_ids():
    """What spells a special token is text; padding is our own, so the tokenizer needs no pad token."""
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


def test_the_first_patch_is_the_partial_one_and_has_no_score(drawn):
    """5 tokens, K = 4: one is in the first patch, and the last four are what is scored; of 3 nothing is."""
    model = drawn(tiny_model())
    scores = score_texts(model, IDS[:, :3], num_samples=3)
    assert not drawn.samples and scores.is_scored.tolist() == [[False]] and scores.brier.shape == (1, 1, 4)
    assert all(value.isnan().all() for value in scores.means().values())
    scores = score_texts(model, IDS[:, :5], num_samples=3)
    assert scores.patches[0, 1].tolist() == IDS[0, 1:5].tolist()
    assert scores.patches[0, 0, 3] == IDS[0, 0] and scores.is_scored.tolist() == [[False, True]]


def test_an_empty_text_begins_with_bos():
    model = tiny_model()
    for ids, mask in ((IDS[:, :0], None), (IDS[:, :4], torch.zeros(1, 4))):
        scores = score_texts(model, ids, attention_mask=mask, num_samples=3)
        assert scores.patches[0, 0, -1] == BOS and not scores.is_scored.any()
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match=r"^score_texts\(\) got an empty text, and the model has no bos_token_id"):
        score_texts(model, IDS[:, :0], num_samples=3)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_every_head(head_type):
    """The training flag stays, and there is no gradient."""
    model = tiny_model(head_type)
    scores = score_texts(model, IDS, num_samples=4, generator=seeded())
    again = score_texts(model.train(), IDS, num_samples=4, generator=seeded())
    other = score_texts(model, IDS, num_samples=4, generator=seeded(1))
    assert model.training and not scores.energy.requires_grad
    assert scores.energy.isfinite().all() and (scores.energy[:, 1:] != 0).all()
    assert torch.equal(scores.energy, again.energy) and not torch.equal(scores.energy, other.energy)


def test_bfloat16():
    model = few_tokens(tiny_model(), 20)
    wide = score_texts(model, IDS, num_samples=50, generator=seeded())
    narrow = score_texts(model.to(torch.bfloat16), IDS, num_samples=50, generator=seeded())
    assert narrow.energy.dtype == narrow.brier.dtype == torch.float32
    torch.testing.assert_close(narrow.energy.mean(), wide.energy.mean(), rtol=0.1, atol=0)


def test_draws_are_made_some_at_a_time(monkeypatch, drawn):
    monkeypatch.setitem(text_scores.SAMPLES_CHUNK_SIZE, "cpu", 64)
    model = drawn(few_tokens(tiny_model(patch_size=1), 20))
    scores = score_texts(model, IDS.repeat(3, 1), num_samples=10, generator=seeded())
    sizes = [samples_NmZ.shape[0] * samples_NmZ.shape[1] for samples_NmZ in drawn.samples]
    assert max(sizes) <= 64 and sum(sizes) == 3 * 23 * 10
    tokens_MNK = model.autoencoder.decode_tokens(torch.cat(drawn.samples, dim=1)).movedim(0, 1)
    hits_M = (tokens_MNK == scores.patches[scores.is_scored][:, None]).all(-1).float().mean(-1)
    assert torch.equal(scores.hits[scores.is_scored][:, 0], hits_M)  # each chunk's scores are where they belong


@pytest.mark.parametrize(
    "texts, options, message",
    [
        (TEXT, {"tokenizer": None}, r"got text: pass tokenizer=\.\.\., the model's own, or ids"),
        (TEXT, {"tokenizer": "."}, r"got text: pass tokenizer=\.\.\., the model's own, or ids"),
        ([], {}, "a list of at least one"),
        (None, {}, "takes a text"),
        ([TEXT, None], {}, "takes a text"),
        ([TEXT, "ab\ud800"], {}, "got 2 texts, of which text 2 is none at character 2: half a surrogate pair"),
        (IDS.tolist(), {}, "or ids as a tensor"),
        (IDS.float(), {}, "token ids are whole numbers"),
        (IDS[0], {}, r"a tensor of shape \(24,\)"),
        (IDS[:0], {}, "got an empty batch"),
        (IDS + 90, {}, r"got token id \d+, outside the vocabulary 0 … 95"),
        (IDS, {"attention_mask": torch.ones(1, 3)}, r"attention_mask of shape \(1, 3\), but ids of shape \(1, 24\)"),
        (IDS, {"attention_mask": [1] * 24}, "attention_mask that is a list"),
        *((IDS, {"num_samples": num}, "num_samples=.*must be a whole number of at least 2") for num in (1, 2.5, True)),
    ],
)
def test_bad_input_is_one_sentence(texts, options, message):
    options = {"tokenizer": tiny_tokenizer(), "num_samples": 3} | options
    with pytest.raises(ValueError, match=message) as error:
        score_texts(tiny_model(), texts, **options)
    assert str(error.value).startswith(("score_texts()", "num_samples=")) and "\n" not in str(error.value)
