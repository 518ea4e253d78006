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
# Where a string may hold \" outlines-core 0.2.14 takes twice as long for each character more that it may have.
BUILD = r"""
import pickle, sys, outlines_core
schema, regex, eos, ids = pickle.load(sys.stdin.buffer)
try:
    if schema is not None:
        regex = outlines_core.json_schema.build_regex_from_schema(schema).replace('|\\["', '|\\[')
    pickle.dump(outlines_core.Index(regex, outlines_core.Vocabulary(eos, ids)), sys.stdout.buffer)
except (TypeError, ValueError) as error:
    sys.exit(" ".join(str(error).split()))
"""


class Grammar:
    """What text may be written, for `generate(logits_processor=[grammar])`; one serves any number of texts.

    A text ends where the grammar does: EOS is then all that is left, or one of the choices. `max_new_tokens` must
    leave room for it.

    Args:
        tokenizer: the model's, a fast one; it has an EOS.
        json_schema: a schema, as a dictionary or as JSON. Strings will hold no \\" escape.
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
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no eos_token, with which a text that obeys a grammar ends.")
        schema = json_schema if isinstance(json_schema, str) or json_schema is None else json.dumps(json_schema)
        try:
            self.index: Any = _build_index(schema, regex, tokenizer.eos_token_id, token_bytes(tokenizer))
        except ValueError as error:
            what = "json_schema" if json_schema is not None else "regex"
            raise ValueError(f"The {what} can't be made a grammar of this tokenizer's tokens: {error}") from error
        self.eos_token_id = tokenizer.eos_token_id
        self._masks: dict[tuple, Tensor] = {}

    def after_prompt(self, length: int) -> GrammarOfText:
        """The processor of a text whose prompt has so many tokens."""
        return GrammarOfText(self, length)

    def state_after(self, state: int | None, token: int) -> int | None:
        """Where the automaton goes from a state; `None` where the text doesn't match."""
        return None if state is None else self.index.get_next_state(state, token)

    def forbidden(self, state: int | None, vocab_size: int, device: torch.device) -> Tensor:
        """Which tokens may not follow in a state, (V,) bool. After the end of what matches EOS alone may."""
        forbidden_V = self._masks.get((state, vocab_size, device))
        if forbidden_V is None:
            allowed = [] if state is None else self.index.get_allowed_tokens(state)
            forbidden_V = torch.ones(vocab_size, dtype=torch.bool)
            forbidden_V[[token for token in allowed or [self.eos_token_id] if token < vocab_size]] = False
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
        self._states: list[int | None] = [grammar.index.get_initial_state()]  # before and after each of them

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


def _build_index(schema: str | None, regex: str | None, eos_token_id: int, ids: dict[bytes, list[int]]) -> Any:
    """The automaton, built in a process of its own: some take outlines-core for ever, and keep all threads waiting.

    Raises:
        ValueError: it can't be built, or not soon enough.
    """
    asked = pickle.dumps((schema, regex, eos_token_id, ids))
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
