"""Continues a prompt with a CALM exported by `calm export`; needs only numpy, onnxruntime and tokenizers.
In an exported folder this file is generate.py.

    python FOLDER/generate.py "Once upon a time" --max_new_tokens 40 --temperature 0.5 --num_candidates 200 --seed 0

From Python, with FOLDER in `sys.path`:

    from generate import ExportedCALM, Randomness
    for part in ExportedCALM("FOLDER").generate_text("Once upon a time", 40, Randomness(seed=0), temperature=0.5): ...

A step runs the backbone on a patch, samples N latent vectors for the next one, decodes them, and chooses one of the
distinct patches, filtered by top-k, top-p and min-p, with the weights of the paper's Algorithm 2, extended to every T.
At T = 1 without these filters N is 1.

Axes: B batch, P new patches, S cached patches, K tokens per patch, D hidden size, N samples, Z latent size,
V vocabulary, M latent vectors. The graphs take float32 and int64 and any B, P, S, N and M:

- backbone.onnx: tokens (B, P, K), mask (B, S + P) over patches (1 = attend), and for each layer past_key.i and
  past_value.i (B, heads, S, head size) → hidden (B, P, D), and present_key.i and present_value.i of S + P patches;
- head.onnx: hidden (B, D) and the noise tensors that calm.json lists → latents (N, B, Z), or of a head that
  samples tokens, tokens (N, B, K);
- decoder.onnx: latents (M, Z) → the most probable tokens (M, K), and logits (M, K, V).
"""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

EXIT_INPUT_ERROR, EXIT_INTERRUPTED = 2, 130  # as argparse, and as shells for SIGINT
LOGITS_CHUNK_SIZE = 2**24  # 64 MiB
INTEGER_TOLERANCE = 1e-6  # 1/T this close (relatively) to an integer counts as that integer
ROUNDING = 1e-5  # relative tolerance: weights are ratios of counts, which often lie exactly on a threshold
MAX_TEMPERATURE = 2.0
NO_WEIGHT = 1000.0  # nats
INCOMPLETE = "\ufffd"  # decoded from a part of a character


class InputError(Exception):
    """An error that the user can fix, in one sentence."""


class Sampling(NamedTuple):
    """Sampling settings of a step.

    Args:
        temperature: T in (0, 2].
        num_candidates: N, patches sampled per step, except at T = 1 without filters, where one is sampled.
        top_k: keep the `top_k` distinct patches of largest weight; 0 keeps all.
        top_p: keep the fewest patches of largest weight whose weights sum to `top_p` of the total; 1 keeps all.
        min_p: keep the patches with at least `min_p` times the largest weight; 0 keeps all.
    """

    temperature: float
    num_candidates: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def num_samples(self) -> int:
        return 1 if self == Sampling(1.0, self.num_candidates) else self.num_candidates

    def check(self) -> None:
        """Raises InputError for a value outside its range, or fewer than 1/T candidates."""
        if not 0 < self.temperature <= MAX_TEMPERATURE:
            raise InputError(f"temperature={self.temperature}: must lie in (0, {MAX_TEMPERATURE:g}].")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}: must be the number of patches to keep, or 0 for all.")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: must be a fraction in [0, 1].")
        exponent = inverse_temperature(self.temperature)
        if self.num_candidates < exponent:
            minimum = math.ceil(exponent) if exponent < 1e9 else f"{exponent:.1g}"
            raise InputError(
                f"num_candidates={self.num_candidates} is too few for temperature={self.temperature}: use at least "
                f"{minimum}."
            )


class Randomness:
    """Random numbers of generation, from a numpy generator that is seeded randomly by default."""

    def __init__(self, seed: int | None = None):
        self.generator = np.random.default_rng(seed)

    def noise(self, spec: dict, shape: tuple[int, ...]) -> np.ndarray:
        """Samples one of the head's noise inputs, float32; `spec` is its entry in "noises" of calm.json."""
        if spec["law"] == "normal":
            return self.generator.standard_normal(shape, dtype=np.float32)
        low, high = spec["range"]
        return low + (high - low) * self.generator.random(shape, dtype=np.float32)

    def exponential(self, num_samples: int) -> np.ndarray:
        """Samples standard exponential noise (N,) for `sample_by_weight`."""
        return self.generator.standard_exponential(num_samples)


