"""Speed of text generation: CALM against an ordinary Llama, in tokens a second, and where the time goes.

    calm bench generation --shape calm-m --baseline transformer-s --device cpu --dtype float32 \\
        --temperature 0.5 --num_candidates 200 --batch_size 1 8 --repetitions 3 --json figures.json --plot figures.png

Both models write through `generate`, in turns: CALM, baseline, CALM, … Tokens a second are new tokens ÷ the time of
the whole call, prompt included: the median of the runs, and their range. A shape is a recipe (with random weights),
`demo` (the bundled model), a folder or a Hub id. Workloads: "worst", random weights, no candidate comes twice; "real",
the patch distributions of a trained model: its own, or on a random model of a recipe's shape the demo's, imposed. See
workloads.py.

- A step makes one patch of every row. Its ms are those of the backbone (the prompt's pass apart), the head, decoding,
  the rest of choosing a patch (selection) and the rest of `generate` (other).
- Draws: candidates that a row draws in a step. Distinct: share of different patches among num_candidates.
- Memory ÷ weights: what the worst run needed, weights included.
- In float32 on a CPU the CALM's large products are oneDNN's where that is faster than PyTorch's own; with
  `--fast_baseline` the baseline's are, too.
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
from calm_transformers.benchmarks.runs import PARTS, Subject, compare, lent_products
from calm_transformers.benchmarks.workloads import (
    DEMO_FOLDER,
    Replay,
    add_device_options,
    check_device,
    check_worst_case,
    distinct_share,
    draw_candidates,
    is_trained,
    own_prompts,
    random_model,
    random_prompts,
    record,
    shape_config,
    trained_model,
)
from calm_transformers.command_line import InputError, Parser, command, known_errors, require_package, picture, positive, writable
from calm_transformers.evaluation.report import saved_figure, write_json
from calm_transformers.model.configuration_calm import CALMConfig
from calm_transformers.model.generation_calm_samplers import SAMPLING_METHODS, PatchSampling

WORKLOADS = ("worst", "real")
# The benchmark's own options beside the temperature, of which it takes several.
NOT_OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "min_p")
SAMPLING_OPTIONS = tuple(name for name in PatchSampling.option_names() if name not in NOT_OPTIONS)
ASKED = (
    *("baseline", "fast_baseline", "device", "dtype", *SAMPLING_OPTIONS),
    *("prompt_length", "output_length", "repetitions"),
)


class Benchmark:
    """Everything that the options ask for, a row at a time.

    Raises:
        ValueError: options that can't be measured, before any work.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self._check()
        self.baseline = self._model(options.baseline, with_weights=is_trained(options.baseline))

    def _check(self) -> None:
        options = self.options
        check_device(options.device)
        if options.plot is not None:
            require_package("matplotlib", "eval", "--plot")
        for temperature in options.temperature:
            PatchSampling(True, temperature, options.num_candidates, options.sampling_method)
        if isinstance(shape_config(options.baseline, options.demo), CALMConfig):
            raise InputError(f"--baseline {options.baseline} is a CALM: name an ordinary language model.")
        for shape in options.shape:
            self._check_shape(shape)

    def _check_shape(self, shape: str) -> None:
        options, config = self.options, shape_config(shape, self.options.demo)
        if not isinstance(config, CALMConfig):
            raise InputError(f"--shape {shape} is no CALM: give ordinary language models as --baseline.")
        K = config.patch_size
        if options.prompt_length < K or options.output_length < 2 * K:
            raise InputError(f"{shape} needs a --prompt_length of at least {K} and an --output_length of {2 * K}.")
        if "real" in options.workload and not is_trained(shape):
            demo = shape_config("demo", options.demo)
            if demo.patch_size != K or demo.vocab_size > config.vocab_size:
                raise InputError(
                    f"the demo's patches are not {shape}'s: it has K={demo.patch_size} and a vocabulary of "
                    f"{demo.vocab_size}, {shape} K={K} and {config.vocab_size}. Name a model that fits with --demo."
                )

    def rows(self) -> Iterator[dict]:
        options = self.options
        for shape, workload in product(options.shape, options.workload):
            trained = workload == "real" and is_trained(shape)
            model = self._model(shape, with_weights=trained)
            for temperature in options.temperature:
                replay, share = self._candidates(model, workload, trained, temperature)
                for batch_size in options.batch_size:
                    calm = self._calm(model, trained, temperature, batch_size, replay)
                    yield {
                        **{"shape": shape, "workload": workload, "temperature": temperature, "batch_size": batch_size},
                        **{name: getattr(options, name) for name in ASKED},
                        **{"distinct_share": share, **self._compare(calm, temperature, batch_size)},
                        **{"device_name": device_name(self.device), "threads": torch.get_num_threads()},
                        "date": datetime.date.today().isoformat(),
                        **{"torch": torch.__version__, "transformers": transformers.__version__},
                    }

    def _model(self, name: str, with_weights: bool):
        if with_weights:
            return trained_model(name, self.device, self.dtype, self.options.demo)
        return random_model(shape_config(name, self.options.demo), self.device, self.dtype)

    def _candidates(
        self, model, workload: str, trained: bool, temperature: float
    ) -> tuple[Replay | None, float | None]:
        """What is imposed on the model, and the share of distinct patches among `num_candidates`.

        The share is None at T = 1, where a step draws one candidate.
        """
        N, length, replay = self.options.num_candidates, self.options.prompt_length, None
        if workload == "worst":
            candidates = draw_candidates(model, random_prompts(model, 1, length), N)
            check_worst_case(distinct_share(candidates))
        elif trained:
            candidates = draw_candidates(model, own_prompts(model, 1, length, temperature, N), N)
        else:
            demo = self._model("demo", with_weights=True)
            sampling = PatchSampling(True, temperature, N, self.options.sampling_method)
            candidates = record(demo, temperature, sampling.max_samples)
            replay = Replay(candidates)
        return replay, distinct_share(candidates[:, :N]) if temperature < 1 else None

    def _calm(self, model, trained: bool, temperature: float, batch_size: int, replay: Replay | None) -> Subject:
        options, size = self.options, (model, batch_size, self.options.prompt_length)
        prompts = own_prompts(*size, temperature, options.num_candidates) if trained else random_prompts(*size)
        settings = {name: getattr(options, name) for name in SAMPLING_OPTIONS}
        return Subject(model, prompts, {"temperature": temperature, **settings}, replay)

    def _compare(self, calm: Subject, temperature: float, batch_size: int) -> dict:
        options = self.options
        prompts = random_prompts(self.baseline, batch_size, options.prompt_length)
        products = lent_products if options.fast_baseline else nullcontext
        baseline = Subject(self.baseline, prompts, {"temperature": temperature, "top_k": 0}, products=products)
        return compare(calm, baseline, options.output_length, options.repetitions)


