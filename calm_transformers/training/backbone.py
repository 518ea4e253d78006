"""Initialises a CALM's backbone from a pretrained Llama: its layers, final norm and token embeddings are copied.

Positions count patches instead of tokens; RoPE's parameters stay. The patch embedding starts as a weighted mean of the
token embeddings, by default the last token's alone, so that the first layer's inputs resemble the Llama's: since
silu(x) − silu(−x) = x, its two linear layers can be any linear map, and its LayerNorm gets the embeddings' scale.
The MTP loss gets the Llama's output matrix, so that it needn't learn a new one.

Axes: K tokens per patch, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from calm_transformers.command_line import InputError
from calm_transformers.model.heads_calm_token_chain import TokenChain
from calm_transformers.model.modeling_calm import CALMForCausalLM


def load_llama(field: str, source: str, config: LlamaConfig) -> LlamaForCausalLM:
    """Loads the Llama `source` that a recipe's `field` names, with its output matrix, in the checkpoint's dtype."""
    if getattr(config, "quantization_config", None):
        raise InputError(f"{field} {source}: its weights are quantised; name the unquantised checkpoint.")
    try:
        llama, info = LlamaForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            source, config=config, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{field} {source}: its weights cannot be read: {' '.join(str(error).split())}") from error
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")]  # in old Llamas
    for problem, keys in (("missing", info["missing_keys"]), ("unexpected", unexpected)):
        if keys:
            raise InputError(f"{field} {source}: the weights don't match config.json: {problem} {min(keys)}.")
    return llama


@torch.no_grad()
def init_from_llama(model: CALMForCausalLM, llama: LlamaForCausalLM, decay: float) -> int:
    """Copies the weights of a Llama of the same sizes to the backbone (decay: see `init_patch_embedding`).

    Returns:
        the number of tokens that the Llama doesn't know, at the end of the vocabulary; they get the mean embedding.
    """
    backbone, source = model.model, llama.model
    backbone.layers.load_state_dict(source.layers.state_dict())
    backbone.norm.load_state_dict(source.norm.state_dict())
    known_VD = copy_rows(backbone.embed_tokens.weight, source.embed_tokens.weight)
    init_patch_embedding(backbone.embed_proj, decay, known_VD.var(-1, unbiased=False).mean().sqrt())
    return model.config.vocab_size - len(known_VD)


@torch.no_grad()
def init_chain_from_llama(chain: TokenChain, llama: LlamaForCausalLM) -> None:
    """Initialises the MTP model so that every position of the patch predicts the Llama's next token."""
    copy_rows(chain.lm_head.weight, llama.lm_head.weight)
    for embedding in chain.embeddings:
        assert isinstance(embedding, nn.Embedding)
        copy_rows(embedding.weight, llama.model.embed_tokens.weight)
    hidden_size = chain.context_proj.in_features
    chain.context_proj.weight.copy_(torch.eye(hidden_size).repeat(chain.patch_size, 1))
    chain.context_proj.bias.zero_()
    # The chain's input norm removes the scale of the Llama's final norm from the hidden states.
    chain.norm_out.weight.fill_(llama.model.norm.weight.float().square().mean().sqrt())


def copy_rows(target_VD: Tensor, source_VD: Tensor) -> Tensor:
    """Copies `source_VD` to the first rows of `target_VD`, fills its other rows with their mean, returns the first."""
    known_VD = target_VD[: len(source_VD)]
    known_VD.copy_(source_VD[: len(target_VD)])
    target_VD[len(known_VD) :] = known_VD.mean(0)
    return known_VD


@torch.no_grad()
def init_patch_embedding(embed_proj: nn.Sequential, decay: float, scale: Tensor | float) -> None:
    """Makes the patch embedding the LayerNorm of a weighted mean of its tokens' embeddings, times a scale.

    Args:
        embed_proj: `CALMModel.embed_proj`, whose weights are set.
        decay: weight of a token relative to the next one; 0 takes the last token alone, 1 the plain mean.
        scale: root mean square of the outputs.
    """
    expand, _, reduce, norm = embed_proj
    assert isinstance(expand, nn.Linear) and isinstance(reduce, nn.Linear) and isinstance(norm, nn.LayerNorm)
    hidden_size = reduce.out_features
    weights_K = decay ** torch.arange(expand.in_features // hidden_size - 1, -1, -1.0)
    identity = torch.eye(hidden_size)
    mean = torch.kron(weights_K / weights_K.sum(), identity)  # (D, K·D)
    expand.weight.copy_(torch.cat([mean, -mean]))  # silu(x) − silu(−x) = x
    reduce.weight.copy_(torch.cat([identity, -identity], dim=1))
    for bias in (expand.bias, reduce.bias, norm.bias):
        bias.zero_()
    norm.weight.fill_(scale)
