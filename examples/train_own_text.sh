#!/bin/sh
# Trains a CALM on your own text (1.5 MB or more: .txt, .jsonl or .parquet), from tokenizer to model, and continues a prompt.
#
#     sh examples/train_own_text.sh my-text.txt                     # ten minutes; docs/tutorial.md explains it
#     sh examples/train_own_text.sh my-text.txt --max_steps 20      # only to see it run
#
# Other options are fields of the recipe, for the autoencoder and the model. Each result is a folder in runs/, and
# the same command resumes an interrupted training.
set -e
if [ $# -eq 0 ]; then
    echo "usage: sh $0 TEXT [--max_steps N] [--FIELD VALUE …]" >&2
    exit 2
fi
text=$1
shift

calm train tokenizer --recipe small --train_files "$text"
calm train autoencoder --recipe small --train_files "$text" "$@"
calm train calm --recipe small --train_files "$text" "$@"
calm generate runs/small "${PROMPT:-Once upon a time}" --max_new_tokens 80
