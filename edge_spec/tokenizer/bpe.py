"""Byte-level BPE (GPT-2, Llama 3, Qwen and their kin) through the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_spec.errors import ModelFormatError
from edge_spec.tokenizer.pretokenizers import PreTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte: Latin-1's own where it has one, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class BytePairEncoder:
    """Encodes text that holds no special tokens. Raises ModelFormatError if merges and tokens do not fit together."""

    def __init__(self, tokens: Sequence[str], merges: Sequence[str], family: PreTokenizer) -> None:
        self._n_tokens = len(tokens)
        self._library = _build(tokens, merges, family)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. A byte that the vocabulary has no token for is left out, as llama.cpp does."""
        ids = self._library.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i < self._n_tokens]


def to_bytes(token: str) -> bytes:
    """The bytes that a token stands for; a token that is not written in the byte alphabet stands for itself."""
    try:
        return bytes(BYTE_OF[char] for char in token)
    except KeyError:
        return token.encode()


def _build(tokens: Sequence[str], merges: Sequence[str], family: PreTokenizer) -> Library:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    # A byte without a token still has to keep its neighbours apart while they merge; `encode` drops it again.
    for char in BYTE_OF:
        vocabulary.setdefault(char, len(vocabulary))
    try:
        # The first of two equal merges counts, and the library would take the last.
        pairs = list(dict.fromkeys(_split(merge) for merge in merges))
        library = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=family.whole_words))
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in family.patterns]
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spell])
    except Exception as exc:  # the library raises bare Exceptions
        raise ModelFormatError(f"the merges do not fit the vocabulary: {exc}") from exc
    return library


def _split(merge: str) -> tuple[str, str]:
    left, gap, right = merge[1:].partition(" ")
    if not gap:
        raise ValueError(f"{merge!r} is not a pair")
    return merge[0] + left, right
