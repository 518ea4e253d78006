#!/usr/bin/env bash
# Trains a recipe on all GPUs of this machine, or on $NPROC processes; the same command resumes:
#   launch/torchrun.sh calm --recipe calm-m --tokenizer DIR --autoencoder DIR --train_files tokens
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds for a checkpoint after SIGTERM; torchrun's default is 30
exec torchrun --standalone --nproc_per_node "${NPROC:-gpu}" -m calm_transformers.training.train "$@"
