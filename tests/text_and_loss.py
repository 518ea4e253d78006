"""What two models that compute the same agree in: the texts of a batch at T = 0.5, and a loss."""

import torch
from tiny import BOS, PAD


def some_ids(batch_size=2, length=24, seed=0):
    return torch.randint(3, PAD, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def text_and_loss(model, **settings):
    """Sampled texts of two prompts, one padded, and a loss, the randomness of both fixed."""
    torch.manual_seed(0)
    settings = {"temperature": 0.5, "num_candidates": 20, "max_new_tokens": 24, "eos_token_id": None, **settings}
    prompts = torch.tensor([[BOS, 10, 11, 12, 13], [PAD, PAD, BOS, 14, 15]])
    ids = model.generate(prompts, attention_mask=(prompts != PAD).long(), do_sample=True, **settings)
    labels, generator = some_ids(), torch.Generator().manual_seed(0)
    return ids.tolist(), model(some_ids(), labels=labels, generator=generator).loss.item()