class ExportedCALM:
    """An exported model: its graphs, its tokenizer, and the contents of calm.json (`config`).

    Args:
        folder: written by `calm export`.
        num_threads: by default chosen by onnxruntime.

    Raises:
        InputError: a file or a package is missing, or a file is damaged.
    """

    def __init__(self, folder: str | Path, num_threads: int | None = None):
        folder = Path(folder)
        if not (folder / "calm.json").is_file():
            raise InputError(f"{folder / 'calm.json'} does not exist: name a folder written by `calm export`.")
        try:
            onnxruntime: Any = importlib.import_module("onnxruntime")
            from tokenizers import Tokenizer
        except ImportError as error:
            raise InputError(f"{error.name} is not installed: pip install numpy onnxruntime tokenizers.") from error
        self.config: dict[str, Any] = read(folder / "calm.json", lambda path: json.loads(path.read_bytes()))
        self.tokenizer = read(folder / "tokenizer.json", lambda path: Tokenizer.from_file(str(path)))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        options = onnxruntime.SessionOptions()
        if num_threads is not None:
            options.intra_op_num_threads = num_threads

        def open_graph(path: Path):
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        parts = ("backbone", "head", "decoder")
        self.backbone, self.head, self.decoder = (read(folder / f"{part}.onnx", open_graph) for part in parts)

    def generate_text(self, prompt: str, max_new_tokens: int, randomness: Randomness, **settings) -> Iterator[str]:
        """Yields the continuation of a prompt in parts, as they are generated; see `generate_tokens`."""
        ids = self.tokenizer.encode(prompt).ids
        decoded = self.tokenizer.decode(ids)
        for token in self.generate_tokens(list(ids), max_new_tokens, randomness, **settings):
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith(INCOMPLETE):  # else the character's last token is still to come
                yield text[len(decoded) :]
                decoded = text
        if rest := self.tokenizer.decode(ids)[len(decoded) :]:
            yield rest

    def generate_tokens(
        self, prompt_ids: list[int], max_new_tokens: int, randomness: Randomness, **settings
    ) -> Iterator[int]:
        """Yields token ids until EOS (included) or `max_new_tokens`, possibly within a patch.

        An empty prompt is replaced by BOS. `settings` are fields of `Sampling`; by default, or if None, the model's.

        Raises:
            InputError: a setting is outside its range, the prompt is empty and there is no BOS, or positions run out.
        """
        overrides = {name: value for name, value in settings.items() if value is not None}
        sampling = Sampling(**{name: self.config[name] for name in Sampling._fields})._replace(**overrides)
        sampling.check()
        patches_PK, cache = self._pack_prompt(prompt_ids), self._empty_cache()
        max_length = self.config["max_position_embeddings"] * self.config["patch_size"]
        if len(prompt_ids) + max_new_tokens > max_length:
            raise InputError(
                f"the prompt has {len(prompt_ids)} tokens and {max_new_tokens} are to be written, but the model takes "
                f"{max_length} together: shorten the prompt or lower max_new_tokens."
            )
        num_remaining = max_new_tokens
        while num_remaining > 0:
            hidden_1D, cache = self._forward(patches_PK, cache)
            patch_K = self._sample_patch(hidden_1D, randomness, sampling)
            for token in patch_K[:num_remaining].tolist():
                yield token
                if token in self.config["eos_token_ids"]:
                    return
            num_remaining -= len(patch_K)
            patches_PK = patch_K[None]

    def _pack_prompt(self, prompt_ids: list[int]) -> np.ndarray:
        """Returns a prompt as patches (P, K), the first one padded on the left."""
        bos = self.config["bos_token_id"]
        if not prompt_ids and bos is None:
            raise InputError("the prompt is empty, and the model has no bos_token_id, which would start it.")
        ids, patch_size = list(prompt_ids) or [bos], self.config["patch_size"]
        padding = -len(ids) % patch_size * [self.config["filler_token_id"]]
        return np.array(padding + ids, dtype=np.int64).reshape(-1, patch_size)

    def _empty_cache(self) -> list[np.ndarray]:
        shape = 1, self.config["num_key_value_heads"], 0, self.config["head_size"]
        return [np.zeros(shape, dtype=np.float32) for _ in range(2 * self.config["num_layers"])]

    def _forward(self, patches_PK: np.ndarray, cache: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Runs the backbone on new patches; returns the last hidden state (1, D) and the new cache."""
        num_patches = cache[0].shape[2] + len(patches_PK)
        feed = {"tokens": patches_PK[None], "mask": np.ones((1, num_patches), dtype=np.int64)}
        names = [f"past_{kind}.{layer}" for layer in range(self.config["num_layers"]) for kind in ("key", "value")]
        hidden_1PD, *cache = self.backbone.run(None, feed | dict(zip(names, cache, strict=True)))
        return hidden_1PD[:, -1], cache

    def _sample_patch(self, hidden_1D: np.ndarray, randomness: Randomness, sampling: Sampling) -> np.ndarray:
        """Samples the next patch (K,) from a hidden state."""
        size_of = {"draws": sampling.num_samples, "rows": 1}  # of the axes that calm.json names; it gives other sizes
        noise = {
            spec["name"]: randomness.noise(spec, tuple(size_of[x] if x in size_of else x for x in spec["shape"]))
            for spec in self.config["noises"]
        }
        (samples_N1,) = self.head.run(None, {"hidden": hidden_1D, **noise})
        patches_NK = samples_N1[:, 0] if samples_N1.dtype == np.int64 else self._decode(samples_N1[:, 0])
        if len(patches_NK) == 1:
            return patches_NK[0]
        exponential_N = randomness.exponential(len(patches_NK))
        return patches_NK[sample_by_weight(first_occurrences(patches_NK), exponential_N, sampling)]

    def _decode(self, latents_NZ: np.ndarray) -> np.ndarray:
        """Returns the most probable tokens (N, K); decodes in chunks of at most LOGITS_CHUNK_SIZE logits."""
        chunk_size = max(1, LOGITS_CHUNK_SIZE // (self.config["patch_size"] * self.config["vocab_size"]))
        chunks = [latents_NZ[start : start + chunk_size] for start in range(0, len(latents_NZ), chunk_size)]
        return np.concatenate([self.decoder.run(["tokens"], {"latents": chunk})[0] for chunk in chunks])


def read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """Returns `reader(path)`; converts its errors, whose types differ between libraries, to InputError."""
    try:
        return reader(path)
    except Exception as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


# Sampling at a temperature


def inverse_temperature(temperature: float) -> float:
    """Returns the exponent 1/T, rounded to an integer n if T is 1/n up to rounding."""
    exponent = 1 / temperature
    if math.isinf(exponent):
        return exponent
    return float(round(exponent)) if abs(exponent - round(exponent)) <= INTEGER_TOLERANCE * exponent else exponent


def first_occurrences(patches_NK: np.ndarray) -> np.ndarray:
    """Returns (N,): for each patch the index of the first patch equal to it."""
    _, first, inverse = np.unique(patches_NK, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def candidate_log_weights(first_N: np.ndarray, temperature: float) -> np.ndarray:
    """Returns the unnormalised log probability of choosing each sample, (N,), on the first of equal ones.

    A patch that occurs c times has weight C(c, s), s = 1/T, with gamma functions for factorials. The weight is zero if
    c <= s − 1; such counts get tiny weights instead, lower for smaller c, so that without larger counts the most
    frequent patches are equally likely. At T > 1 the patches that occur once share the weight of those not sampled,
    whose number is estimated by Chao's formula.
    """
    num_samples, exponent = len(first_N), inverse_temperature(temperature)
    log_weight_of_count = [
        math.lgamma(count + 1) - math.lgamma(exponent + 1) - math.lgamma(count - exponent + 1)
        if count > exponent - 1
        else (count - num_samples - 1) * NO_WEIGHT
        for count in range(num_samples + 1)
    ]
    counts_N = np.bincount(first_N, minlength=num_samples)[first_N]
    log_weights_N = np.array(log_weight_of_count)[counts_N]
    num_once, num_twice = (counts_N == 1).sum(), (counts_N == 2).sum() / 2  # distinct patches
    if temperature > 1 and num_once > 1:
        log_unseen = math.log((num_once - 1) / (2 * (num_twice + 1))) + log_weight_of_count[0]
        log_weights_N = np.where(counts_N == 1, np.logaddexp(log_weights_N, log_unseen), log_weights_N)
    return np.where(first_N == np.arange(num_samples), log_weights_N, -np.inf)


def truncated(weights_N: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Returns the weights with those filtered out by top-k, then top-p, then min-p set to 0; earlier ones win ties."""
    order_N, rank_N = np.argsort(-weights_N, kind="stable"), np.arange(len(weights_N))
    sorted_N = weights_N[order_N] / weights_N.sum()
    if sampling.top_k > 0:
        sorted_N[rank_N >= sampling.top_k] = 0
    if sampling.top_p < 1:
        before_N = sorted_N.cumsum() - sorted_N
        sorted_N[(before_N >= (sampling.top_p - ROUNDING) * sorted_N.sum()) & (rank_N > 0)] = 0
    sorted_N[sorted_N < (1 - ROUNDING) * sampling.min_p * sorted_N[0]] = 0
    filtered_N = np.empty_like(sorted_N)
    filtered_N[order_N] = sorted_N
    return filtered_N


def sample_by_weight(first_N: np.ndarray, exponential_N: np.ndarray, sampling: Sampling) -> int:
    """Returns the index of a sample, chosen with probability proportional to its weight (the Gumbel-max trick)."""
    log_weights_N = candidate_log_weights(first_N, sampling.temperature)
    weights_N = truncated(np.exp(log_weights_N - log_weights_N.max()), sampling)
    return int((weights_N / np.maximum(exponential_N, np.finfo(np.float32).tiny)).argmax())


# The command


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message.removesuffix('.')} (see {self.prog} --help).")


