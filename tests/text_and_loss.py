"""Outputs to compare two equivalent models by: sampled sequences at T = 0.5 and a loss."""

import torch
from tiny import BOS, PAD


def some_ids(batch_size=2, length=24, seed=0):
    return torch.randint(3, PAD, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def text_and_loss(model, **settings):
    """Returns sampled ids of two prompts, one padded, and a loss, both with fixed seeds."""
    torch.manual_seed(0)
    settings = {"temperature": 0.5, "num_candidates": 20, "max_new_tokens": 24, "eos_token_id": None, **settings}
    prompts = torch.tensor([[BOS, 10, 11, 12, 13], [PAD, PAD, BOS, 14, 15]])
    ids = model.generate(prompts, attention_mask=(prompts != PAD).long(), do_sample=True, **settings)
    labels, generator = some_ids(), torch.Generator().manual_seed(0)
    return ids.tolist(), model(some_ids(), labels=labels, generator=generator).loss.item()


def moved_by_training(model, num_steps, learning_rate, **inputs):
    """Trains on one batch; returns the names of the changed weights, the first and the last loss."""
    before, losses = {name: tensor.clone() for name, tensor in model.state_dict().items()}, []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(num_steps + 1):
        optimizer.zero_grad()
        torch.manual_seed(0)
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        if len(losses) <= num_steps:
            optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    return moved, losses[0].item(), losses[-1].item()
