"""Counts the words in a model's continuations of a prompt that don't occur in a reference text.

    calm evaluate invented_words --model MODEL --text TRAINING_TEXT --temperature 0.5 1

Models with subword tokens, or that sample several tokens at once, can misspell; this measures how often. Words are
runs of letters and apostrophes, case-insensitive; the last word of a continuation is ignored: it may be truncated.

`--judge` names another model with logits, whose log-likelihood of the continuations is told, in nats per character.
"""

import argparse
import re
import sys
from collections.abc import Iterable

import torch
from transformers import set_seed

from calm_transformers.command_line import Parser, command, known_errors, positive, seed_number, utf8, writable
from calm_transformers.documents import expand_paths, read_documents, total_bytes
from calm_transformers.evaluation.report import write_json
from calm_transformers.loading import is_calm, load_with_tokenizer
from calm_transformers.model.generation_calm_samplers import SAMPLING_METHODS
from calm_transformers.model.modeling_calm import NO_LOGITS
from calm_transformers.progress import print_above_bars, progress_bar

PROMPT = "Once upon a time, there was a little girl named Lily."
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


def words_of(text: str) -> list[str]:
    """Returns the words in lower case, with straight apostrophes."""
    return WORD.findall(text.lower().replace("\u2019", "'"))


def vocabulary_of(documents: Iterable[str]) -> set[str]:
    return {word for document in documents for word in words_of(document)}


def invented(texts: list[str], known: set[str]) -> tuple[list[str], int]:
    """Returns the words of the texts that are not in `known`, in order, and the total number of words."""
    words = [word for text in texts for word in words_of(text)[:-1]]
    return [word for word in words if word not in known], len(words)


@torch.no_grad()
def continuations(model, tokenizer, prompt: str, num_texts: int, seed: int, **options) -> list[str]:
    """Samples `num_texts` continuations of the prompt in one batch and returns them without the prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.repeat(num_texts, 1).to(model.device)
    set_seed(seed)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, **options)
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def log_likelihood(judge, tokenizer, prompt: str, texts: list[str]) -> float:
    """Returns the judge's log-likelihood of the continuations given the prompt, in nats per character."""
    total, start = 0.0, len(tokenizer(prompt).input_ids)
    for text in texts:
        ids = tokenizer(prompt + text, return_tensors="pt").input_ids.to(judge.device)
        log_p = judge(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])
        total += log_p[start - 1 :].sum().item()
    return total / max(1, sum(map(len, texts)))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("calm evaluate invented_words", __doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a CALM or another causal LM")
    parser.add_argument("--text", required=True, nargs="+", help="files of the reference text")
    parser.add_argument("--judge", help="folder or Hub id of a causal LM, or a CALM with the head token_chain")
    parser.add_argument("--prompt", type=utf8, default=PROMPT)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.5])
    parser.add_argument("--num_candidates", type=positive, help="for a CALM (default: the model's own)")
    parser.add_argument("--sampling_method", choices=SAMPLING_METHODS, help="for a CALM (default: the model's own)")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--repetition_penalty", type=float)
    parser.add_argument("--no_repeat_ngram_size", type=positive)
    parser.add_argument("--num_texts", type=positive, default=16)
    parser.add_argument("--max_new_tokens", type=positive, default=160)
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--json", type=writable, help="write the results")
    args = parser.parse_args(argv)
    for temperature in args.temperature:
        if temperature <= 0:
            parser.error(f"--temperature {temperature:g}: must be positive")
    return args


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with known_errors():
        model, tokenizer = load_with_tokenizer(args.model)
        options = {"top_k": 0, "top_p": 1.0}  # no truncation
        if is_calm(model):
            names = ("num_candidates", "sampling_method")
            options = {name: getattr(args, name) for name in names if getattr(args, name)}
            for temperature in args.temperature:  # raises for invalid settings
                model.patch_sampling(do_sample=True, temperature=temperature, **options)
        judge = load_with_tokenizer(args.judge) if args.judge else None
        if judge and is_calm(judge[0]) and not judge[0].head.samples_tokens:
            raise ValueError(f"--judge {args.judge}: {NO_LOGITS}")
        files = expand_paths(args.text)
        with progress_bar(None, "Reading", "B", total_bytes(files)) as bar:
            known = vocabulary_of(read_documents(files, bar=bar))
    options |= {"max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    for name in ("top_p", "repetition_penalty", "no_repeat_ngram_size"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    rows = []
    print("| T | words | invented | fraction | judge | examples |\n| --- | --- | --- | --- | --- | --- |")
    for temperature in progress_bar(args.temperature, "Generating", "temperature"):
        sampling = {"temperature": temperature, **options}
        with known_errors(ValueError):  # settings of the model's generation_config.json
            texts = continuations(model, tokenizer, args.prompt, args.num_texts, args.seed, **sampling)
        new, count = invented(texts, known)
        judged = log_likelihood(*judge, args.prompt, texts) if judge else None
        row = {"temperature": temperature, "words": count, "invented": len(new), "judge": judged, "examples": new}
        rows.append(row)
        fraction = f"{len(new) / max(count, 1):.1%}"
        cells = [f"{temperature:g}", f"{count}", f"{len(new)}", fraction, "" if judged is None else f"{judged:.3f}"]
        print_above_bars(f"| {' | '.join([*cells, ', '.join(new[:8])])} |")
    write_json(args.json, rows)


if __name__ == "__main__":
    sys.exit(main())
