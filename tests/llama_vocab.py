"""llama.cpp's tokenizer, as the reference that ours is compared with."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_spec.backends._llama_library import import_library


class LlamaVocab:
    """A file's vocabulary, loaded by llama.cpp without its weights."""

    def __init__(self, path: Path) -> None:
        self._lib: Any = import_library()
        params = self._lib.llama_model_default_params()
        params.vocab_only = True
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, f"llama.cpp does not load {path}"
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_tokens = int(self._lib.llama_vocab_n_tokens(self._vocab))

    def __enter__(self) -> LlamaVocab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lib.llama_model_free(self._model)

    def encode(self, text: str, *, special: bool) -> list[int]:
        raw = text.encode()
        room = len(raw) + 16
        ids = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, False, special)
        assert count >= 0
        return list(ids[:count])

    def stops(self) -> set[int]:
        return {i for i in range(self.n_tokens) if self._lib.llama_vocab_is_eog(self._vocab, i)}

    def piece(self, token: int) -> bytes:
        """The bytes of a token, control tokens by name."""
        buffer = ctypes.create_string_buffer(512)
        count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        assert count >= 0
        return buffer.raw[:count]