def positive(text: str) -> int:
    """Parses a positive integer; an argparse `type=`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer of at least 1.")
    return int(text)


def run(argv: list[str] | None) -> None:
    """Parses the options, loads the model, and prints the prompt and its continuation."""
    here = Path(__file__)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(f"python {here.name}", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--folder", type=Path, default=here.parent, help="exported model (default: this file's)")
    parser.add_argument("--max_new_tokens", type=positive, help="(default: the model's, or 160)")
    parser.add_argument("--temperature", type=float, help="in (0, 2] (default: the model's)")
    parser.add_argument("--num_candidates", type=positive, help="patches sampled per step (default: the model's)")
    parser.add_argument("--top_k", type=int, help="distinct patches to keep; 0 keeps all (default: the model's)")
    parser.add_argument("--top_p", type=float, help="cumulative weight to keep (default: the model's)")
    parser.add_argument("--min_p", type=float, help="minimum weight, relative to the largest (default: the model's)")
    parser.add_argument("--seed", type=int, help="for a reproducible text (default: random)")
    parser.add_argument("--num_threads", type=positive, help="CPU threads (default: onnxruntime's choice)")
    options = parser.parse_args(argv)
    if options.seed is not None and options.seed < 0:
        raise InputError(f"--seed {options.seed}: must not be negative.")
    model, randomness = ExportedCALM(options.folder, options.num_threads), Randomness(options.seed)
    settings = {name: getattr(options, name) for name in Sampling._fields}
    length = options.max_new_tokens or model.config["max_new_tokens"] or 160
    parts = model.generate_text(options.prompt, length, randomness, **settings)
    print(options.prompt + next(parts, ""), end="", flush=True)  # prints nothing if an argument is invalid
    for part in parts:
        print(part, end="", flush=True)
    print()


def main(argv: list[str] | None = None) -> int:
    try:
        run(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT_ERROR
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
