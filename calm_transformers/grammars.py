"""Text that matches a JSON schema or a regular expression, by llguidance.

A logits processor of a grammar library usually remembers what it has read, token after token, and a candidate patch is
one of many readings. Here each text has a matcher of its own, which rolls back from one reading to the next.
Axes: M candidates, L tokens of a text, V vocabulary, S distinct ends of texts.
"""

from __future__ import annotations

import json
from functools import lru_cache
from os.path import commonprefix
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

try:
    import llguidance
except ImportError:
    llguidance: Any = None

# At most one space at a time, so that a text gets on; no \u, with which a name may be spelt that properties has.
JSON_OPTIONS = {"whitespace_pattern": "[ ]?", "json_allowed_escapes": r"\"bfnrt"}
PLAIN = {"padding": None, "truncation": None}  # of a tokenizer's file
_wrapping = Lock()


class Grammar:
    """What text may be written, for `generate(logits_processor=[grammar])`; one serves any number of texts.

    A text ends where the grammar does: EOS is then all that is left, or one of the choices. `max_new_tokens` must
    leave room for it.

    Args:
        tokenizer: the model's, a fast one; it has an EOS.
        json_schema: a schema, as a dictionary or as JSON.
        regex: in place of a schema; the whole text must match.

    Raises:
        ImportError: llguidance is not installed.
        ValueError: both or neither, a schema or regular expression that llguidance doesn't take as it is, or a
            tokenizer that it doesn't take or that has no EOS.
    """

    def __init__(self, tokenizer: Any, *, json_schema: dict | str | None = None, regex: str | None = None):
        if llguidance is None:
            raise ImportError('A grammar needs llguidance: pip install "llguidance>=1.9,<2".')
        if (json_schema is None) == (regex is None):
            raise ValueError("A grammar is a json_schema or a regex: pass one of them.")
        if not hasattr(tokenizer, "eos_token_id"):
            raise ValueError(f"tokenizer={tokenizer!r}: must be the model's tokenizer, as AutoTokenizer loads it.")
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no eos_token, with which a text that obeys a grammar ends.")
        try:
            grammar = llguidance.LLMatcher.grammar_from_regex(regex) if regex is not None else _of_schema(json_schema)
            with _wrapping:
                tokens = _wrap(tokenizer, len(tokenizer), tokenizer.eos_token_id)
            limits = llguidance.LLParserLimits(verbose_errors=False)
            self._matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits)
            self._matcher.compute_bitmask()  # some grammars fail no sooner
            if problem := self._matcher.get_error() or "; ".join(self._matcher.get_grammar_warnings()):
                raise ValueError(problem)
        except (TypeError, ValueError, RecursionError) as error:
            what = "json_schema" if regex is None else "regex"
            sentence = f"The {what} can't be made a grammar of this tokenizer's tokens: {_reason(error)}."
            raise ValueError(sentence) from None

    def after_prompt(self, length: int) -> GrammarOfText:
        """The processor of a text whose prompt has so many tokens."""
        return GrammarOfText(self._matcher.deep_copy(), length)


class GrammarOfText:
    """A `Grammar` as the logits processor of one text, whose matcher it alone has."""

    def __init__(self, matcher: Any, prompt_length: int):
        self._matcher, self._prompt_length = matcher, prompt_length
        self._read: list[int] = []  # what the matcher has read

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (M, V) of the token after ids (M, L) → the same, −inf for tokens that can't stand there.

        Raises:
            ValueError: a text doesn't match, has no continuation, or takes more than llguidance's limits.
        """
        new_ML = input_ids[:, self._prompt_length :]
        num_common = int((new_ML == new_ML[:1]).all(0).cumprod(0).sum())
        common = new_ML[0, :num_common].tolist()
        num_same = len(commonprefix([common, self._read]))
        self._matcher.rollback(len(self._read) - num_same)
        self._read = common[: num_same + self._consume(common[num_same:])]
        ends = [tuple(end) for end in new_ML[:, num_common:].tolist()]
        place = {end: i for i, end in enumerate(dict.fromkeys(ends))}
        forbidden_SV = torch.stack([self._forbidden_after(list(end), scores.shape[-1]) for end in place])
        if len(place) > 1:
            forbidden_SV = forbidden_SV[[place[end] for end in ends]]
        return scores.masked_fill(forbidden_SV.to(scores.device), -torch.inf)

    def _forbidden_after(self, end: list[int], vocab_size: int) -> Tensor:
        """Which tokens may not follow this end of a text, (V,) bool."""
        num_consumed = self._consume(end)
        allowed_V = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[:vocab_size]
        if self._matcher.is_error():
            raise ValueError(f"A text can't go on by its grammar: {_reason(self._matcher.get_error())}.")
        self._matcher.rollback(num_consumed)
        return torch.nn.functional.pad(allowed_V == 0, (0, vocab_size - len(allowed_V)), value=True)

    def _consume(self, tokens: list[int]) -> int:
        """Reads on, and counts what was read: nothing after the grammar's end, where EOS alone may follow."""
        num_consumed = self._matcher.try_consume_tokens(tokens)
        if num_consumed < len(tokens) and not self._matcher.is_stopped():
            raise ValueError("A text doesn't match its grammar: another logits processor has forced a token.")
        return num_consumed


@lru_cache(4)
def _wrap(tokenizer: Any, num_tokens: int, eos_token_id: int) -> Any:
    """llguidance's form of a tokenizer, which takes a second where the vocabulary is large.

    Special tokens have other names there, or one would be written where a grammar spells it.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("it is no fast tokenizer")
    text = json.dumps({**json.loads(tokenizer.backend_tokenizer.to_str()), **PLAIN}, ensure_ascii=False)
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            text = text.replace(json.dumps(token.content, ensure_ascii=False), f'"\U0010ffff{number}"')
    return llguidance.LLTokenizer(text, eos_token=eos_token_id)


def _of_schema(json_schema: dict | str | None) -> str:
    text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
    json.loads(text, object_hook=_check_count)
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)


def _check_count(schema: dict) -> dict:
    if isinstance(fewest := schema.get("minProperties"), int | float) and fewest > 1:
        raise ValueError(f"minProperties={fewest} may be met by one name written twice, so name them in required")
    return schema


def _reason(error: str | Exception) -> str:
    """What is wrong, as the one line of llguidance's that says it."""
    lines = str(error).splitlines()
    return next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
