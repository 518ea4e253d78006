"""Trains a head to sample at a temperature itself, and generates at T = 0.5 with one sample a step.

    python examples/distil_temperature.py stories.txt --output distilled

The paper's heads (energy, flow, diffusion) know no probabilities: below T = 1 they sample up to 200 candidates a step,
until they are distilled. The demo's head has probabilities and needs no distillation, so here it teaches a new energy
head, which writes worse than its teacher; after 300 steps it writes words, but no sentences. The text should be like
that of the model's training.
"""

import argparse
import subprocess
from pathlib import Path

from transformers import set_seed

from calm_transformers.loading import load_calm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", help=".txt, .jsonl or .parquet")
parser.add_argument("--model", default=str(Path(__file__).parents[1]), help="folder or Hub id of a CALM")
parser.add_argument(
    "--head_type", default="energy", help="the model's own head, if it is flow or diffusion; or energy"
)
parser.add_argument("--output", default="distilled", help="folder of the new model")
parser.add_argument("--max_steps", default="300", help="default: 300; the recipe has 1,500")
args = parser.parse_args()

recipe = ["--recipe", "distil-temperature", "--init_from", args.model, "--train_files", args.text]
options = ["--head_type", args.head_type, "--max_steps", args.max_steps, "--output_dir", args.output]
subprocess.run(["calm", "train", "calm", *recipe, *options], check=True)

model, tokenizer = load_calm(args.output, device="cpu")
inputs = tokenizer("Once upon a time", return_tensors="pt")
for method in ("auto", "batch"):  # the distilled head's own T = 0.5, and 200 candidates at T = 1, weighted
    set_seed(0)
    output = model.generate(
        **inputs,
        max_new_tokens=40,
        do_sample=True,
        temperature=0.5,
        sampling_method=method,
        return_dict_in_generate=True,
        output_scores=True,
    )
    samples = output.scores[0].counts.sum()
    print(f"{samples} sample(s) a step: {tokenizer.decode(output.sequences[0], skip_special_tokens=True)}\n")
