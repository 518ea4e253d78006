"""Measures the speed of a training since its last log."""

import time

import torch
from transformers import TrainingArguments

# Dense peak in 16 bits by a part of the device's name, as published by its maker.
PEAK_TFLOPS = {
    **{"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989},
    **{"A100": 312, "L40S": 362, "RTX 4090": 165, "MI300X": 1307},
}


class Speed:
    """The speed since the last log, without the first step of a run, which compiles and warms up.

    - tokens_per_second: of all processes. tokens_per_cpu_second: of this one, which depends less on other load.
    - data_wait: share of the time spent waiting for batches.
    - mfu: FLOPs of the training / those that the devices could do in 16 bits, where their peak is known.
    - memory_gib: most memory of the device so far.
    """

    def __init__(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the steps before are not measured
        self.tokens, self.data_seconds = 0, 0.0
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def results(self, args: TrainingArguments, flops_per_token: float) -> dict[str, float]:
        seconds, cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu_start
        results = {
            "tokens_per_second": round(self.tokens * args.world_size / seconds, 1),
            "tokens_per_cpu_second": round(self.tokens / cpu_seconds, 1),
            "data_wait": round(self.data_seconds / seconds, 4),
        }
        if args.device.type == "cuda":
            name = torch.cuda.get_device_name(args.device)
            peak = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
            if peak is not None and (args.bf16 or args.fp16):
                results["mfu"] = round(flops_per_token * self.tokens / seconds / (1e12 * peak), 4)
            results["memory_gib"] = round(torch.cuda.max_memory_allocated(args.device) / 2**30, 2)
        return results
