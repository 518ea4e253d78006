"""Measures the speed of text generation: CALM against a Llama, in tokens per second and time per part of a step.

    calm bench generation --shape calm-m --baseline transformer-s --device cpu --dtype float32 \\
        --temperature 0.5 --num_candidates 200 --batch_size 1 8 --repetitions 3 --json figures.json --plot figures.png

Calls of `generate` are interleaved: CALM, baseline, CALM, … Tokens per second are new tokens ÷ time of the whole call,
prompt included: the median and the range of the calls. A shape is a recipe (with random weights), `demo` (the bundled
model), a folder or a Hub id. Workloads (workloads.py): "worst", random weights, where all candidates are distinct;
"real", the patch distributions of a trained model: its own, or recorded ones, replayed on a random model.
`--sampling_method distilled` gives a random model a head that samples at T.

- A step generates one patch per sequence. Its ms are those of the backbone (without prefill), the head, decoding, the
  rest of choosing a patch (selection) and the rest of `generate` (other).
- Draws: candidates sampled per sequence and step. Distinct: fraction of distinct patches among num_candidates.
- Memory ÷ weights: peak memory of the worst run, weights included.
- In float32 on a CPU, CALM's large linear layers use oneDNN where that is faster than PyTorch's default; with
  `--fast_baseline` the baseline's do too.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
import transformers

from calm_transformers.benchmarks.meters import device_name
from calm_transformers.benchmarks.runs import PARTS, Workload, calm_matmul_backend, compare
from calm_transformers.benchmarks.workloads import (
    Replay,
    add_device_options,
    check_device,
    distinct_fraction,
    generate_prompts,
    is_trained,
    model_config,
    random_model,
    random_prompts,
    recorded_candidates,
    sample_candidates,
    trained_model,
)
from calm_transformers.command_line import (
    InputError,
    Parser,
    command,
    image_path,
    known_errors,
    positive,
    require_package,
    writable,
)
from calm_transformers.evaluation.report import markdown, saved_figure, write_json
from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.model.generation_calm_samplers import SAMPLING_METHODS, PatchSampling

WORKLOADS = ("worst", "real")
# Options of `generate` that the benchmark doesn't take, or takes several values of.
EXCLUDED_OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "min_p")
SAMPLING_OPTIONS = tuple(name for name in PatchSampling.option_names() if name not in EXCLUDED_OPTIONS)
REPORTED_OPTIONS = (  # written to each row
    *("baseline", "fast_baseline", "device", "dtype", *SAMPLING_OPTIONS),
    *("prompt_length", "output_length", "repetitions"),
)


class Benchmark:
    """Measures all combinations of the options; each gives a row of the table."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self._check()
        self.baseline = self._load_model(options.baseline, trained=is_trained(options.baseline))

    def _check(self) -> None:
        options = self.options
        check_device(options.device)
        if options.plot is not None:
            require_package("matplotlib", "eval", "--plot")
        for temperature in options.temperature:
            self._sampling(temperature)  # raises for invalid values
        if isinstance(model_config(options.baseline), CALMConfig):
            raise InputError(f"--baseline {options.baseline} is a CALM: choose an autoregressive language model.")
        for name in options.shape:
            self._check_calm(name)

    def _check_calm(self, name: str) -> None:
        """Checks that a model is a CALM, and that the lengths and the candidates to replay fit it."""
        options, config = self.options, model_config(name)
        if not isinstance(config, CALMConfig):
            raise InputError(f"--shape {name} is not a CALM: autoregressive models are given as --baseline.")
        K = config.patch_size
        if options.prompt_length < K or options.output_length < 2 * K:
            raise InputError(f"{name} needs a --prompt_length of at least {K} and an --output_length of {2 * K}.")
        if "real" in options.workload and not is_trained(name):
            recorded = recorded_candidates(self.device)
            largest_id = int(recorded.max())
            num_needed = max(self._sampling(T).max_samples for T in options.temperature)
            if recorded.shape[2] != K or largest_id >= config.vocab_size or num_needed > recorded.shape[1]:
                raise InputError(
                    f"the recorded candidates don't fit {name}: {recorded.shape[1]} patches of {recorded.shape[2]} "
                    f"tokens, ids up to {largest_id}. Leave out --workload real, or lower --num_candidates."
                )

    def rows(self) -> Iterator[dict]:
        options = self.options
        for name, case in product(options.shape, options.workload):
            trained = case == "real" and is_trained(name)
            model = self._load_model(name, trained)
            for temperature in options.temperature:
                replay, fraction = self._candidates(model, case, trained, temperature)
                for batch_size in options.batch_size:
                    calm = self._workload(model, trained, temperature, batch_size, replay)
                    yield {
                        **{"shape": name, "workload": case, "temperature": temperature, "batch_size": batch_size},
                        **{option: getattr(options, option) for option in REPORTED_OPTIONS},
                        **{"distinct_share": fraction, **self._compare(calm, temperature, batch_size)},
                        **{"device_name": device_name(self.device), "threads": torch.get_num_threads()},
                        "date": datetime.date.today().isoformat(),
                        **{"torch": torch.__version__, "transformers": transformers.__version__},
                    }

    def _sampling(self, temperature: float) -> PatchSampling:
        N, method = self.options.num_candidates, self.options.sampling_method
        return PatchSampling(temperature=temperature, num_candidates=N, sampling_method=method)

    def _load_model(self, name: str, trained: bool):
        """Loads a trained model, or builds one of the same configuration with random weights."""
        if trained:
            return trained_model(name, self.device, self.dtype)
        config = model_config(name)
        if isinstance(config, CALMConfig) and self.options.sampling_method == "distilled":
            config.distilled_temperature = min(self.options.temperature)
        return random_model(config, self.device, self.dtype)

    def _candidates(self, model, case: str, trained: bool, temperature: float) -> tuple[Replay | None, float | None]:
        """Returns the candidates to replay on the model, and the fraction of distinct ones among `num_candidates`.

        They are None if the model samples its own, and at T = 1, where a step samples one candidate.
        """
        N, length, replay = self.options.num_candidates, self.options.prompt_length, None
        if case == "worst":
            candidates = sample_candidates(model, random_prompts(model, 1, length), N)
        elif trained:
            candidates = sample_candidates(model, generate_prompts(model, 1, length, temperature, N), N)
        else:
            candidates = recorded_candidates(self.device)
            replay = Replay(candidates)
        return replay, distinct_fraction(candidates[:, :N]) if temperature < 1 else None

    def _workload(self, model, trained: bool, temperature: float, batch_size: int, replay: Replay | None) -> Workload:
        """Returns CALM's generation to measure; a trained model generates its own prompts."""
        options, args = self.options, (model, batch_size, self.options.prompt_length)
        prompts = generate_prompts(*args, temperature, options.num_candidates) if trained else random_prompts(*args)
        settings = {name: getattr(options, name) for name in SAMPLING_OPTIONS}
        return Workload(model, prompts, {"temperature": temperature, **settings}, replay)

    def _compare(self, calm: Workload, temperature: float, batch_size: int) -> dict:
        options = self.options
        prompts = random_prompts(self.baseline, batch_size, options.prompt_length)
        backend = calm_matmul_backend if options.fast_baseline else nullcontext
        baseline = Workload(self.baseline, prompts, {"temperature": temperature, "top_k": 0}, matmul_backend=backend)
        return compare(calm, baseline, options.output_length, options.repetitions)