# reports

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


def table_head() -> str:
    return f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def table_row(row: dict) -> str:
    texts = {"distinct": row["distinct_share"], "memory": row["peak_over_weights"]}
    texts = {name: "–" if value is None else f"{value:.2f}" for name, value in texts.items()}
    for prefix in ("", "baseline_"):
        texts[f"{prefix}low"], texts[f"{prefix}high"] = row[f"{prefix}tokens_per_second_range"]
    return f"| {' | '.join(column.format(**row, **texts) for column in COLUMNS.values())} |"


def write_plot(path: Path, rows: list[dict]) -> None:
    """Left the ratio of each row, right where a CALM step's time goes."""
    labels = [f"{r['shape']} {r['workload']}, T={r['temperature']:g}, batch {r['batch_size']}" for r in rows]
    with saved_figure(path, 1, 2, figsize=(11, 1.5 + 0.4 * len(rows)), sharey=True) as (figure, (ratios, shares)):
        bars = ratios.barh(labels, [row["ratio"] for row in rows])
        ratios.bar_label(bars, fmt="%.2f", padding=2)
        ratios.axvline(1, color="black", linewidth=1)
        ratios.set_xlabel(f"tokens/s ÷ {rows[0]['baseline']} ({rows[0]['device_name']}, {rows[0]['dtype']})")
        ratios.margins(x=0.15)
        ratios.invert_yaxis()
        left = [0.0] * len(rows)
        for part in PARTS:
            widths = [row[f"{part}_ms"] / row["step_ms"] for row in rows]
            shares.barh(labels, widths, left=left, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        shares.set_xlabel("share of a step's time")
        figure.legend(loc="outside upper right", ncols=len(PARTS), frameon=False)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("calm bench generation", __doc__)
    parser.add_argument("--shape", nargs="+", default=["calm-m"], help="calm-m, calm-l, calm-xl, demo, or a model")
    parser.add_argument("--baseline", default="transformer-s", help="transformer-s, transformer-m, or a model")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--demo", default=str(DEMO_FOLDER), help="the demo model (default: the bundled one)")
    add_device_options(parser, torch.cuda.is_available())
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--num_candidates", type=positive, default=200)
    parser.add_argument("--sampling_method", choices=SAMPLING_METHODS, default="adaptive")
    parser.add_argument(
        "--plain", dest="lazy_decoding", action="store_const", const=False, help="decode every candidate in full"
    )
    parser.add_argument(
        "--fast_baseline", action="store_true", help="lend the baseline CALM's float32 products (kernels_calm.py)"
    )
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1, 8])
    parser.add_argument("--prompt_length", type=positive, default=64, help="tokens a row")
    parser.add_argument("--output_length", type=positive, default=64, help="new tokens a row")
    parser.add_argument("--json", type=writable, help="write the rows, after each")
    parser.add_argument("--plot", type=picture, help="write the plot")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options, rows = parse_options(argv), []
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with known_errors(ValueError, OSError):
        benchmark = Benchmark(options)
        print(table_head(), flush=True)
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
