"""The token list of a GGUF file, and which of its tokens are special."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from edge_spec.errors import ModelFormatError
from edge_spec.formats.gguf import GGUFFile
from edge_spec.tokenizer.special_names import FIM_NAMES, SPECIAL_NAMES

_ID_KEYS = ("eos", "eot", "eom")


class TokenKind(IntEnum):
    """What a token is, as `tokenizer.ggml.token_type` numbers it."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens by id, and the ids that mean something."""

    tokens: Sequence[str]
    kinds: bytes
    """One TokenKind a token."""
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    """Whether the model expects bos before a text."""
    stop_ids: frozenset[int]
    """Ids after which the model has nothing more to say."""
    control: frozenset[int]
    """Ids that text may stand for only where special tokens are asked for; they are not part of decoded text."""
    user_defined: frozenset[int]
    """Ids that are cut out of any text before it is tokenised."""

    @classmethod
    def from_gguf(
        cls, gguf: GGUFFile, *, default_bos: int | None, default_eos: int | None, add_bos: bool
    ) -> Vocabulary:
        """Read the token list; the defaults apply where the file does not say. Raises ModelFormatError."""
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(gguf.get_strings("tokenizer.ggml.tokens"))]
        ids = {token: i for i, token in enumerate(tokens)}
        if not tokens:
            raise ModelFormatError(f"{gguf.path}: the vocabulary is empty")
        if len(ids) < len(tokens):
            twice = next(i for i, token in enumerate(tokens) if ids[token] != i)
            raise ModelFormatError(f"{gguf.path}: the token {tokens[twice]!r} appears twice, first as {twice}")
        kinds = _kinds(gguf, len(tokens))
        # Files often type special tokens as plain ones, so these names count whatever their type, as in llama.cpp.
        special = {name: ids[name] for name in SPECIAL_NAMES if name in ids}
        defaults = {"eos": default_eos, "eot": None, "eom": None}
        stop = {name: _special_id(gguf, name, defaults[name], len(tokens)) for name in _ID_KEYS}
        stop_ids = {i for name, i in special.items() if name not in FIM_NAMES}
        stop_ids |= {i for i in stop.values() if i is not None}
        control = set(special.values())
        control |= {i for i, kind in enumerate(kinds) if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN)}
        if _speaks_harmony({tokens[i] for i in stop_ids}):
            stop_ids.discard(ids["<|end|>"])
        return cls(
            tokens=tokens,
            kinds=kinds,
            bos_id=_special_id(gguf, "bos", default_bos, len(tokens)),
            eos_id=stop["eos"],
            add_bos=gguf.get_bool("tokenizer.ggml.add_bos_token", add_bos),
            stop_ids=frozenset(stop_ids),
            control=frozenset(control),
            user_defined=frozenset(i for i, kind in enumerate(kinds) if kind == TokenKind.USER_DEFINED) - control,
        )


def _kinds(gguf: GGUFFile, n_tokens: int) -> bytes:
    if "tokenizer.ggml.token_type" not in gguf.metadata:
        return bytes([TokenKind.NORMAL]) * n_tokens
    kinds = gguf.get_array("tokenizer.ggml.token_type")
    if len(kinds) < n_tokens or not np.issubdtype(kinds.dtype, np.integer):
        raise ModelFormatError(f"{gguf.path}: tokenizer.ggml.token_type does not give a type for each token")
    known = np.isin(kinds[:n_tokens], list(TokenKind))
    return np.where(known, kinds[:n_tokens], int(TokenKind.UNDEFINED)).astype(np.uint8).tobytes()


def _special_id(gguf: GGUFFile, name: str, default: int | None, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in gguf.metadata:
        return default if default is not None and default < n_tokens else None
    number = gguf.get_int(key)
    if not 0 <= number < n_tokens:
        raise ModelFormatError(f"{gguf.path}: {key} is {number}, outside the vocabulary of {n_tokens}")
    return number


def _speaks_harmony(stops: set[str]) -> bool:
    """Formats that end messages with <|end|> and turns with other marks: there it ends no turn."""
    called = bool(stops & {"<|call|>", "<|calls|>"})
    return called and "<|end|>" in stops and bool(stops & {"<|return|>", "<|flush|>"})
