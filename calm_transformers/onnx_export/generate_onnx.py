"""Continues a prompt with a CALM that `calm export` wrote, by onnxruntime: numpy, onnxruntime and
tokenizers are all it needs. In an exported folder this file is generate.py.

    python FOLDER/generate.py "Once upon a time" --max_new_tokens 40 --temperature 0.5 --num_candidates 200 --seed 0

The same from Python, with FOLDER in `sys.path`:

    from generate import ExportedCALM, Randomness
    for piece in ExportedCALM("FOLDER").write("Once upon a time", 40, Randomness(seed=0), temperature=0.5): ...

A step reads a patch of K tokens, draws latent vectors of the next, decodes them, and chooses one by temperature: the
batch rule of the paper's Algorithm 2, extended to every T, weighs the distinct ones, of which top-k, top-p and min-p
leave some out. At T = 1 without these one is drawn and taken.

Axes: B batch, P patches read, S patches read before, K tokens per patch, D hidden size, N draws, Z latent size, V
vocabulary, M latent vectors. The graphs, all of float32 and int64, with any B, P, S, N and M:

- backbone.onnx: tokens (B, P, K), mask (B, S + P), of patches, 1 where one is attended to, and for each layer
  past_key.i and past_value.i (B, heads, S, head size) → hidden (B, P, D), and present_key.i and present_value.i, of
  S + P patches;
- head.onnx: hidden (B, D) and the noises that calm.json lists → latents (N, B, Z);
- decoder.onnx: latents (M, Z) → tokens (M, K), the most probable, and logits (M, K, V).
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

WRONG = 2  # exit code for what the user can put right
INTERRUPTED = 130  # and for Ctrl-C, as shells say
LOGITS_AT_ONCE = 2**24  # 64 MiB
WHOLE_TOLERANCE = 1e-6  # 1/T this close (relatively) to a whole number counts as whole
ROUNDING = 1e-5  # of shares: counts are whole, so that many of them lie exactly on the edge of a truncation
MAX_TEMPERATURE = 2.0
NO_WEIGHT = 1000.0  # nats
UNFINISHED = "\ufffd"  # what a decoder writes for a part of a character


class Refusal(Exception):
    """Why a text can't be written, in one sentence."""


class Sampling(NamedTuple):
    """How a step's patch is chosen.

    Args:
        temperature: T in (0, 2].
        num_candidates: N, patches drawn a step, but at T = 1 without a truncation, where one is.
        top_k: so many distinct patches with most weight may be chosen; 0 is all.
        top_p: the fewest, of most weight, that together have this share of it; 1 is all.
        min_p: those with at least this share of the largest weight; 0 is all.
    """

    temperature: float
    num_candidates: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def num_draws(self) -> int:
        return 1 if self == Sampling(1.0, self.num_candidates) else self.num_candidates

    def check(self) -> None:
        """Raises `Refusal` for a value outside its range, or fewer than 1/T candidates."""
        if not 0 < self.temperature <= MAX_TEMPERATURE:
            raise Refusal(f"temperature={self.temperature}: must lie in (0, {MAX_TEMPERATURE:g}].")
        if self.top_k < 0:
            raise Refusal(f"top_k={self.top_k}: must be a whole number of patches to keep, or 0 for all.")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise Refusal(f"{name}={getattr(self, name)}: must be a share, in [0, 1].")
        exponent = inverse_temperature(self.temperature)
        if self.num_candidates < exponent:
            least = math.ceil(exponent) if exponent < 1e9 else f"{exponent:.1g}"
            raise Refusal(
                f"num_candidates={self.num_candidates} is too few for temperature={self.temperature}: use at least "
                f"{least}."
            )


