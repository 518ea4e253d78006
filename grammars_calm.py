"""Text that matches a JSON schema or a regular expression, by the automata of outlines-core.

A logits processor of a grammar library usually remembers what it has read, token after token, and a candidate patch is
one of many readings. `Grammar` keeps nothing: the state of a text follows from its tokens, so it can be asked about
any candidate. Axes: M candidates, L tokens of a text, V vocabulary.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

try:
    import outlines_core  # pyright: ignore[reportMissingImports] (optional)
except ImportError:
    outlines_core = None

SPACE_MARK = "\u2581"  # how SentencePiece writes a space
MASKS_KEPT = 2**8
BUILD_SECONDS = 20
# A text stands between two characters that no text holds. Without the first the automaton of outlines-core 0.2.14,
# made for a search, would also begin in the middle of a text, and be exponential where its beginning, as a quotation
# mark, may come again. Without the last it would leave out how a text goes on from where it may end, as 1.5 after 1.
BUILD = r"""
import pickle, sys, outlines_core
schema, regex, eos, ids, border = pickle.load(sys.stdin.buffer)
ids = {spelt: numbers for spelt, numbers in ids.items() if 0 not in spelt} | {b"\0": [border]}
try:
    if schema is not None:
        regex = outlines_core.json_schema.build_regex_from_schema(schema)
    regex = rf"\x00(?:{regex})\x00"
    pickle.dump(outlines_core.Index(regex, outlines_core.Vocabulary(eos, ids)), sys.stdout.buffer)
except (TypeError, ValueError) as error:
    sys.exit(" ".join(str(error).split()))
"""
BORDER = 2**31  # stands for that character, and is no token
# Of JSON schemas: what outlines-core 0.2.14 reads over.
NOT_HEEDED = {
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "uniqueItems",
    "contains",
    "patternProperties",
    "propertyNames",
    "dependentRequired",
    "not",
    "if",
}


class Grammar:
    """What text may be written, for `generate(logits_processor=[grammar])`; one serves any number of texts.

    A text ends where the grammar does: EOS is then all that is left, or one of the choices. `max_new_tokens` must
    leave room for it.

    Args:
        tokenizer: the model's, a fast one; it has an EOS.
        json_schema: a schema, as a dictionary or as JSON.
        regex: in place of a schema.

    Raises:
        ImportError: outlines-core is not installed.
        ValueError: both or neither, a schema or regular expression that it doesn't take, or a tokenizer without EOS.
    """

    def __init__(self, tokenizer: Any, *, json_schema: dict | str | None = None, regex: str | None = None):
        if outlines_core is None:
            raise ImportError("A grammar needs outlines-core: pip install outlines_core.")
        if (json_schema is None) == (regex is None):
            raise ValueError("A grammar is a json_schema or a regex: pass one of them.")
        if not isinstance(regex, str | None):
            raise ValueError(f"regex={regex!r}: must be a text.")
        if not callable(tokenizer):
            raise ValueError(f"tokenizer={tokenizer!r}: must be the model's tokenizer, as AutoTokenizer loads it.")
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no eos_token, with which a text that obeys a grammar ends.")
        try:
            json_schema = json.loads(json_schema) if isinstance(json_schema, str) else json_schema
            schema = None if json_schema is None else json.dumps(json_schema)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The json_schema is no JSON: {error}.") from error
        unheeded = sorted(_keywords(json_schema) & NOT_HEEDED)
        if unheeded:
            names = ", ".join(unheeded)
            raise ValueError(f"The json_schema has {names}, which outlines-core doesn't heed: leave it out.")
        try:
            self.index: Any = _build_index(schema, regex, tokenizer.eos_token_id, token_bytes(tokenizer))
        except ValueError as error:
            what = "json_schema" if json_schema is not None else "regex"
            raise ValueError(f"The {what} can't be made a grammar of this tokenizer's tokens: {error}") from error
        self.eos_token_id = tokenizer.eos_token_id
        self.first_state: int = self.index.get_next_state(self.index.get_initial_state(), BORDER)
        self._masks: dict[tuple, Tensor] = {}

    def after_prompt(self, length: int) -> GrammarOfText:
        """The processor of a text whose prompt has so many tokens."""
        return GrammarOfText(self, length)

    def state_after(self, state: int | None, token: int) -> int | None:
        """Where the automaton goes from a state; `None` where the text doesn't match."""
        return None if state is None else self.index.get_next_state(state, token)

    def allowed(self, state: int | None) -> list[int]:
        """The tokens that may follow in a state; after what doesn't match, or has ended, EOS alone."""
        allowed = [] if state is None else self.index.get_allowed_tokens(state)
        return sorted({self.eos_token_id if token == BORDER else token for token in allowed} or [self.eos_token_id])

    def forbidden(self, state: int | None, vocab_size: int, device: torch.device) -> Tensor:
        """Which tokens may not follow in a state, (V,) bool."""
        forbidden_V = self._masks.get((state, vocab_size, device))
        if forbidden_V is None:
            forbidden_V = torch.ones(vocab_size, dtype=torch.bool)
            forbidden_V[[token for token in self.allowed(state) if token < vocab_size]] = False
            forbidden_V = forbidden_V.to(device)
            if len(self._masks) >= MASKS_KEPT:
                self._masks.clear()
            self._masks[state, vocab_size, device] = forbidden_V
        return forbidden_V


