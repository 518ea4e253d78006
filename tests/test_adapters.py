"""PEFT's LoRA, DoRA and IA3 on a CALM: what they write and what they train; virtual tokens: test_virtual_tokens.py."""

import copy

import peft
import pytest
import torch
from model_copies import ROOT
from tiny import BOS, tiny_model
from transformers import AutoTokenizer

from calm_transformers.model.modeling_calm import CALMForCausalLM

pytestmark = pytest.mark.transformers

SENTENCE = "The submarine sank to the bottom of the purple sea, and nobody was surprised."
NOT_THE_AUTOENCODER = r"autoencoder\..*"
PROMPTS = torch.tensor([[BOS, 40, 41, 42, 43, 44, 45], [95, 95, 95, BOS, 50, 51, 52]])
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])


def config_of(kind: str, *, is_new: bool = False):
    """A configuration as documented; unless it is new, its weights already say something."""
    if kind == "ia3":
        targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        return peft.IA3Config(
            task_type="CAUSAL_LM", exclude_modules=NOT_THE_AUTOENCODER, init_ia3_weights=is_new, **targets
        )
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules="all-linear",
        exclude_modules=NOT_THE_AUTOENCODER,
        use_dora=kind == "dora",
        init_lora_weights=is_new,
    )


def exact_model():
    """In float64: adapters that are merged or not differ by rounding alone, which no draw notices."""
    return tiny_model().double()


def adapted(kind: str, **kwargs) -> peft.PeftModel:
    torch.manual_seed(1)
    model = peft.get_peft_model(exact_model(), config_of(kind, **kwargs)).eval().double()
    if kind == "ia3" and not kwargs:  # its random start is far from 1, where it does nothing
        with torch.no_grad():
            [p.normal_(mean=1, std=0.5) for name, p in model.named_parameters() if "ia3_" in name]
    return model


def text_of(model, temperature: float = 0.5) -> list:
    torch.manual_seed(0)
    settings = {"max_new_tokens": 12, "num_candidates": 20, "temperature": temperature, "eos_token_id": None}
    return model.generate(input_ids=PROMPTS, attention_mask=MASK, do_sample=True, **settings)[:, 7:].tolist()


@pytest.fixture(scope="module")
def plain_text():
    return text_of(exact_model())


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
class TestAdapters:
    def test_an_adapter_changes_the_text_and_switched_off_it_does_not(self, kind, plain_text):
        model = adapted(kind)
        assert text_of(model) != plain_text
        with model.disable_adapter():
            assert text_of(model) == plain_text

    def test_merged_it_writes_the_same(self, kind):
        model = adapted(kind)
        text = text_of(model)
        merged = model.merge_and_unload()
        assert type(merged) is type(tiny_model()) and not any("lora" in n or "ia3" in n for n in merged.state_dict())
        assert text_of(merged) == text

    @pytest.mark.parametrize("loads", ["PeftModel.from_pretrained", "model.load_adapter"])
    def test_saved_and_loaded_it_writes_the_same(self, kind, loads, tmp_path, plain_text):
        model = adapted(kind)
        model.save_pretrained(tmp_path)
        loaded = exact_model()
        if loads == "model.load_adapter":
            loaded.load_adapter(str(tmp_path))
        else:
            loaded = peft.PeftModel.from_pretrained(loaded, tmp_path)
        assert text_of(loaded.double()) == text_of(model) != plain_text

    def test_training_moves_the_adapter_alone_and_the_loss_falls(self, kind):
        torch.manual_seed(1)
        model = peft.get_peft_model(tiny_model(), config_of(kind, is_new=True)).train()
        ids = torch.randint(3, 95, (4, 16))
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)

        def loss_of():
            return model(input_ids=ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss

        first = loss_of().item()
        for _ in range(10):
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()
        assert loss_of().item() < 0.99 * first
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == {name for name in before if "lora_" in name or "ia3_" in name}
        assert not any("autoencoder" in name for name in moved) and any(".head." in name for name in moved)


def test_all_linear_alone_enters_the_autoencoder_where_nothing_is_trained():
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    inside = [p for name, p in model.named_parameters() if "autoencoder" in name and "lora_" in name]
    assert inside, "the documented exclude_modules is for nothing"
    assert not any(p.requires_grad for p in model.train().get_base_model().autoencoder.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if ".model.layers." in name and "lora_" in name)


@pytest.mark.slow
def test_a_lora_adapter_writes_what_it_was_taught():
    """The bundled model, taught one sentence."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    model = peft.get_peft_model(CALMForCausalLM.from_pretrained(ROOT), config_of("lora", is_new=True)).train()
    batch = tokenizer([SENTENCE + tokenizer.eos_token], return_tensors="pt", padding=True, pad_to_multiple_of=2)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    prompt = tokenizer("The submarine", return_tensors="pt")

    def written(model) -> str:
        ids = model.generate(**prompt, max_new_tokens=40, do_sample=False, num_candidates=50)
        return tokenizer.decode(ids[0], skip_special_tokens=True)

    with model.disable_adapter():
        assert written(model) != SENTENCE
    assert written(model) == SENTENCE
    assert written(model.merge_and_unload()) == SENTENCE
