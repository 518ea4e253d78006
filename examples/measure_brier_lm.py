"""Measures BrierLM of a CALM and of an ordinary autoregressive LM on the same text, with 95 % intervals.

    python examples/measure_brier_lm.py held-out.txt --baseline FOLDER_OR_ID

BrierLM compares samples with the true text, so it needs no likelihoods; higher is better. Compare models of the same
tokenizer, text and block size. Without --baseline the other model is an untrained Llama, which scores about 0.
`calm evaluate brier_lm --model A B --data held-out.txt --block_size 512` does the same (docs/guides/evaluate.md).
"""

import argparse
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from calm_transformers.documents import read_documents
from calm_transformers.evaluation.blocks import pack_blocks
from calm_transformers.evaluation.models import brier_counts
from calm_transformers.loading import load_calm, load_causal_lm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", type=Path, help="held-out text: .txt, .jsonl or .parquet")
parser.add_argument("--model", default=str(Path(__file__).parents[1]), help="folder or Hub id of a CALM")
parser.add_argument("--baseline", help="folder or Hub id of any causal LM with the same tokenizer")
parser.add_argument("--block_size", type=int, default=256, help="tokens, divisible by the model's K")
args = parser.parse_args()

calm, tokenizer = load_calm(args.model, device="cpu")
if args.baseline:
    baseline = load_causal_lm(args.baseline, device="cpu")
else:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    baseline = LlamaForCausalLM(config).eval()

blocks = pack_blocks(read_documents([args.data]), tokenizer, args.block_size)
for name, model in (("CALM", calm), (args.baseline or "untrained Llama", baseline)):
    score = brier_counts(model, blocks).score()
    print(f"{name}: Brier-1 to 4", *(f"{value:.3f}" for value in score.brier), end=", ")
    low_high = "" if score.blocks == 1 else f" ({score.brierlm.low:.2f} to {score.brierlm.high:.2f})"
    print(f"BrierLM {score.brierlm.value:.2f}{low_high}, {score.positions} positions in {score.blocks} blocks")
