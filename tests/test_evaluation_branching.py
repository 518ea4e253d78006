"""Tree attention over all branches equals a separate forward pass per continuation."""

import warnings

import pytest
import torch
from tiny import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from calm_transformers.evaluation.ar_estimator import causal_lm_reader
from calm_transformers.evaluation.branching import CalmReader, CausalLMReader, UncachedReader

V, L = 11, 12
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)


def llama(attention="sdpa", **sizes):
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | HEADS | sizes))
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=L)).eval()


def mistral(window):
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, **HEADS, initializer_range=0.3, sliding_window=window)).eval()


@pytest.mark.parametrize("model", [llama, lambda: llama("eager"), gpt2], ids=["sdpa", "eager", "gpt2"])
def test_tree_attention_equals_separate_forward_passes(model):
    """Two steps of branches with shared, forked and dropped parents, twice on the same block."""
    model = model()
    tokens = torch.randint(V, (2, L), generator=torch.Generator().manual_seed(1))
    tree, uncached = CausalLMReader(model), UncachedReader(model)
    torch.testing.assert_close(tree.read(tokens), uncached.read(tokens))
    for positions in ([[0, 3, 7], [1, 1, 9]], [[5], [8]]):
        positions = torch.tensor(positions)
        tree.start(positions)
        uncached.start(positions)
        parents = torch.zeros_like(positions)
        for step in range(2):
            ids = (positions + step) % V
            torch.testing.assert_close(tree.extend(parents, ids), uncached.extend(parents, ids), atol=1e-5, rtol=1e-4)
            parents = torch.arange(positions.shape[1]).flip(0).expand_as(positions)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_calm_branches_equal_a_plain_forward_pass(patch_size):
    """Branches with the block's own patches have the block's hidden states."""
    autoencoder = {"vocab_size": V}
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = tiny_model(patch_size=patch_size, vocab_size=V, autoencoder_config=autoencoder, **ids)
    patches = torch.randint(V, (2, 8, patch_size), generator=torch.Generator().manual_seed(1))
    reader = CalmReader(model)
    states = reader.read(patches)
    torch.testing.assert_close(states, model.model(input_ids=patches.flatten(1)).last_hidden_state)
    reader.start(torch.tensor([[0, 5], [2, 2]]))
    branches = torch.tensor([[0, 1], [0, 1]])
    first = reader.extend(branches, torch.stack([patches[0, [1, 6]], patches[1, [3, 3]]]))
    torch.testing.assert_close(first, torch.stack([states[0, [1, 6]], states[1, [3, 3]]]), atol=1e-5, rtol=1e-4)
    second = reader.extend(branches, torch.stack([patches[0, [2, 7]], patches[1, [4, 4]]]))
    torch.testing.assert_close(second, torch.stack([states[0, [2, 7]], states[1, [4, 4]]]), atol=1e-5, rtol=1e-4)
    assert reader.draw(second, 3).shape == (3, 2, 2, patch_size)


def test_fallback_without_support_for_tree_attention():
    """With a sliding window shorter than the block, a 4D mask would extend the attention of branches."""
    tokens = torch.randint(V, (1, L), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(causal_lm_reader(mistral(window=64), tokens), CausalLMReader)
    with pytest.warns(UserWarning, match="MistralForCausalLM does not support tree attention"):
        assert isinstance(causal_lm_reader(mistral(window=3), tokens), UncachedReader)
