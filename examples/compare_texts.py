"""Encodes texts to latent vectors, decodes them, and compares, mixes and disturbs the vectors.

    python examples/compare_texts.py --patches " little girl" " little boy" " big girl"

The autoencoder packs each patch of K tokens into one vector, without looking at the patches around it: vectors are
similar where patches share tokens, not meanings. It decodes noisy vectors, because the head's samples are inexact.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

from calm_transformers.evaluation.autoencoder_report import load_autoencoder
from calm_transformers.loading import load_tokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", default=str(Path(__file__).parents[1]), help="folder or Hub id of a CALM or autoencoder"
)
parser.add_argument("--text", default="Once upon a time, there was a little girl named Lily.")
parser.add_argument("--patches", nargs="+", default=[" little girl", " little boy", " big girl", " sad."])
args = parser.parse_args()

autoencoder, tokenizer = load_autoencoder(args.model), load_tokenizer(args.model)
K = autoencoder.config.patch_size


@torch.no_grad()
def encode(text: str) -> torch.Tensor:
    """Returns the mean latent vector of each patch, (patches, Z)."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids += [tokenizer.eos_token_id] * (-len(ids) % K)  # completes the last patch
    return autoencoder.encode(torch.tensor([ids]))[0][0]


def decode(latents: torch.Tensor) -> str:
    return tokenizer.decode(autoencoder.decode_tokens(latents).flatten(), skip_special_tokens=True)


latents, noise = encode(args.text), torch.Generator().manual_seed(0)
print(f"{len(args.text)} characters in {len(latents)} vectors of {latents.shape[1]} numbers, decoded with noise:")
for sigma in (0.0, 0.5, 1.0, 2.0):
    print(f"  σ = {sigma}: {decode(latents + sigma * torch.randn(latents.shape, generator=noise))!r}")

vectors = torch.stack([encode(text)[0] for text in args.patches])
print("\nCosine similarity of patches:")
for text, row in zip(args.patches, cosine_similarity(vectors[:, None], vectors, dim=-1), strict=True):
    print(f"  {text!r:16}", *(f"{value:6.2f}" for value in row))

print("\nBetween the first and the last patch:")
for share in torch.linspace(0, 1, 6):
    print(f"  {share:.1f}: {decode(torch.lerp(vectors[0], vectors[-1], share))!r}")
