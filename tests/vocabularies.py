"""Small vocabularies as GGUF metadata, of both kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_spec.tokenizer.bpe import BYTE_OF
from tests.gguf_builder import F32, I32, Typed

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def bpe_metadata(
    merges: tuple[str, ...] = ("h i", "Ġ hi"),
    *,
    pre: str = "qwen2",
    user_defined: tuple[str, ...] = (),
    padding: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All bytes, the merges' results, ChatML's special tokens, `user_defined`, padding."""
    tokens = [*BYTE_OF, *(merge.replace(" ", "") for merge in merges)]
    types = [NORMAL] * len(tokens) + [CONTROL] * 3 + [USER_DEFINED] * len(user_defined) + [UNUSED] * padding
    tokens += [*CHATML_SPECIALS, *user_defined, *(f"[PAD{i}]" for i in range(padding))]
    return {
        "general.architecture": "qwen2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": Typed(I32, types),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    } | dict(extra or {})


def spm_metadata(extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """unk, bos, eos, all bytes, a few pieces; the later a piece, the later it merges."""
    pieces = ["▁h", "▁hi", "he", "▁", "h", "i", "e", "!"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * len(pieces))]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": Typed(F32, [0.0] * 259 + [-float(i) for i in range(len(pieces))]),
        "tokenizer.ggml.token_type": Typed(I32, types),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | dict(extra or {})
