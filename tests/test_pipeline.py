"""The text-generation pipeline on a CALM, as users call it."""

import pytest
import torch
from tiny import BOS, EOS, HEAD_TYPES, PAD, tiny_model, tiny_tokenizer
from transformers import pipeline, set_seed

pytestmark = pytest.mark.transformers

CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
FAST = {"do_sample": True, "temperature": 0.5, "num_candidates": 20, "max_new_tokens": 6, "eos_token_id": None}


@pytest.fixture(scope="module", params=HEAD_TYPES)
def generator(request):
    return pipeline("text-generation", model=readable_model(request.param), tokenizer=tiny_tokenizer())


def readable_model(head_type):
    """One that writes characters only, none of the special tokens that a decoded text leaves out."""
    model, special = tiny_model(head_type), torch.tensor([0, BOS, EOS, PAD])
    if model.head.samples_tokens:
        chain = model.head.chain
        chain.lm_head.register_forward_hook(lambda _layer, _inputs, logits: logits.index_fill(-1, special, -1e9))
    else:
        with torch.no_grad():
            model.autoencoder.decoder.lm_head.weight[special] = 0
    return model


def call(generator, *args, seed=0, **kwargs):
    set_seed(seed)
    return generator(*args, **{**FAST, **kwargs})


def test_text_in_text_out(generator):
    (output,) = call(generator, "The key to life is")
    assert output["generated_text"].startswith("The key to life is")
    assert len(output["generated_text"]) == len("The key to life is") + 6  # a token is a character
    (only_new,) = call(generator, "The key to life is", return_full_text=False)
    assert "The key to life is" + only_new["generated_text"] == output["generated_text"]
    assert call(generator, "The key to life is", seed=1) != [output]


def test_batches(generator):
    prompts = ["one", "two and more", "3"]
    alone = [call(generator, prompt, do_sample=False) for prompt in prompts]
    assert [len(o[0]["generated_text"]) - len(p) for o, p in zip(alone, prompts, strict=True)] == [6, 6, 6]
    for batch_size in (2, 3):
        assert call(generator, prompts, batch_size=batch_size, do_sample=False) == alone


def test_tensors_sequences_and_chat(generator):
    (output,) = call(generator, "one", return_tensors=True)
    assert len(output["generated_token_ids"]) == 1 + 3 + 6
    several = call(generator, "one", num_return_sequences=3, temperature=1.0)
    assert len(several) == 3 and len({o["generated_text"] for o in several}) > 1
    generator.tokenizer.chat_template = CHAT_TEMPLATE
    (output,) = call(generator, [{"role": "user", "content": "Tell me a story."}])
    assert output["generated_text"][-1]["role"] == "assistant"
    assert len(output["generated_text"][-1]["content"]) == 6
    (output,) = call(generator, "", return_tensors=True)
    assert len(output["generated_token_ids"]) == 1 + 6


def test_defaults_sample_at_a_temperature_that_is_no_1_over_n(generator):
    """Without a temperature the pipeline's own 0.7 or the model's comes through; both must work."""
    set_seed(0)
    (output,) = generator("one", do_sample=True, max_new_tokens=4, num_candidates=20)
    assert output["generated_text"].startswith("one")


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_bfloat16(head_type):
    """The text is what the model itself generates from the same ids and seed; it is no repetition of one token."""
    model, tokenizer = readable_model(head_type).to(torch.bfloat16), tiny_tokenizer()
    (output,) = call(pipeline("text-generation", model=model, tokenizer=tokenizer), "one", max_new_tokens=20)
    set_seed(0)
    ids = model.generate(**tokenizer("one", return_tensors="pt").to(model.device), **FAST | {"max_new_tokens": 20})
    assert output["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert len(ids[0]) == 4 + 20 and len(set(ids[0, 4:].tolist())) > 4
