"""Two processes that share a model's shards (FSDP2, gloo on CPUs) write what one process writes, each its own text."""

import itertools

import pytest
import torch
import torch.distributed as dist
from tiny import BOS, few_tokens, seeded, tiny_model

pytestmark = pytest.mark.transformers

PROMPTS = torch.tensor([[BOS, 5, 6, 7, 8], [BOS, 6, 6, 7, 8]])
NUM_PROCESSES = len(PROMPTS)
PARTS = ("autoencoder", "head")  # units of their own, as `_no_split_modules` has them


def texts(shards=False, rank=0):
    """Of a model whose patches are 2 of 5 tokens: how many are drawn differs from text to text."""
    model = few_tokens(tiny_model(patch_size=2), 4)
    if shards:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
        for module in (*map(model.get_submodule, PARTS), model):
            fully_shard(module, mesh=mesh)
    options = {"do_sample": True, "temperature": 0.4, "num_candidates": 50, "max_new_tokens": 10, "eos_token_id": None}
    options |= {"synced_gpus": shards, "inputs": PROMPTS[rank : rank + 1]}
    cases = itertools.product((None, True, False), range(3))
    return [model.generate(generator=[seeded(n)], lazy_decoding=lazy, **options).tolist() for lazy, n in cases]


def write(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=NUM_PROCESSES)
    try:
        torch.save(texts(shards=True, rank=rank), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_shards_write_what_a_whole_model_writes(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=write, args=(rank, str(tmp_path))) for rank in range(NUM_PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    for rank in range(NUM_PROCESSES):
        assert torch.load(tmp_path / f"{rank}.pt") == texts(rank=rank)
