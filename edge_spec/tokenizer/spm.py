"""SentencePiece BPE vocabularies (Llama 2, Phi-3, Mistral and their kin) through the `sentencepiece` library.

A GGUF file carries pieces, scores and types, not the model file that the library reads; so one is written in memory:
a protobuf ModelProto with the handful of fields that decide how text is cut (sentencepiece_model.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from edge_spec.errors import ModelFormatError
from edge_spec.tokenizer.vocabulary import TokenKind

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "▁"
"""What stands for a space inside pieces."""
BYTE_NAMES = frozenset(f"<0x{byte:02X}>" for byte in range(256))

_BPE = 2


class SentencePieceEncoder:
    """Encodes text that holds no special tokens. Raises ModelFormatError if the library refuses the vocabulary."""

    def __init__(self, tokens: Sequence[str], kinds: bytes, scores: Sequence[float]) -> None:
        self._library = _load(b"".join(_model(tokens, kinds, scores)))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; what no piece covers is spelled in bytes."""
        return cast("list[int]", self._library.encode(text.replace(" ", SPACE)))


def to_bytes(token: str, kind: int) -> bytes:
    """The bytes that a piece stands for."""
    if kind == TokenKind.BYTE and token in BYTE_NAMES:
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


def _load(model: bytes) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as exc:
        raise ModelFormatError(f"the SentencePiece vocabulary is not usable: {exc}") from exc


def _model(tokens: Sequence[str], kinds: bytes, scores: Sequence[float]) -> Iterator[bytes]:
    unknown = kinds.find(TokenKind.UNKNOWN)
    spells = {t for t, k in zip(tokens, kinds, strict=True) if k == TokenKind.BYTE} >= BYTE_NAMES
    if unknown < 0 and not spells:
        raise ModelFormatError("the SentencePiece vocabulary has neither an unknown token nor all 256 bytes")
    for i, (token, kind, score) in enumerate(zip(tokens, kinds, scores, strict=True)):
        yield _piece(token, score, TokenKind.UNKNOWN if i == unknown else _plain(kind))
    if unknown < 0:
        # The library insists on one; with all bytes there it never appears.
        yield _piece(f"<unknown {len(tokens)}>", 0.0, TokenKind.UNKNOWN)
    yield _field(2, _number(3, _BPE) + _number(4, len(tokens)) + _number(35, spells))
    yield _field(3, _field(1, b"identity") + _number(3, 0) + _number(4, 0) + _number(5, 0))


def _plain(kind: int) -> TokenKind:
    """How a piece takes part in merging. Cutting out user-defined pieces is not the library's task but ours."""
    if kind == TokenKind.BYTE:
        return TokenKind.BYTE
    return TokenKind.CONTROL if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN) else TokenKind.NORMAL


def _piece(token: str, score: float, kind: TokenKind) -> bytes:
    return _field(1, _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
