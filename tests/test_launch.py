"""The files in launch/, with tiny sizes and gloo: torchrun, accelerate, and slurm with a requeue."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import RECIPES, log_of

LAUNCH = Path(__file__).parents[1] / "launch"
pytestmark = pytest.mark.slow
SRUN = """#!/usr/bin/env bash
for SLURM_PROCID in 0 1; do
    export SLURM_PROCID; SLURM_LOCALID=$SLURM_PROCID SLURM_NTASKS=2 "$@" &
done
jobs -p > "$(dirname "$0")/tasks"
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""


@pytest.fixture
def start(workshop, tmp_path):
    """Starts a command with the fields of a tiny training, its output in the file `log`."""
    environment = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"NPROC": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_PORT": "29511", "PYTHONPATH": str(LAUNCH.parent)}

    def start(*words: str, **fields) -> subprocess.Popen:
        fields = {**workshop, "output_dir": tmp_path / "run", "eval_strategy": "no", **fields}
        words += ("calm", "--recipe", str(RECIPES / "calm.yaml"))
        words += tuple(str(word) for name, value in fields.items() for word in (f"--{name}", value))
        with open(tmp_path / "log", "a") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, env=environment)

    return start


@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_two_processes_on_one_machine(start, tmp_path, name):
    config = ["--config_file", str(LAUNCH / "fsdp2.yaml"), "--cpu", "--num_processes", "2", "--mixed_precision", "no"]
    accelerate = ["accelerate", "launch", *config, "-m", "calm_transformers.training.train"]
    process = start(*([str(LAUNCH / "torchrun.sh")] if name == "torchrun" else accelerate))
    assert process.wait(180) == 0, (tmp_path / "log").read_text()[-3000:]
    assert [entry["step"] for entry in log_of(tmp_path / "run") if "loss" in entry] == [1, 2, 3, 4]


def test_slurm_saves_requeues_and_resumes(start, tmp_path):
    control = f'#!/bin/sh\necho 127.0.0.1; echo "$@" >> {tmp_path}/calls'
    for name, content in {"srun": SRUN, "scontrol": control}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    log, fields = tmp_path / "log", {"max_steps": 400, "save_steps": 1000}
    process = start("bash", str(LAUNCH / "slurm.sbatch"), **fields)
    deadline = time.monotonic() + 120
    while "'loss'" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    for task in (tmp_path / "tasks").read_text().split():  # as slurm does
        os.kill(int(task), signal.SIGTERM)
    assert process.wait(60) == 75, log.read_text()[-3000:]
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "requeue 7"
    assert start("bash", str(LAUNCH / "slurm.sbatch"), **fields | {"max_steps": 400}).wait(120) == 0
    assert "resuming from checkpoint-" in log.read_text() and (tmp_path / "run" / "model.safetensors").exists()
