"""Tiny CALM models with random weights and a tokenizer, built in milliseconds, and what many tests do with them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from calm_transformers.model.configuration_calm import HEADS, CALMConfig
from calm_transformers.model.modeling_calm import CALMForCausalLM

VOCAB_SIZE = 96
BOS, EOS, PAD = 1, 2, 95
HEAD_TYPES = tuple(HEADS)
# Scale of the random net's output: with larger ones noise has no effect (flow), or values overflow (diffusion).
OUTPUT_SCALES = {"flow": 0.1, "diffusion": 0.01}
METHODS = {  # sampling settings by name
    "T = 1": {"temperature": 1.0},
    "batch": {"temperature": 0.5, "sampling_method": "batch"},
    "adaptive": {"temperature": 0.5},
    "exact": {"temperature": 0.5, "sampling_method": "exact"},
    "1/T not whole": {"temperature": 0.4},
    "T = 1.5": {"temperature": 1.5},
    "greedy": {"do_sample": False},
}


def tiny_config(head_type: str = "energy", patch_size: int = 4, **overrides) -> CALMConfig:
    common = {"vocab_size": VOCAB_SIZE, "latent_size": 16, "patch_size": patch_size}
    autoencoder = {**common, "hidden_size": 32, "intermediate_size": 64, **overrides.pop("autoencoder_config", {})}
    fields = {
        **{"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"noise_size": 8, "num_mlp_layers": 2, "num_posterior_samples": 10},
        **{"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
        "sampling_steps": {"energy": None, "diffusion": 5}.get(head_type, 3),
    }
    return CALMConfig(head_type=head_type, autoencoder_config=autoencoder, **{**common, **fields, **overrides})


def tiny_model(head_type: str = "energy", patch_size: int = 4, seed: int = 0, **overrides) -> CALMForCausalLM:
    """Returns a random model in which every weight matters: layers initialised to zero are randomised too."""
    torch.manual_seed(seed)
    model = CALMForCausalLM(tiny_config(head_type, patch_size, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
        if head_type in OUTPUT_SCALES:
            model.head.net.out_proj.weight.mul_(OUTPUT_SCALES[head_type])
    return model


def exact_model(*args, num_candidates: int = 20, **overrides) -> CALMForCausalLM:
    """Returns a tiny model in float64, where the shape of a batch changes no token; it samples by default."""
    model = tiny_model(*args, **overrides).double()
    config = model.generation_config
    config.do_sample, config.num_candidates, config._from_model_config = True, num_candidates, False
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a character tokenizer with <unk>, <s>, </s>, printable characters and <pad>; it prepends <s>."""
    characters = [chr(code) for code in range(ord(" "), ord(" ") + VOCAB_SIZE - 4)]
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS, **{c: 3 + i for i, c in enumerate(characters)}, "<pad>": PAD}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"padding_side": "left", "clean_up_tokenization_spaces": False}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **settings)


def padded(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """Returns the ids of rows of different lengths, and their attention mask."""
    width = max(map(len, rows))

    def pad(row, value):
        padding = [value] * (width - len(row))
        return padding + row if side == "left" else row + padding

    ids, mask = [pad(row, PAD) for row in rows], [pad([1] * len(row), 0) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def record_calls(monkeypatch, owner, name: str, keep=lambda output, *args, **kwargs: output) -> list:
    """Returns a list to which each call of a method appends `keep(output, *arguments)`, by default its output."""
    kept, call = [], getattr(owner, name)

    def recording(*args, **kwargs):
        output = call(*args, **kwargs)
        kept.append(keep(output, *args, **kwargs))
        return output

    monkeypatch.setattr(owner, name, recording)
    return kept


def few_tokens(model, num_tokens=3):
    """Restricts the decoder to the first `num_tokens` ids, so that samples match and collide."""
    with torch.no_grad():
        model.autoencoder.decoder.lm_head.weight[num_tokens:] = 0
    return model
