"""Tokens as they come, turned into text as it can be shown: whole characters, and nothing of a stop string.

A stop string may begin in one token and end in another, so text that may be its beginning is held back until that is
decided. The string itself is not part of the text.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
LONGEST_STOP = 256  # characters
MOST_STOPS = 256


class TextAssembler:
    """The text of one row.

    Args:
        tokenizer: a fast one, with the tokenizers library behind it.
        stop: strings that end the text.

    Raises:
        ValueError: an empty stop string, or a tokenizer without that library.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        if not all(stop):
            raise ValueError("stop: holds an empty string; every stop string needs a character at least.")
        if len(stop) > MOST_STOPS or max(map(len, stop), default=0) > LONGEST_STOP:
            raise ValueError(f"stop: may hold {MOST_STOPS} strings of {LONGEST_STOP} characters each, at most.")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: text is assembled by its library.")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self._backend: Tokenizer = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self._stream = DecodeStream(skip_special_tokens=True)
        self._beginnings = {string[:length] for string in stop for length in range(1, len(string))}
        self._longest_beginning = max(map(len, self._beginnings), default=0)
        self._ids: list[int] = []
        self.text = ""  # all that is decoded, up to a stop string
        self.num_taken = 0  # characters handed out
        self.has_stopped = False

    def push(self, token: int) -> bool:
        """Takes the next token; returns whether a stop string is complete, after which there is no more to take."""
        self._ids.append(token)
        try:
            piece = self._stream.step(self._backend, token)
        except Exception:  # a byte that turns out to be no character's; the stream can't go on from there
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = REPLACEMENT + (self._stream.step(self._backend, token) or "")
        if piece:
            self._append(piece)
        return self.has_stopped

    def _append(self, piece: str) -> None:
        searched_from = len(self.text)
        self.text += piece
        found = [self.text.find(stop, max(0, searched_from - len(stop) + 1)) for stop in self.stop]
        begins = [begin for begin in found if begin >= 0]
        if begins:
            self.text, self.has_stopped = self.text[: min(begins)], True

    def take(self, is_last: bool = False) -> str:
        """The text that was not handed out yet and can no longer be part of a stop string; all of it, when last."""
        if is_last and not self.has_stopped:
            self._finish()
        end = len(self.text) if is_last or self.has_stopped else len(self.text) - self._num_undecided()
        piece, self.num_taken = self.text[self.num_taken : end], max(end, self.num_taken)
        return piece

    def _finish(self) -> None:
        """Adds what the last tokens are when no others follow: the bytes of an incomplete character."""
        whole = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if isinstance(whole, str) and whole.startswith(self.text):
            self.text = whole

    def _num_undecided(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        for length in range(min(self._longest_beginning, len(self.text)), 0, -1):
            if self.text[-length:] in self._beginnings:
                return length
        return 0
