"""Tokens as they come, turned into text as it can be shown: whole characters, and nothing of a stop string.

A completion's text is that of prompt and completion without the prompt's: a tokenizer that writes a space before every
word, as SentencePiece does, leaves it out where a text begins, so tokens are decoded behind those before them. A stop
string may begin in one token and end in another, so text that may be its beginning is held back until that is decided.
The string itself is not part of the text.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
LONGEST_STOP = 256  # characters
MOST_STOPS = 256
PROMPT_TOKENS = 256  # of a prompt's end, which is enough to decode what follows it


class TextAssembler:
    """The text of one row.

    Args:
        tokenizer: a fast one, with the tokenizers library behind it.
        stop: strings that end the text.
        prompt: the ids before it.

    Raises:
        ValueError: an empty stop string, or a tokenizer without that library.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        if not all(stop):
            raise ValueError("stop: holds an empty string; every stop string needs a character at least.")
        if len(stop) > MOST_STOPS or max(map(len, stop), default=0) > LONGEST_STOP:
            raise ValueError(f"stop: may hold {MOST_STOPS} strings of {LONGEST_STOP} characters each, at most.")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: text is assembled by its library.")
        self.stop = tuple(stop)
        self._backend: Tokenizer = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self._beginnings = {string[:length] for string in stop for length in range(1, len(string))}
        self._longest_beginning = max(map(len, self._beginnings), default=0)
        self._known = list(prompt[-PROMPT_TOKENS:])  # the ids last decoded, and their text
        self._known_text = self._decode(self._known)
        self._new: list[int] = []  # ids that are no whole character yet
        self.text = ""  # all that is decoded, up to a stop string
        self.num_taken = 0  # characters handed out
        self.has_stopped = False

    def push(self, token: int) -> bool:
        """Takes the next token; returns whether a stop string is complete, after which there is no more to take."""
        self._new.append(token)
        piece = self._new_text()
        if piece and not piece.endswith(REPLACEMENT):
            self._known, self._new = self._new, []
            self._known_text = self._decode(self._known)
            self._append(piece)
        return self.has_stopped

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def _new_text(self) -> str:
        both = self._decode(self._known + self._new)
        if both.startswith(self._known_text):
            return both[len(self._known_text) :]
        return self._decode(self._new)  # bytes that are no character's spoil one whose bytes they follow

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
            self.text += self._new_text()  # the bytes of an incomplete character
        end = len(self.text) if is_last or self.has_stopped else len(self.text) - self._num_undecided()
        piece, self.num_taken = self.text[self.num_taken : end], max(end, self.num_taken)
        return piece

    def _num_undecided(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        for length in range(min(self._longest_beginning, len(self.text)), 0, -1):
            if self.text[-length:] in self._beginnings:
                return length
        return 0