class GrammarOfText:
    """A `Grammar` as a logits processor, in texts whose prompt has so many tokens.

    It remembers the states of the text that it saw last, for the next one mostly goes on from there.
    """

    def __init__(self, grammar: Grammar, prompt_length: int):
        self.grammar, self.prompt_length = grammar, prompt_length
        self._tokens: list[int] = []
        self._states: list[int | None] = [grammar.first_state]  # before and after each of them

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (M, V) of the token after ids (M, L) → the same, −inf for tokens that can't stand there."""
        new_ML = input_ids[:, self.prompt_length :]
        num_common = int((new_ML == new_ML[:1]).all(0).cumprod(0).sum())
        start = self._state_of(new_ML[0, :num_common].tolist())
        ends = [tuple(end) for end in new_ML[:, num_common:].tolist()]
        states = {end: reduce(self.grammar.state_after, end, start) for end in set(ends)}
        place = {state: i for i, state in enumerate(set(states.values()))}
        masks_SV = torch.stack([self.grammar.forbidden(state, scores.shape[-1], scores.device) for state in place])
        if len(masks_SV) > 1:
            masks_SV = masks_SV[torch.tensor([place[states[end]] for end in ends], device=scores.device)]
        return scores.masked_fill(masks_SV, -torch.inf)

    def _state_of(self, tokens: list[int]) -> int | None:
        pairs = enumerate(zip(tokens, self._tokens, strict=False))
        num_same = next((i for i, (new, old) in pairs if new != old), min(len(tokens), len(self._tokens)))
        del self._tokens[num_same:], self._states[num_same + 1 :]
        for token in tokens[num_same:]:
            self._tokens.append(token)
            self._states.append(self.grammar.state_after(self._states[-1], token))
        return self._states[-1]


def _keywords(schema: Any) -> set[str]:
    """The keywords of a schema and of those in it; names of properties and values are none."""
    if isinstance(schema, list):
        return set().union(*map(_keywords, schema))
    if not isinstance(schema, dict):
        return set()
    found = set(schema)
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions") and isinstance(value, dict):
            found |= _keywords(list(value.values()))
        elif name not in ("enum", "const", "default", "examples"):
            found |= _keywords(value)
    return found


def _build_index(schema: str | None, regex: str | None, eos_token_id: int, ids: dict[bytes, list[int]]) -> Any:
    """The automaton, built in a process of its own: some take outlines-core for ever, and keep all threads waiting.

    Raises:
        ValueError: it can't be built, or not soon enough.
    """
    asked = pickle.dumps((schema, regex, eos_token_id, ids, BORDER))
    try:
        done = subprocess.run([sys.executable, "-c", BUILD], input=asked, capture_output=True, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"it takes more than {BUILD_SECONDS} seconds; state what objects hold, and simplify"
        ) from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(lines[-1] if lines else f"outlines-core ended with code {done.returncode}")
    return pickle.loads(done.stdout)


def token_bytes(tokenizer: Any) -> dict[bytes, list[int]]:
    """Which tokens stand for which bytes; special ones stand for none.

    Raises:
        ValueError: a tokenizer that is neither byte-level nor of SentencePiece's kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = "" if backend is None else repr(backend.decoder)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    ids: dict[bytes, list[int]] = {}
    for token, number in tokenizer.get_vocab().items():
        if number in special:
            continue
        if "ByteLevel" in decoder:
            spelt = bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
        elif "ByteFallback" in decoder or SPACE_MARK in decoder:
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            spelt = bytes([int(token[3:5], 16)]) if is_byte else token.replace(SPACE_MARK, " ").encode()
        else:
            raise ValueError(f"its decoder is unknown here ({decoder or 'it is no fast tokenizer'})")
        if spelt:
            ids.setdefault(spelt, []).append(number)
    return ids
