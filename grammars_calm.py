"""Text that matches a JSON schema or a regular expression, by the automata of outlines-core.

A logits processor of a grammar library usually remembers what it has read, token after token, and a candidate patch is
one of many readings. `Grammar` keeps nothing: the state of a text follows from its tokens, so it can be asked about
any candidate. Axes: M candidates, L tokens of a text, V vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

try:
    import outlines_core  # pyright: ignore[reportMissingImports] (optional)
except ImportError:
    outlines_core = None

SPACE_MARK = "\u2581"  # how SentencePiece writes a space
STATES_KEPT = 2**16
MASKS_KEPT = 2**8
Tokens = tuple[int, ...]


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
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no eos_token, with which a text that obeys a grammar ends.")
        try:
            if json_schema is not None:
                schema = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
                regex = outlines_core.json_schema.build_regex_from_schema(schema)
            vocabulary = outlines_core.Vocabulary(tokenizer.eos_token_id, token_bytes(tokenizer))
            self.index: Any = outlines_core.Index(regex, vocabulary)
        except (TypeError, ValueError) as error:
            what = "json_schema" if json_schema is not None else "regex"
            raise ValueError(f"The {what} can't be made a grammar of this tokenizer's tokens: {error}") from error
        self.eos_token_id = tokenizer.eos_token_id
        self._states: dict[Tokens, int | None] = {}
        self._masks: dict[int | None, Tensor] = {}

    def after_prompt(self, length: int) -> GrammarOfText:
        """The processor of a text whose prompt has so many tokens."""
        return GrammarOfText(self, length)

    def state(self, tokens: Tokens) -> int | None:
        """Where the automaton is after these tokens; `None` where they don't match."""
        if not tokens:
            return self.index.get_initial_state()
        if tokens not in self._states:
            if len(self._states) >= STATES_KEPT:
                self._states.clear()
            known = max((n for n in range(len(tokens)) if tokens[:n] in self._states), default=0)
            state = self._states.get(tokens[:known], self.index.get_initial_state())
            for n in range(known, len(tokens)):
                state = None if state is None else self.index.get_next_state(state, tokens[n])
                self._states[tokens[: n + 1]] = state
        return self._states[tokens]

    def forbidden(self, tokens: Tokens, vocab_size: int, device: torch.device) -> Tensor:
        """Which tokens may not follow, (V,) bool. After the end of what matches EOS alone may."""
        state = self.state(tokens)
        if state not in self._masks:
            if len(self._masks) >= MASKS_KEPT:
                self._masks.clear()
            allowed = [] if state is None else self.index.get_allowed_tokens(state)
            forbidden_V = torch.ones(vocab_size, dtype=torch.bool)
            forbidden_V[torch.tensor(allowed or [self.eos_token_id])] = False
            self._masks[state] = forbidden_V
        return self._masks[state].to(device)


class GrammarOfText:
    """A `Grammar` as a logits processor, in texts whose prompt has so many tokens."""

    def __init__(self, grammar: Grammar, prompt_length: int):
        self.grammar, self.prompt_length = grammar, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (M, V) of the token after ids (M, L) → the same, −inf for tokens that can't stand there."""
        texts = [tuple(ids) for ids in input_ids[:, self.prompt_length :].tolist()]
        masks = {text: self.grammar.forbidden(text, scores.shape[-1], scores.device) for text in set(texts)}
        return scores.masked_fill(torch.stack([masks[text] for text in texts]), -torch.inf)


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
