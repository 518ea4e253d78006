"""A new CALM begins with a Llama that exists: its layers, final norm and token embeddings.

The Llama read tokens, the CALM reads patches: positions count patches from now on, RoPE's parameters stay. The patch
embedding starts as a mean of the tokens' embeddings, by default the last one's alone, so that the first layer sees at
once what it knows: silu(x) − silu(−x) = x makes its two linear layers any linear map, and its LayerNorm gets the scale
of the embeddings. The multi-token loss begins with the Llama's output matrix, or what the backbone knows would have to
wait until a new one is learnt.

Axes: K tokens per patch, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from calm_transformers.command_line import InputError
from calm_transformers.model.heads_calm_token_chain import TokenChain
from calm_transformers.model.modeling_calm import CALMForCausalLM


def load_llama(what: str, where: str, config: LlamaConfig) -> LlamaForCausalLM:
    """The Llama that a recipe names in the field `what`, output matrix included, in the dtype of its checkpoint."""
    if getattr(config, "quantization_config", None):
        raise InputError(f"{what} {where}: its weights are quantised; name the checkpoint that they were made from.")
    try:
        llama, info = LlamaForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            where, config=config, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} {where}: its weights cannot be read: {' '.join(str(error).split())}") from error
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq")]  # of old Llamas
    for kind, keys in (("misses", info["missing_keys"]), ("has no place for", unexpected)):
        if keys:
            raise InputError(f"{what} {where}: is not what its configuration says, which {kind} {min(keys)}.")
    return llama


@torch.no_grad()
def begin_with_llama(model: CALMForCausalLM, llama: LlamaForCausalLM, decay: float) -> int:
    """Fills the backbone of a new model with the weights of a Llama of its sizes (decay: see `begin_patch_embedding`).

    Returns:
        how many tokens the Llama doesn't know, at the end of the vocabulary: they get the mean of those that it knows.
    """
    backbone, theirs = model.model, llama.model
    backbone.layers.load_state_dict(theirs.layers.state_dict())
    backbone.norm.load_state_dict(theirs.norm.state_dict())
    known_VD = take_rows(backbone.embed_tokens.weight, theirs.embed_tokens.weight)
    begin_patch_embedding(backbone.embed_proj, decay, known_VD.var(-1, unbiased=False).mean().sqrt())
    return model.config.vocab_size - len(known_VD)


@torch.no_grad()
def begin_chain(chain: TokenChain, llama: LlamaForCausalLM) -> None:
    """Gives a patch's chain of tokens what the Llama has: at first each place expects the Llama's next token."""
    take_rows(chain.lm_head.weight, llama.lm_head.weight)
    for embedding in chain.embeddings:
        assert isinstance(embedding, nn.Embedding)
        take_rows(embedding.weight, llama.model.embed_tokens.weight)
    size = chain.context_proj.in_features
    chain.context_proj.weight.copy_(torch.eye(size).repeat(chain.patch_size, 1))
    chain.context_proj.bias.zero_()
    # The chain takes the scale of the Llama's final norm off its hidden states.
    chain.norm_out.weight.fill_(llama.model.norm.weight.float().square().mean().sqrt())


def take_rows(ours_VD: Tensor, theirs_VD: Tensor) -> Tensor:
    """Fills a matrix with the Llama's rows, those of tokens that it doesn't know with their mean.

    Returns:
        the rows of the tokens that it knows, in place.
    """
    known_VD = ours_VD[: len(theirs_VD)]
    known_VD.copy_(theirs_VD[: len(ours_VD)])
    ours_VD[len(known_VD) :] = known_VD.mean(0)
    return known_VD


@torch.no_grad()
def begin_patch_embedding(embed_proj: nn.Sequential, decay: float, scale: Tensor | float) -> None:
    """Makes the patch embedding the LayerNorm of a weighted mean of its tokens' embeddings, times a scale.

    Args:
        embed_proj: `CALMModel`'s.
        decay: how much less a token counts than the one behind it, from 0, the last alone, to 1, all alike.
        scale: root mean square of the outputs.
    """
    expand, _, reduce, norm = embed_proj
    assert isinstance(expand, nn.Linear) and isinstance(reduce, nn.Linear) and isinstance(norm, nn.LayerNorm)
    size = reduce.out_features
    weights_K = decay ** torch.arange(expand.in_features // size - 1, -1, -1.0)
    identity = torch.eye(size)
    mean = torch.kron(weights_K / weights_K.sum(), identity)  # (D, K·D)
    expand.weight.copy_(torch.cat([mean, -mean]))
    reduce.weight.copy_(torch.cat([identity, -identity], dim=1))
    for bias in (expand.bias, reduce.bias, norm.bias):
        bias.zero_()
    norm.weight.fill_(scale)