COLUMNS = {
    "shape": "{shape}",
    "workload": "{workload}",
    "T": "{temperature:g}",
    "N": "{num_candidates}",
    "batch": "{batch_size}",
    "tokens/s": "{tokens_per_second:.2f} ({low:.2f} – {high:.2f})",
    "baseline": "{baseline_tokens_per_second:.2f} ({baseline_low:.2f} – {baseline_high:.2f})",
    "ratio": "**{ratio:.2f}**",
    "prompt ms": "{prompt_ms:.1f}",
    "step ms": "{step_ms:.1f}",
    **{part: f"{{{part}_ms:.1f}}" for part in PARTS},
    "draws": "{draws:.1f}",
    "distinct": "{distinct}",
    "memory ÷ weights": "{memory}",
}


def table_row(row: dict) -> str:
    optional = {"distinct": row["distinct_share"], "memory": row["peak_over_weights"]}
    cells = {name: "–" if value is None else f"{value:.2f}" for name, value in optional.items()}
    for prefix in ("", "baseline_"):
        cells[f"{prefix}low"], cells[f"{prefix}high"] = row[f"{prefix}tokens_per_second_range"]
    return f"| {' | '.join(column.format(**row, **cells) for column in COLUMNS.values())} |"


def write_plot(path: Path, rows: list[dict]) -> None:
    """Plots the ratio of each row (left) and the parts of a CALM step's time (right)."""
    labels = [f"{r['shape']} {r['workload']}, T={r['temperature']:g}, batch {r['batch_size']}" for r in rows]
    with saved_figure(path, 1, 2, figsize=(11, 1.5 + 0.4 * len(rows)), sharey=True) as (figure, (ratios, parts)):
        bars = ratios.barh(labels, [row["ratio"] for row in rows])
        ratios.bar_label(bars, fmt="%.2f", padding=2)
        ratios.axvline(1, color="black", linewidth=1)
        ratios.set_xlabel(f"tokens/s ÷ {rows[0]['baseline']} ({rows[0]['device_name']}, {rows[0]['dtype']})")
        ratios.margins(x=0.15)
        ratios.invert_yaxis()
        starts = [0.0] * len(rows)
        for part in PARTS:
            widths = [row[f"{part}_ms"] / row["step_ms"] for row in rows]
            parts.barh(labels, widths, left=starts, label=part)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        parts.set_xlabel("fraction of a step's time")
        figure.legend(loc="outside upper right", ncols=len(PARTS), frameon=False)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("calm bench generation", __doc__)
    parser.add_argument("--shape", nargs="+", default=["calm-m"], help="calm-m, calm-l, calm-xl, demo, or a model")
    parser.add_argument("--baseline", default="transformer-s", help="transformer-s, transformer-m, or a model")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add_device_options(parser, torch.cuda.is_available())
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--num_candidates", type=positive, default=200)
    parser.add_argument("--sampling_method", choices=SAMPLING_METHODS, default="auto")
    plain = {"action": "store_const", "const": False, "help": "decode every candidate in full"}
    parser.add_argument("--plain", dest="lazy_decoding", **plain)
    parser.add_argument("--fast_baseline", action="store_true", help="give the baseline CALM's matmul backend")
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1, 8])
    parser.add_argument("--prompt_length", type=positive, default=64, help="tokens per prompt")
    parser.add_argument("--output_length", type=positive, default=64, help="new tokens per prompt")
    parser.add_argument("--json", type=writable, help="write the rows, updated after each")
    parser.add_argument("--plot", type=image_path, help="write the plot")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options, rows = parse_options(argv), []
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with known_errors(ValueError, OSError):
        benchmark = Benchmark(options)
        print(markdown(list(COLUMNS), []), flush=True)
        for row in benchmark.rows():
            rows.append(row)
            print(table_row(row), flush=True)
            write_json(options.json, rows)
    print(
        f"\n{rows[0]['device_name']}, {options.dtype}, {torch.get_num_threads()} CPU threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; {options.prompt_length} + "
        f"{options.output_length} tokens, {options.repetitions} repetitions, baseline {options.baseline}"
    )
    if options.plot:
        write_plot(options.plot, rows)


if __name__ == "__main__":
    sys.exit(main())
