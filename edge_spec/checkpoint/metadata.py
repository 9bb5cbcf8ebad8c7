"""A checkpoint's tokenizer and sizes as the metadata of a GGUF, so that everything else reads one kind of file."""

from __future__ import annotations

from typing import Any

from edge_spec.checkpoint.folder import TOKENIZER, Checkpoint
from edge_spec.errors import ModelFormatError
from edge_spec.tokenizer.huggingface import adds_bos, parse_json, read_json, tokens_of
from edge_spec.tokenizer.spm import BYTE_NAMES
from edge_spec.tokenizer.tokenizer import JSON_KEY
from edge_spec.tokenizer.vocabulary import TokenKind

_SPARE = 1 << 16
"""Ids that a tokenizer may leave out below its largest one."""


def tokenizer_metadata(checkpoint: Checkpoint, n_vocab: int) -> dict[str, Any]:
    """Keys of `tokenizer.*` for a model of `n_vocab` logits.

    ModelFormatError where the tokenizer lists more tokens than the model knows, or names ids that it does not have.
    """
    text = checkpoint.read_text(TOKENIZER)
    described = parse_json(text)
    listed = tokens_of(described)
    read_json(text)
    n_tokens = max(listed, default=-1) + 1
    if n_tokens > n_vocab:
        raise ModelFormatError(
            f"{checkpoint.path}: the tokenizer lists {n_tokens} tokens, and the model knows {n_vocab} (vocab_size)"
        )
    if n_tokens - len(listed) > _SPARE:
        raise ModelFormatError(f"{checkpoint.path / TOKENIZER}: it leaves {n_tokens - len(listed)} ids without a token")
    added = {token["id"]: bool(token.get("special")) for token in described.get("added_tokens") or []}
    fallback = described["model"].get("byte_fallback") is True
    tokens = [listed.get(i, f"[PAD{i}]") for i in range(n_tokens)]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "huggingface",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_kind(i, token, listed, added, fallback) for i, token in enumerate(tokens)],
        JSON_KEY: text,
    }
    ids = {token: i for i, token in listed.items()}
    bos, ends = _bos(checkpoint, ids), _ends(checkpoint, ids)
    for name, number in (("bos", bos), *zip(("eos", "eot", "eom"), ends, strict=False)):
        if number is not None:
            if not 0 <= number < n_tokens:
                raise ModelFormatError(
                    f"{checkpoint.path}: the {name} token has the id {number}, and the vocabulary {n_tokens} tokens"
                )
            keys[f"tokenizer.ggml.{name}_token_id"] = number
    keys["tokenizer.ggml.add_bos_token"] = bos is not None and adds_bos(text, bos)
    template = _chat_template(checkpoint)
    return keys | ({"tokenizer.chat_template": template} if template else {})


def _kind(i: int, token: str, listed: dict[int, str], added: dict[int, bool], fallback: bool) -> int:
    if i not in listed:
        return TokenKind.UNUSED
    if i in added:
        return TokenKind.CONTROL if added[i] else TokenKind.USER_DEFINED
    return TokenKind.BYTE if fallback and token in BYTE_NAMES else TokenKind.NORMAL


def _bos(checkpoint: Checkpoint, ids: dict[str, int]) -> int | None:
    """The token before a text: as the tokenizer's own config names it, else the model's."""
    named = _named(checkpoint, "bos_token", ids)
    return named if named is not None else next(iter(_numbers(checkpoint.config.get("bos_token_id"))), None)


def _ends(checkpoint: Checkpoint, ids: dict[str, int]) -> list[int]:
    """Tokens after which the model has nothing more to say, the tokenizer's own first."""
    named = _named(checkpoint, "eos_token", ids)
    generation = checkpoint.read_json("generation_config.json")
    found = [*([] if named is None else [named]), *_numbers(generation.get("eos_token_id"))]
    return list(dict.fromkeys([*found, *_numbers(checkpoint.config.get("eos_token_id"))]))


def _named(checkpoint: Checkpoint, key: str, ids: dict[str, int]) -> int | None:
    value = checkpoint.read_json("tokenizer_config.json").get(key)
    text = value.get("content") if isinstance(value, dict) else value
    return ids.get(text) if isinstance(text, str) else None


def _numbers(value: Any) -> list[int]:
    return [number for number in (value if isinstance(value, list) else [value]) if type(number) is int]


def _chat_template(checkpoint: Checkpoint) -> str:
    """The template in its own file, else the tokenizer config's; of several the one called default."""
    if text := checkpoint.read_text("chat_template.jinja"):
        return text
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = checkpoint.read_json(name).get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return ""
