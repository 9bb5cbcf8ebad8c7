"""Turn token ids into text as they come, a whole character at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class Detokenizer:
    """Text of a growing sequence. A character that several tokens spell appears when its last byte is there."""

    def __init__(self, piece: Callable[[int], bytes], *, drop_space: bool = False) -> None:
        """`piece` gives the bytes of a token; with `drop_space` one space at the very start is left out."""
        self._piece = piece
        self._drop_space = drop_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes: often one word, empty while a character is incomplete."""
        data = self._piece(token)
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else nothing."""
        return self._decoder.decode(b"", final=True)