class Randomness:
    """Where random numbers come from: numpy's generator, whose seed is another each time where it is None."""

    def __init__(self, seed: int | None = None):
        self.generator = np.random.default_rng(seed)

    def noise(self, spec: dict, shape: tuple[int, ...]) -> np.ndarray:
        """The head's noise of one kind, float32, by what calm.json says of it."""
        if spec["law"] == "normal":
            return self.generator.standard_normal(shape, dtype=np.float32)
        low, high = spec["range"]
        return low + (high - low) * self.generator.random(shape, dtype=np.float32)

    def exponential(self, num_draws: int) -> np.ndarray:
        """Standard exponential variates (N,), by which one of the draws is chosen."""
        return self.generator.standard_exponential(num_draws)


class ExportedCALM:
    """The graphs of a folder, its tokenizer, and what calm.json says of them (`facts`).

    Args:
        folder: that `calm export` wrote.
        num_threads: `None` leaves their number to onnxruntime.

    Raises:
        Refusal: a file or a package is missing, or a file is damaged.
    """

    def __init__(self, folder: str | Path, num_threads: int | None = None):
        folder = Path(folder)
        if not (folder / "calm.json").is_file():
            raise Refusal(f"{folder / 'calm.json'} does not exist: name a folder that `calm export` wrote.")
        try:
            onnxruntime: Any = importlib.import_module("onnxruntime")
            from tokenizers import Tokenizer
        except ImportError as error:
            raise Refusal(f"{error.name} is not installed: pip install numpy onnxruntime tokenizers.") from error
        self.facts: dict[str, Any] = read(folder / "calm.json", lambda path: json.loads(path.read_bytes()))
        self.tokenizer = read(folder / "tokenizer.json", lambda path: Tokenizer.from_file(str(path)))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        options = onnxruntime.SessionOptions()
        if num_threads is not None:
            options.intra_op_num_threads = num_threads

        def session(path: Path):
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        parts = ("backbone", "head", "decoder")
        self.backbone, self.head, self.decoder = (read(folder / f"{part}.onnx", session) for part in parts)

    def write(self, prompt: str, max_new_tokens: int, randomness: Randomness, **settings) -> Iterator[str]:
        """Pieces of the text that follows a prompt, as they are known; the arguments are those of `tokens`."""
        ids = self.tokenizer.encode(prompt).ids
        written, shown = list(ids), self.tokenizer.decode(ids)
        for token in self.tokens(ids, max_new_tokens, randomness, **settings):
            written.append(token)
            text = self.tokenizer.decode(written)
            if not text.endswith(UNFINISHED):  # a character of several tokens waits for the last
                yield text[len(shown) :]
                shown = text
        if rest := self.tokenizer.decode(written)[len(shown) :]:
            yield rest

    def tokens(self, prompt_ids: list[int], max_new_tokens: int, randomness: Randomness, **settings) -> Iterator[int]:
        """Ids that follow those of a prompt, up to an EOS (the last) or `max_new_tokens`, in a patch's midst, too.

        Without a prompt the text begins with BOS. `settings` are fields of `Sampling`; those that are None or not
        given are the model's.

        Raises:
            Refusal: a setting outside its range, nothing to begin with, or more than the model's positions.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        sampling = Sampling(**{name: self.facts[name] for name in Sampling._fields})._replace(**given)
        sampling.check()
        patches_PK, cache = self._packed(prompt_ids), self._empty_cache()
        longest = self.facts["max_position_embeddings"] * self.facts["patch_size"]
        if len(prompt_ids) + max_new_tokens > longest:
            raise Refusal(
                f"the prompt has {len(prompt_ids)} tokens and {max_new_tokens} are to be written, but the model takes "
                f"{longest} together: shorten the prompt or lower max_new_tokens."
            )
        num_left = max_new_tokens
        while num_left > 0:
            hidden_1D, cache = self._read(patches_PK, cache)
            patch_K = self._next_patch(hidden_1D, randomness, sampling)
            for token in patch_K[:num_left].tolist():
                yield token
                if token in self.facts["eos_token_ids"]:
                    return
            num_left -= len(patch_K)
            patches_PK = patch_K[None]

    def _packed(self, prompt_ids: list[int]) -> np.ndarray:
        """A prompt as patches (P, K): the first is filled on its left."""
        bos = self.facts["bos_token_id"]
        if not prompt_ids and bos is None:
            raise Refusal("the prompt is empty, and the model has no bos_token_id, which would start it.")
        ids, patch_size = list(prompt_ids) or [bos], self.facts["patch_size"]
        fillers = -len(ids) % patch_size * [self.facts["filler_token_id"]]
        return np.array(fillers + ids, dtype=np.int64).reshape(-1, patch_size)

    def _empty_cache(self) -> list[np.ndarray]:
        shape = 1, self.facts["num_key_value_heads"], 0, self.facts["head_size"]
        return [np.zeros(shape, dtype=np.float32) for _ in range(2 * self.facts["num_layers"])]

    def _read(self, patches_PK: np.ndarray, cache: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Reads further patches: the last one's hidden state (1, D), and the cache with them."""
        num_patches = cache[0].shape[2] + len(patches_PK)
        feed = {"tokens": patches_PK[None], "mask": np.ones((1, num_patches), dtype=np.int64)}
        names = [f"past_{kind}.{layer}" for layer in range(self.facts["num_layers"]) for kind in ("key", "value")]
        hidden_1PD, *cache = self.backbone.run(None, feed | dict(zip(names, cache, strict=True)))
        return hidden_1PD[:, -1], cache

    def _next_patch(self, hidden_1D: np.ndarray, randomness: Randomness, sampling: Sampling) -> np.ndarray:
        """The patch (K,) chosen after a hidden state."""
        sizes = {"draws": sampling.num_draws, "rows": 1}  # of the axes that have no number
        noises = {
            spec["name"]: randomness.noise(spec, tuple(sizes[x] if x in sizes else x for x in spec["shape"]))
            for spec in self.facts["noises"]
        }
        (latents_N1Z,) = self.head.run(["latents"], {"hidden": hidden_1D, **noises})
        patches_NK = self._decode(latents_N1Z[:, 0])
        if len(patches_NK) == 1:
            return patches_NK[0]
        noise_N = randomness.exponential(len(patches_NK))
        return patches_NK[sample_by_weight(first_occurrences(patches_NK), noise_N, sampling)]

    def _decode(self, latents_NZ: np.ndarray) -> np.ndarray:
        """The most probable tokens (N, K), so many latent vectors at a time that their logits stay few."""
        at_once = max(1, LOGITS_AT_ONCE // (self.facts["patch_size"] * self.facts["vocab_size"]))
        chunks = [latents_NZ[start : start + at_once] for start in range(0, len(latents_NZ), at_once)]
        return np.concatenate([self.decoder.run(["tokens"], {"latents": chunk})[0] for chunk in chunks])


def read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What a reader makes of a file; `Refusal` where it raises, as each library does in classes of its own."""
    try:
        return reader(path)
    except Exception as error:
        raise Refusal(f"{path} cannot be read: {' '.join(str(error).split())}") from error


# The choice by temperature


def inverse_temperature(temperature: float) -> float:
    """The exponent 1/T, exactly whole where T is 1/n up to rounding."""
    exponent = 1 / temperature
    if math.isinf(exponent):
        return exponent
    return float(round(exponent)) if abs(exponent - round(exponent)) <= WHOLE_TOLERANCE * exponent else exponent


def first_occurrences(patches_NK: np.ndarray) -> np.ndarray:
    """For each patch the index of the first one that equals it, (N,)."""
    _, first, inverse = np.unique(patches_NK, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def candidate_log_weights(first_N: np.ndarray, temperature: float) -> np.ndarray:
    """Unnormalised log probability of choosing each draw, (N,).

    A patch seen c times weighs C(c, s), s = 1/T, all of it on its first occurrence; with the gamma function for
    factorials that is a weight for every T. Nothing is left of it where c <= s − 1: such counts weigh so little that
    they have no say beside a larger one, and where there is none, the largest of them are chosen from evenly. At T > 1
    the patches seen once also have the weight of those that were not seen, whose number Chao's estimate gives.
    """
    num_draws, exponent = len(first_N), inverse_temperature(temperature)
    table = [
        math.lgamma(count + 1) - math.lgamma(exponent + 1) - math.lgamma(count - exponent + 1)
        if count > exponent - 1
        else (count - num_draws - 1) * NO_WEIGHT
        for count in range(num_draws + 1)
    ]
    sizes_N = np.bincount(first_N, minlength=num_draws)[first_N]
    log_weights_N = np.array(table)[sizes_N]
    num_once, num_twice = (sizes_N == 1).sum(), (sizes_N == 2).sum() / 2
    if temperature > 1 and num_once > 1:
        log_unseen = math.log((num_once - 1) / (2 * (num_twice + 1))) + table[0]
        log_weights_N = np.where(sizes_N == 1, np.logaddexp(log_weights_N, log_unseen), log_weights_N)
    return np.where(first_N == np.arange(num_draws), log_weights_N, -np.inf)


def truncated(weights_N: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Weights with those that top-k, then top-p of what is left, then min-p leave out at 0; of equal weights the
    earlier stays."""
    order_N, rank_N = np.argsort(-weights_N, kind="stable"), np.arange(len(weights_N))
    sorted_N = weights_N[order_N] / weights_N.sum()
    if sampling.top_k > 0:
        sorted_N[rank_N >= sampling.top_k] = 0
    if sampling.top_p < 1:
        before_N = sorted_N.cumsum() - sorted_N
        sorted_N[(before_N >= (sampling.top_p - ROUNDING) * sorted_N.sum()) & (rank_N > 0)] = 0
    sorted_N[sorted_N < (1 - ROUNDING) * sampling.min_p * sorted_N[0]] = 0
    left_N = np.empty_like(sorted_N)
    left_N[order_N] = sorted_N
    return left_N


def sample_by_weight(first_N: np.ndarray, noise_N: np.ndarray, sampling: Sampling) -> int:
    """The draw with the smallest of exponential variates whose rates are the weights: so each has its own chance."""
    log_weights_N = candidate_log_weights(first_N, sampling.temperature)
    weights_N = truncated(np.exp(log_weights_N - log_weights_N.max()), sampling)
    return int((weights_N / np.maximum(noise_N, np.finfo(np.float32).tiny)).argmax())


# The command


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Refusal(f"{message.removesuffix('.')} (see {self.prog} --help).")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1.")
    return int(text)


def run(argv: list[str] | None) -> None:
    here = Path(__file__)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(f"python {here.name}", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("prompt", help="text to go on from")
    parser.add_argument("--folder", type=Path, default=here.parent, help="the exported model (default: this one's)")
    parser.add_argument("--max_new_tokens", type=positive, help="(default: the model's, or 160)")
    parser.add_argument("--temperature", type=float, help="in (0, 2]; the lower, the surer (default: the model's)")
    parser.add_argument("--num_candidates", type=positive, help="patches drawn a step (default: the model's)")
    parser.add_argument("--top_k", type=int, help="distinct patches to choose from; 0 is all (default: the model's)")
    parser.add_argument("--top_p", type=float, help="share of the weight to choose from (default: the model's)")
    parser.add_argument("--min_p", type=float, help="least share of the largest weight (default: the model's)")
    parser.add_argument("--seed", type=int, help="a whole number: the same one, the same text")
    parser.add_argument("--num_threads", type=positive, help="of the processor (default: onnxruntime's choice)")
    options = parser.parse_args(argv)
    if options.seed is not None and options.seed < 0:
        raise Refusal(f"--seed {options.seed}: must not be negative.")
    model, randomness = ExportedCALM(options.folder, options.num_threads), Randomness(options.seed)
    settings = {name: getattr(options, name) for name in Sampling._fields}
    length = options.max_new_tokens or model.facts["max_new_tokens"] or 160
    pieces = model.write(options.prompt, length, randomness, **settings)
    print(options.prompt + next(pieces, ""), end="", flush=True)  # nothing where it is refused
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def main(argv: list[str] | None = None) -> int:
    try:
        run(argv)
    except Refusal as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
