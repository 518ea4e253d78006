"""Two processes, replicated (DDP) or sharded (FSDP2), follow the trajectory of one."""

from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from training_helpers import log_of, same_noise_for_every_patch, start_training_together, train

from calm_transformers.model.modeling_calm import CALMForCausalLM

# With this epsilon Adam doesn't amplify rounding errors of gradients near zero.
PLAIN = {"adam_epsilon": 0.01, "lr_scheduler_type": "constant", "eval_strategy": "no"}
FSDP = {"fsdp": "true", "fsdp_config": "{version: 2, transformer_layer_cls_to_wrap: [LlamaDecoderLayer]}"}
SHARDED = "{version: 2, transformer_layer_cls_to_wrap: [LlamaDecoderLayer], state_dict_type: SHARDED_STATE_DICT}"
WHOLE_PARTS = {"fsdp": "true", "fsdp_config": "{version: 2}"}  # head and autoencoder are sharded as units, too
# Trainer 5.17 can't load the unsharded optimizer of several processes that compute on CPUs; on GPUs it can.
LOADS_ON_CPU = Version(transformers.__version__) >= Version("5.18")


def run(log: Path, num_processes: int = 2, **fields) -> None:
    processes = start_training_together(log, "calm", num_processes=num_processes, **fields)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == num_processes * [0], log.read_text()[-3000:]


def losses(folder: Path) -> list[list[float]]:
    names = ("loss", "auxiliary_loss", "grad_norm")
    return [[entry[name] for name in names if name in entry] for entry in log_of(folder) if "loss" in entry]


@pytest.mark.parametrize(
    "sharding, own, is_slow",
    [
        pytest.param({}, {"auxiliary_weight": 0.5}, False, id="ddp"),
        pytest.param({}, {}, True, id="ddp-resumed", marks=pytest.mark.slow),
        pytest.param(FSDP, {"auxiliary_weight": 0.5}, True, id="fsdp2-auxiliary", marks=pytest.mark.slow),
        pytest.param(WHOLE_PARTS, {}, True, id="fsdp2", marks=pytest.mark.slow),
    ],
)
def test_two_processes_resumed_or_not_follow_one(workshop, tmp_path, monkeypatch, sharding, own, is_slow):
    fields = {**workshop, **PLAIN, **own}
    same_noise_for_every_patch(monkeypatch)
    one_process = tmp_path / "one"
    assert train("calm", **fields, per_device_train_batch_size=4, output_dir=str(one_process)) == 0

    fields |= {**sharding, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "two"), "save_steps": 2}
    is_resumed = is_slow and (LOADS_ON_CPU or bool(sharding))
    if is_resumed:
        run(tmp_path / "log", **fields | {"max_steps": 2})
    run(tmp_path / "log", **fields)
    assert ("resuming from checkpoint-2" in (tmp_path / "log").read_text()) == is_resumed

    expected, found = losses(one_process), losses(tmp_path / "two")
    assert len(found) == len(expected) == 4
    assert all(value == pytest.approx(wanted, rel=1e-4) for value, wanted in zip(found, expected, strict=True))
    expected, found = (load_file(folder / "model.safetensors") for folder in (one_process, tmp_path / "two"))
    assert expected.keys() == found.keys()
    assert max((expected[key] - found[key]).abs().max() for key in expected) < 1e-6
    # The exported model is one file, not sharded, with our code.
    assert isinstance(CALMForCausalLM.from_pretrained(tmp_path / "two"), CALMForCausalLM)
    assert {path.name for path in (tmp_path / "two").glob("*.py")} == {path.name for path in one_process.glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 4])
def test_sharded_checkpoints_resume_with_another_number_of_processes(workshop, tmp_path, monkeypatch, num_processes):
    """Checkpoints of torch.distributed.checkpoint (DCP)."""
    fields = {**workshop, **PLAIN, "auxiliary_weight": 0.5}
    same_noise_for_every_patch(monkeypatch)
    assert train("calm", **fields, per_device_train_batch_size=4, output_dir=str(tmp_path / "one")) == 0
    fields |= {"fsdp": "true", "fsdp_config": SHARDED, "output_dir": str(tmp_path / "two"), "save_steps": 2}
    run(tmp_path / "log", **fields | {"max_steps": 2, "per_device_train_batch_size": 2})
    assert (tmp_path / "two" / "checkpoint-2" / "pytorch_model_fsdp_0" / ".metadata").exists()
    run(tmp_path / "log", num_processes, **fields | {"per_device_train_batch_size": 4 // num_processes})
    assert "resuming from checkpoint-2" in (tmp_path / "log").read_text()
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert all(value == pytest.approx(wanted, rel=1e-4) for value, wanted in zip(found, expected, strict=True))
