"""Hidden states of patches as features: the feature-extraction pipeline, pooling by hand, sentence-transformers."""

import pytest
import torch
from model_copies import ROOT
from transformers import AutoModel, AutoTokenizer, pipeline

pytestmark = pytest.mark.transformers

K, D = 2, 256  # of the bundled model
# Of 3, 4, 5 and 12 tokens: whole patches and not, and a batch of them is padded.
TEXTS = ["The dog", "The dog ran", "The dog ran away", "Once upon a time there was a girl who had a cat."]
PADDED = {"padding": True, "pad_to_multiple_of": K}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


def test_the_pipeline_gives_a_vector_a_patch_by_one_setting(tokenizer):
    """The same alone and in a batch: left-padded, so a text's own patches stand at the end, as with any decoder."""
    extract = pipeline("feature-extraction", str(ROOT), trust_remote_code=True, device="cpu")
    together = extract(TEXTS, return_tensors=True, tokenize_kwargs=PADDED, batch_size=len(TEXTS))
    for text, among in zip(TEXTS, together, strict=True):
        alone = extract(text, return_tensors=True, tokenize_kwargs=PADDED)
        patches = -(-len(tokenizer(text).input_ids) // K)
        assert alone.shape == (1, patches, D)
        assert torch.allclose(alone[0], among.squeeze(0)[-patches:], atol=1e-4)
    (uneven, *_) = [text for text in TEXTS if len(tokenizer(text).input_ids) % K]
    with pytest.raises(ValueError, match="pad_to_multiple_of=2"):  # the model names the setting
        extract(uneven)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_pooling_by_hand_with_the_models_patch_mask(padding_side):
    tokenizer = AutoTokenizer.from_pretrained(ROOT, padding_side=padding_side)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()

    @torch.no_grad()
    def embed(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, return_tensors="pt", **PADDED)
        hidden = model(**batch).last_hidden_state
        mask = model.patch_mask(batch.attention_mask, hidden.shape[1]).unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    together = embed(TEXTS)
    for text, among in zip(TEXTS, together, strict=True):
        assert torch.allclose(embed([text])[0], among, atol=1e-4)
    assert torch.cdist(together, together).fill_diagonal_(1).min() > 0.1


class TestSentenceTransformers:
    @staticmethod
    def model(pooling: str, counts_patches: bool):
        st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers (extra [clients])")
        from sentence_transformers.base.modules.module import Module
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        class PatchMask(Module):
            """The mask by token -> by patch, of which Pooling gets the hidden states. As in docs/guides/embed.md."""

            def forward(self, features):
                patches = features["token_embeddings"].shape[1]
                features["attention_mask"] = features["attention_mask"].unflatten(1, (patches, -1)).amax(-1)
                return features

            def save(self, *args, **kwargs):
                pass

        code = dict.fromkeys(("model_kwargs", "config_kwargs", "processor_kwargs"), {"trust_remote_code": True})
        transformer = Transformer(str(ROOT), processing_kwargs={"text": {"pad_to_multiple_of": K}}, **code)
        modules = [transformer, *[PatchMask()] * counts_patches, Pooling(D, pooling)]
        return st.SentenceTransformer(modules=modules, device="cpu")

    @pytest.mark.parametrize("pooling, counts_patches", [("mean", True), ("lasttoken", True), ("lasttoken", False)])
    def test_a_text_has_the_same_embedding_alone_and_in_a_batch(self, pooling, counts_patches):
        model = self.model(pooling, counts_patches)
        together = model.encode(TEXTS, batch_size=len(TEXTS), convert_to_tensor=True)
        for text, among in zip(TEXTS, together, strict=True):
            assert torch.allclose(model.encode(text, convert_to_tensor=True), among, atol=1e-4)

    def test_the_mean_is_that_of_the_patches(self, tokenizer):
        backbone = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()
        model = self.model("mean", True)
        with torch.no_grad():
            hidden = backbone(**tokenizer(TEXTS[0], return_tensors="pt", **PADDED)).last_hidden_state
        embedding = model.encode(TEXTS, convert_to_tensor=True)[0]
        assert torch.allclose(embedding, hidden[0].mean(0), atol=1e-4)
