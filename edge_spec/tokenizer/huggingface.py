"""Tokenizers that come as a `tokenizer.json`, through the `tokenizers` library that wrote it.

Special tokens are not the library's task here: `Tokenizer` cuts them out of a text first, since it has to keep users'
text from turning into them. So they are taken out of the description, and what is left turns plain text into ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_NEVER_CHOSEN = -1e6
"""A score that keeps a piece out of every text."""


class JsonEncoder:
    """Encodes text that holds no special tokens. Raises ModelFormatError if the library refuses the description."""

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer

        try:
            self._library: Library = Tokenizer.from_str(text)
        except Exception as exc:  # the library raises bare Exceptions
            raise ModelFormatError(f"the tokenizer.json is not usable: {exc}") from exc

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return list(self._library.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True, slots=True)
class JsonTokenizer:
    """What a `tokenizer.json` says of plain text.

    `first` encodes text at the start, `later` text behind a special token; they differ where a space belongs before
    the first word only. `byte_level` tells how tokens spell bytes: in GPT-2's alphabet, else as SentencePiece does.
    `drops_space`: the space that comes before a text is not part of it. `swallowing`: ids that take the white space
    behind them.
    """

    first: JsonEncoder
    later: JsonEncoder
    byte_level: bool
    drops_space: bool
    swallowing: frozenset[int]


def read_json(text: str) -> JsonTokenizer:
    """Take a `tokenizer.json` apart.

    ModelFormatError where it is not one; UnsupportedArchitectureError where its tokens are neither byte-level nor
    SentencePiece's.
    """
    described = parse_json(text)
    kinds = [part.get("type") for name in ("decoder", "pre_tokenizer") for part in _parts(described.get(name))]
    byte_level = "ByteLevel" in kinds
    if not byte_level and not {"Metaspace", "ByteFallback", "Replace"} & set(kinds):
        raise UnsupportedArchitectureError(
            f"a tokenizer.json of the model {described['model'].get('type')!r} whose tokens are neither byte-level nor "
            f"SentencePiece's"
        )
    added = described.get("added_tokens") or []
    plain = described | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    plain["model"] = _without(plain["model"], {token["id"] for token in added if token.get("special")})
    first = JsonEncoder(json.dumps(plain))
    later = first
    spaced = any(part.get("type") == "Prepend" for part in _parts(described.get("normalizer")))
    schemes = {part.get("prepend_scheme", "always") for part in _metaspaces(described)}
    if "first" in schemes:
        changed = json.loads(json.dumps(plain))
        for part in _metaspaces(changed):
            part["prepend_scheme"] = "never"
        later = JsonEncoder(json.dumps(changed))
    return JsonTokenizer(
        first=first,
        later=later,
        byte_level=byte_level,
        drops_space=spaced or bool(schemes - {"never"}),
        swallowing=frozenset(token["id"] for token in added if token.get("rstrip")),
    )


def parse_json(text: str) -> dict[str, Any]:
    """The description as a value, its outline checked; ModelFormatError if it is not a tokenizer's."""
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ModelFormatError(f"the tokenizer.json is not JSON: {exc}") from exc
    if not (isinstance(described, dict) and isinstance(described.get("model"), dict)):
        raise ModelFormatError("the tokenizer.json describes no tokenizer: it has no model")
    added = described.get("added_tokens") or []
    if not (isinstance(added, list) and all(map(_is_added_token, added))):
        raise ModelFormatError("the tokenizer.json has an added token without an id and a text")
    return described


def _is_added_token(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("content"), str)


def tokens_of(described: dict[str, Any]) -> dict[int, str]:
    """Every token that a description lists, by id; ModelFormatError where the list is not one."""
    vocabulary = described["model"].get("vocab")
    try:
        if isinstance(vocabulary, list):
            tokens = {i: str(entry[0]) for i, entry in enumerate(vocabulary)}
        else:
            tokens = {int(i): str(token) for token, i in vocabulary.items()}
    except (AttributeError, TypeError, ValueError, IndexError) as exc:
        raise ModelFormatError(f"the tokenizer.json lists no tokens: {exc}") from exc
    tokens |= {token["id"]: token["content"] for token in described.get("added_tokens") or []}
    if min(tokens, default=0) < 0:
        raise ModelFormatError(f"the tokenizer.json gives a token the id {min(tokens)}")
    return tokens


def adds_bos(text: str, bos_id: int) -> bool:
    """Whether texts get this token before them, as the description says; ModelFormatError if it is not usable."""
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_str(text).encode("a").ids
    except Exception as exc:  # the library raises bare Exceptions
        raise ModelFormatError(f"the tokenizer.json is not usable: {exc}") from exc
    return ids[:1] == [bos_id]


def _parts(described: Any) -> Iterator[dict[str, Any]]:
    """A component, and those that it is a sequence of."""
    if not isinstance(described, dict):
        return
    yield described
    for name in ("normalizers", "pretokenizers", "decoders"):
        for part in described.get(name) or []:
            yield from _parts(part)


def _metaspaces(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (part for part in _parts(described.get("pre_tokenizer")) if part.get("type") == "Metaspace")


def _without(model: dict[str, Any], special: set[int]) -> dict[str, Any]:
    """The model with special tokens out of a unigram's reach, which could choose them for plain text."""
    vocabulary = model.get("vocab")
    if model.get("type") != "Unigram" or not isinstance(vocabulary, list):
        return model
    kept = [
        [entry[0], _NEVER_CHOSEN] if i in special and i != model.get("unk_id") else entry
        for i, entry in enumerate(vocabulary)
    ]
    return model | {"vocab": kept}
