"""Continues a prompt: with a pipeline, with generate() at several temperatures, and streamed patch by patch.

    python examples/first_text.py --prompt "One day, a small dog"

At temperature 1 the text is a sample of the model; it becomes fluent around 0.5 and below.
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline, set_seed

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(Path(__file__).parents[1]), help="folder or Hub id of a CALM")
parser.add_argument("--prompt", default="Once upon a time")
parser.add_argument("--max_new_tokens", type=int, default=60)
args = parser.parse_args()

model: Any = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)

set_seed(0)
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
text = generator(args.prompt, max_new_tokens=args.max_new_tokens, do_sample=True, temperature=0.5)[0]["generated_text"]
print(f"Pipeline: {text}\n")

inputs = tokenizer(args.prompt, return_tensors="pt")
settings = {"max_new_tokens": args.max_new_tokens, "do_sample": True}
for temperature in (1.0, 0.5, 0.25):
    ids = model.generate(**inputs, **settings, temperature=temperature)
    print(f"T = {temperature}: {tokenizer.decode(ids[0], skip_special_tokens=True)}\n")

print("Streamed: ", end="")
model.generate(**inputs, **settings, temperature=0.5, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
