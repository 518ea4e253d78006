"""Records losses and gradient norms of the first steps of each training.

    python tests/trajectories.py

writes trajectories.json in this folder, or the file given as argument. test_trajectories.py compares every run with
it, so record again only if a change of training is intended, and give the reason in the commit. Both supported
versions of transformers give the same gradient norms, and a CPU without AVX the same to 2e-6.
"""

import json
import sys
import tempfile
from pathlib import Path

from training_helpers import log_of, make_workshop, train

RECORD = Path(__file__).with_suffix(".json")
# Large steps, so that five show a small change of any of these; with gradient accumulation and clipping.
SETTINGS = {
    **{"max_steps": 5, "gradient_accumulation_steps": 2, "warmup_steps": 2, "max_grad_norm": 0.2},
    **{"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "adam_beta2": 0.95, "weight_decay": 10.0, "seed": 1},
    **{"eval_strategy": "no", "save_strategy": "no", "use_cpu": True},
}
RUNS = {
    "autoencoder": ("autoencoder", {"kl_clamp": 0.01, "kl_weight": 0.1}),  # so that the KL term has a gradient
    **{head: ("calm", {"head_type": head}) for head in ("energy", "flow", "diffusion", "token_chain")},
    "auxiliary": ("calm", {"head_type": "energy", "auxiliary_weight": 0.5}),
    "ar": ("ar", {}),
}


def workshop(folder: Path) -> dict:
    """Makes a corpus, a tokenizer and an untrained autoencoder, whose training is a run of its own."""
    return make_workshop(folder, max_steps=1, learning_rate=0.0, weight_decay=0.0, use_cpu=True, eval_strategy="no")


def first_steps(run: str, fields: dict, output_dir: Path, **changes) -> dict[str, list[float]]:
    """Returns the losses and gradient norms of a run; `changes` override `SETTINGS` and `RUNS`."""
    kind, options = RUNS[run]
    if kind != "calm":
        fields = {name: value for name, value in fields.items() if name != "autoencoder"}
    settings = {**fields, **SETTINGS, **options, **changes}
    assert train(kind, output_dir=output_dir, **settings) == 0
    steps = [entry for entry in log_of(output_dir) if "loss" in entry]
    return {name: [entry[name] for entry in steps] for name in ("loss", "grad_norm")}


def record(path: Path = RECORD) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fields = workshop(folder)
        trajectories = {run: first_steps(run, fields, folder / f"run-{run}") for run in RUNS}
    path.write_text(json.dumps(trajectories, indent=2) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]) if sys.argv[1:] else RECORD)
