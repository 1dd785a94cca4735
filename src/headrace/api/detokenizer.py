"""Tokens to text as they come: the pieces, joined, are the text of all tokens.

A token has no text of its own: it may be part of a character, and a decoder may drop or add a space at a text's edge. So a window of
the last tokens is decoded each time, beginning with some whose text is known; what goes beyond is new. The window is short and moves on
only where it begins on a whole character, so a token costs the same wherever it stands.

Vocabularies with byte fallback spell a rare character as one token a byte, and their decoder judges a whole run of such tokens at once:
one bad byte turns characters already shown to rubbish. So these bytes are gathered here, and enter the window as whole characters.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence

from headrace.api.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT = 6
"""Tokens of the prompt that the first window begins with."""
STRIDE = 3
"""Tokens after which the window moves on."""
WINDOW_MAX = 48
"""A longer window moves on whatever it decodes to: nothing but broken bytes comes."""


class Detokenizer:
    """One choice's text, continuing `prompt`."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._window: list[int] = []
        self._mark = 0
        """A later window may begin here: the text before it ended with a whole character."""
        self._given = 0
        """Characters of the window's text that were returned."""
        self._bytes: list[int] = []
        """Fallback tokens of an unfinished character."""
        self._utf8 = getincrementaldecoder("utf-8")("replace")
        for token_id in prompt[-CONTEXT:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that this token settles; empty while a character is unfinished."""
        if token_id in self._skipped:
            return ""
        byte = self._tokenizer.fallback_bytes.get(token_id)
        if byte is not None:
            return self._push_byte(token_id, byte)
        if self._bytes:
            self._bytes.clear()
            return self._utf8.decode(b"", final=True) + self._extend([token_id])
        return self._extend([token_id])

    def flush(self) -> str:
        """No more tokens come: an unfinished character is shown as U+FFFD."""
        new = self._decode()[self._given :]
        self._given += len(new)
        return new + self._utf8.decode(b"", final=True)

    def _push_byte(self, token_id: int, byte: int) -> str:
        self._bytes.append(token_id)
        text = self._utf8.decode(bytes([byte]))
        if not text:
            return ""
        begun = len(self._utf8.getstate()[0])  # a bad byte may end one character and begin the next
        whole, self._bytes = self._bytes, self._bytes[len(self._bytes) - begun :]
        return text if REPLACEMENT in text else self._extend(whole)

    def _extend(self, token_ids: list[int]) -> str:
        """Text that these tokens add, without an end that may be part of a character."""
        self._window += token_ids
        text = self._decode()
        settled = len(text) - text.endswith(REPLACEMENT)
        new = text[self._given : settled]
        self._given = max(self._given, settled)
        long = len(self._window) > WINDOW_MAX
        if len(self._window) - self._mark >= STRIDE and (settled == len(text) or long):
            self._move(long)
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special)

    def _move(self, force: bool) -> None:
        """Begin the window at the mark, if what stays has text (else a decoder would take the next token for the text's first)."""
        kept = self._window[self._mark :]
        text = self._tokenizer.decode(kept, self._skip_special)
        if text or force:
            self._window = kept
            self._given = len(text) - text.endswith(REPLACEMENT)
            self._mark = len(kept)
