"""Constrained generation with llguidance: text that matches a JSON schema or a regular expression.

The matcher of a grammar consumes one sequence of tokens, but a step has many candidate patches. So each sequence has a
matcher of its own, which is rolled back from one candidate to the next.
Axes: M candidates, L tokens of a sequence, V vocabulary.
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

# At most one space at a time, so that whitespace ends; no \u, which could spell a name of `properties` differently.
JSON_OPTIONS = {"whitespace_pattern": "[ ]?", "json_allowed_escapes": r"\"bfnrt"}
NO_PADDING_OR_TRUNCATION = {"padding": None, "truncation": None}  # in tokenizer.json
_tokenizer_lock = Lock()


class Grammar:
    """Constrains generated text, with `generate(logits_processor=[grammar])`; reusable for any number of sequences.

    EOS is allowed where the text matches, and forced where nothing else is. If `max_new_tokens` is too small, the text
    is only the beginning of a match.

    Args:
        tokenizer: the model's tokenizer, a fast one with an EOS token.
        json_schema: a schema, as a dictionary or as JSON.
        regex: used instead of a schema; the whole text must match.

    Raises:
        ImportError: llguidance is not installed.
        ValueError: both or neither of schema and regex, one that llguidance doesn't fully support, or a tokenizer that
            llguidance doesn't support or that has no EOS token.
    """

    def __init__(self, tokenizer: Any, *, json_schema: dict | str | None = None, regex: str | None = None):
        if llguidance is None:
            raise ImportError('A grammar needs llguidance: pip install "llguidance>=1.9,<2".')
        if (json_schema is None) == (regex is None):
            raise ValueError("A grammar needs a json_schema or a regex: pass one of them.")
        if not hasattr(tokenizer, "eos_token_id"):
            raise ValueError(f"tokenizer={tokenizer!r}: must be the model's tokenizer, as AutoTokenizer loads it.")
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no eos_token, which a grammar needs to end a text.")
        try:
            compile_regex = llguidance.LLMatcher.grammar_from_regex
            grammar = _compile_schema(json_schema) if regex is None else compile_regex(regex)
            with _tokenizer_lock:
                grammar_tokenizer = _make_llguidance_tokenizer(tokenizer, len(tokenizer), tokenizer.eos_token_id)
            limits = llguidance.LLParserLimits(verbose_errors=False)
            self._matcher = llguidance.LLMatcher(grammar_tokenizer, grammar, log_level=0, limits=limits)
            self._matcher.compute_bitmask()  # some invalid grammars only fail here
            if problem := self._matcher.get_error() or "; ".join(self._matcher.get_grammar_warnings()):
                raise ValueError(problem)
        except (TypeError, ValueError, RecursionError) as error:
            name = "json_schema" if regex is None else "regex"
            reason = _first_error_line(error)
            raise ValueError(f"The {name} can't be compiled to a grammar for this tokenizer: {reason}.") from None

    def after_prompt(self, length: int) -> GrammarProcessor:
        """Returns the logits processor of one sequence, whose prompt has `length` tokens."""
        return GrammarProcessor(self._matcher.deep_copy(), length)


class GrammarProcessor:
    """The logits processor of one sequence under a `Grammar`, with a matcher of its own."""

    def __init__(self, matcher: Any, prompt_length: int):
        self._matcher, self._prompt_length = matcher, prompt_length
        self._consumed: list[int] = []  # tokens that the matcher has consumed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns logits (M, V) of the token after ids (M, L), −inf for tokens that the grammar forbids.

        Raises:
            ValueError: a sequence doesn't match, has no continuation, or exceeds llguidance's limits.
        """
        new_ML = input_ids[:, self._prompt_length :]
        # The tokens at the beginning that all candidates share stay consumed until a later call.
        num_shared = int((new_ML == new_ML[:1]).all(0).cumprod(0).sum())
        shared = new_ML[0, :num_shared].tolist()
        num_kept = len(commonprefix([shared, self._consumed]))
        self._matcher.rollback(len(self._consumed) - num_kept)
        self._consumed = shared[: num_kept + self._consume(shared[num_kept:])]
        # The candidates' other tokens are consumed and rolled back, once per distinct suffix.
        suffixes = [tuple(suffix) for suffix in new_ML[:, num_shared:].tolist()]
        index = {suffix: i for i, suffix in enumerate(dict.fromkeys(suffixes))}
        forbidden = torch.stack([self._forbidden_after(list(suffix), scores.shape[-1]) for suffix in index])
        if len(index) > 1:  # else (1, V), which is broadcast
            forbidden = forbidden[[index[suffix] for suffix in suffixes]]
        return scores.masked_fill(forbidden.to(scores.device), -torch.inf)

    def _forbidden_after(self, suffix: list[int], vocab_size: int) -> Tensor:
        """Returns which tokens may not follow the consumed tokens and a suffix: (V,) bool."""
        num_consumed = self._consume(suffix)
        allowed_V = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[:vocab_size]
        if self._matcher.is_error():
            reason = _first_error_line(self._matcher.get_error())
            raise ValueError(f"A text has no continuation in its grammar: {reason}.")
        self._matcher.rollback(num_consumed)
        return torch.nn.functional.pad(allowed_V == 0, (0, vocab_size - len(allowed_V)), value=True)

    def _consume(self, tokens: list[int]) -> int:
        """Consumes tokens and returns how many: fewer than all after the grammar's end, where only EOS is allowed."""
        num_consumed = self._matcher.try_consume_tokens(tokens)
        if num_consumed < len(tokens) and not self._matcher.is_stopped():
            raise ValueError("A text doesn't match its grammar: another logits processor has forced a token.")
        return num_consumed


@lru_cache(4)
def _make_llguidance_tokenizer(tokenizer: Any, num_tokens: int, eos_token_id: int) -> Any:
    """Returns llguidance's version of a tokenizer; making it takes a second for a large vocabulary.

    Special tokens are renamed there, so that a grammar that spells one doesn't generate it. `num_tokens` only
    distinguishes the cached versions of a tokenizer that was extended.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("it is not a fast tokenizer")
    settings = {**json.loads(tokenizer.backend_tokenizer.to_str()), **NO_PADDING_OR_TRUNCATION}
    text = json.dumps(settings, ensure_ascii=False)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            text = text.replace(json.dumps(token.content, ensure_ascii=False), f'"\U0010ffff{token_id}"')
    return llguidance.LLTokenizer(text, eos_token=eos_token_id)


def _compile_schema(json_schema: dict | str | None) -> str:
    """Returns llguidance's grammar of a JSON schema; raises ValueError if it is not supported."""
    text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
    json.loads(text, object_hook=_check_min_properties)  # called for each object in the schema
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)


def _check_min_properties(schema: dict) -> dict:
    if isinstance(minimum := schema.get("minProperties"), int | float) and minimum > 1:
        raise ValueError(f"minProperties={minimum} is not supported, as a name may be repeated; name them in required")
    return schema


def _first_error_line(error: str | Exception) -> str:
    """Returns the line of llguidance's message that gives the reason."""
    lines = str(error).splitlines()
    return next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
