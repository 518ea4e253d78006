"""Prints the candidates that each patch of a text was chosen from: how often each was sampled, and its weight.

    python examples/inspect_patches.py --prompt "Once upon a time" --html patches.html

`--html` also writes the page of `calm inspect`, with the prompt's patches and a slider for the temperature.
"""

import argparse
from pathlib import Path

import torch

from calm_transformers.loading import load_calm
from calm_transformers.pages.inspect_text import inspect_text, write_page

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(Path(__file__).parents[1]), help="folder or Hub id of a CALM")
parser.add_argument("--prompt", default="Once upon a time")
parser.add_argument("--max_new_tokens", type=int, default=20)
parser.add_argument("--html", type=Path, help="file of the page")
args = parser.parse_args()

model, tokenizer = load_calm(args.model, device="cpu")
inputs = tokenizer(args.prompt, return_tensors="pt")
output = model.generate(
    **inputs,
    max_new_tokens=args.max_new_tokens,
    do_sample=True,
    temperature=0.5,
    sampling_method="batch",  # samples 200 candidates a step and weights them, whatever the head
    generator=torch.Generator().manual_seed(0),
    return_dict_in_generate=True,
    output_scores=True,
)
print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))

for step, scores in enumerate(output.scores, start=1):  # the tensors' first axis is the batch
    print(f"\nPatch {step}, of {scores.counts[0].sum()} samples:")
    chosen = int(scores.chosen[0])
    for i in sorted({*range(min(4, len(scores.patches[0]))), chosen}):  # by descending weight
        text = tokenizer.decode(scores.patches[0, i])
        mark = ">" if i == chosen else " "
        print(f"{mark} {text!r:24} sampled {scores.counts[0, i]:3} times, weight {scores.weights[0, i]:.3f}")

log_weights = model.compute_patch_scores(output.scores)  # (batch, steps)
print(f"\nMean weight of the chosen patches: {log_weights.exp().mean():.3f}")

if args.html:
    inspection = inspect_text(model, tokenizer, args.prompt, args.max_new_tokens, seed=0, temperature=0.5)
    inspection.model = args.model
    write_page(args.html, inspection)
