"""A model's tokenizer, built from the metadata of its GGUF file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import numpy as np

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError, UsageError
from edge_spec.formats.gguf import GGUFFile
from edge_spec.tokenizer import bpe, huggingface, spm
from edge_spec.tokenizer.detokenizer import Detokenizer
from edge_spec.tokenizer.pretokenizers import find
from edge_spec.tokenizer.special import Shield, SpecialTokens
from edge_spec.tokenizer.vocabulary import TokenKind, Vocabulary

SUPPORTED_MODELS = ("gpt2", "llama", "huggingface")
"""Values of `tokenizer.ggml.model`: byte-level BPE, SentencePiece BPE, and the `tokenizer.json` of a checkpoint (in
`tokenizer.huggingface.json`)."""

JSON_KEY = "tokenizer.huggingface.json"


class Encoder(Protocol):
    """Turns text without special tokens into ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        ...


class Tokenizer:
    """Text to ids and back. Nothing of the file stays open.

    `n_vocab` tokens are listed; a model's logits may be wider, never narrower. `stop_ids` end a turn.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: Encoder,
        *,
        is_spm: bool,
        space_prefix: bool,
        swallow_space: bool,
        later: Encoder | None = None,
        drops_space: bool | None = None,
        swallowing: Collection[int] = (),
    ) -> None:
        """`space_prefix`: plain text at the start or after a special token gets a space before it.

        `swallow_space`: special tokens take the white space after them (Phi-3), or those in `swallowing` do.
        `later` encodes text that does not start the whole, where that differs. `drops_space`: the encoder puts a space
        before texts that is not part of them (default: as `space_prefix`).
        """
        self.vocabulary = vocabulary
        self._encoder = encoder
        self._later = later or encoder
        self._is_spm = is_spm
        self._space_prefix = space_prefix
        self._drops_space = space_prefix if drops_space is None else drops_space
        texts = {i: vocabulary.tokens[i] for i in vocabulary.control | vocabulary.user_defined}
        keep = {"<unk>", "<s>", "<|endoftext|>"}
        if swallow_space:
            swallowing = [i for i, text in texts.items() if text not in keep]
        self._specials = SpecialTokens(texts, vocabulary.control, swallowing)

    @classmethod
    def from_gguf(cls, gguf: GGUFFile, *, share: Tokenizer | None = None) -> Tokenizer:
        """Read the tokenizer of a model.

        `share` is returned instead where the file lists the same vocabulary. That saves most of the time and memory,
        and will do for a draft: its ids mean the same, and its text is never encoded.

        UnsupportedArchitectureError names a kind of tokenizer, or a pre-tokenizer, that is not known here;
        ModelFormatError says what does not fit together.
        """
        model = gguf.get_str("tokenizer.ggml.model")
        if model == "gpt2":
            return cls._from_bpe(gguf, share)
        if model == "llama":
            return cls._from_spm(gguf, share)
        if model == "huggingface":
            return cls._from_json(gguf, share)
        raise UnsupportedArchitectureError(
            f"{gguf.path.name}: the tokenizer {model!r} is not supported; these are: {', '.join(SUPPORTED_MODELS)}"
        )

    @classmethod
    def _from_bpe(cls, gguf: GGUFFile, share: Tokenizer | None) -> Tokenizer:
        family = find(gguf.get_str("tokenizer.ggml.pre", "default"))
        vocabulary = Vocabulary.from_gguf(gguf, default_bos=None, default_eos=None, add_bos=family.add_bos)
        if share is not None and share.vocabulary == vocabulary:
            return share
        merges = gguf.get_strings("tokenizer.ggml.merges")
        encoder = bpe.BytePairEncoder(vocabulary.tokens, merges, family)
        if gguf.get_bool("tokenizer.ggml.add_space_prefix", False):
            raise UnsupportedArchitectureError(f"{gguf.path.name}: a byte-level vocabulary with a space prefix")
        return cls(vocabulary, encoder, is_spm=False, space_prefix=False, swallow_space=_is_phi3(gguf))

    @classmethod
    def _from_spm(cls, gguf: GGUFFile, share: Tokenizer | None) -> Tokenizer:
        vocabulary = Vocabulary.from_gguf(gguf, default_bos=1, default_eos=2, add_bos=True)
        if share is not None and share.vocabulary == vocabulary:
            return share
        encoder = spm.SentencePieceEncoder(vocabulary.tokens, vocabulary.kinds, _scores(gguf, len(vocabulary.tokens)))
        space_prefix = gguf.get_bool("tokenizer.ggml.add_space_prefix", True)
        return cls(vocabulary, encoder, is_spm=True, space_prefix=space_prefix, swallow_space=_is_phi3(gguf))

    @classmethod
    def _from_json(cls, gguf: GGUFFile, share: Tokenizer | None) -> Tokenizer:
        vocabulary = Vocabulary.from_gguf(gguf, default_bos=None, default_eos=None, add_bos=False)
        if share is not None and share.vocabulary == vocabulary:
            return share
        described = huggingface.read_json(gguf.get_str(JSON_KEY))
        return cls(
            vocabulary,
            described.first,
            is_spm=not described.byte_level,
            space_prefix=False,
            swallow_space=False,
            later=described.later,
            drops_space=described.drops_space,
            swallowing=described.swallowing,
        )

    @property
    def n_vocab(self) -> int:
        """Number of tokens listed."""
        return len(self.vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """The token before a text, if the vocabulary has one."""
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The token after a text, if the vocabulary has one."""
        return self.vocabulary.eos_id

    @property
    def add_bos(self) -> bool:
        """Whether the model expects a text to start with bos."""
        return self.vocabulary.add_bos and self.bos_id is not None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a turn or a text: eos, and what else the vocabulary marks as such."""
        return self.vocabulary.stop_ids

    def tokens(self) -> Sequence[str]:
        """The tokens by id, spelled as in the file."""
        return self.vocabulary.tokens

    def encode(
        self, text: str, *, special: bool = False, add_bos: bool = False, shielded: Sequence[int] = ()
    ) -> list[int]:
        """Token ids of `text`, after bos if `add_bos` and there is one.

        `special`: names of control tokens in the text become these tokens, as chat templates need; else they are plain
        text, as users' text needs. Positions in `shielded` (ascending) stay plain text either way. Raises UsageError
        for text that is no Unicode (lone surrogates).
        """
        _check_unicode(text)
        ids = [self.bos_id] if add_bos and self.bos_id is not None else []
        after_special = True
        encoder = self._encoder
        for fragment in self._specials.cut(text, special=special, shielded=shielded):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids += encoder.encode(" " + fragment if self._space_prefix and after_special else fragment)
            after_special = isinstance(fragment, int)
            encoder = self._later
        return ids

    def shield(self, avoid: str) -> Shield:
        """A shield against this vocabulary's control tokens, whose mark does not occur in `avoid`."""
        return Shield.against(self._specials.control_texts, avoid)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for (a control token: its name; an unused one: none). UsageError outside."""
        vocabulary = self.vocabulary
        if not 0 <= token < len(vocabulary.tokens):
            raise UsageError(f"there is no token {token}: the vocabulary has {len(vocabulary.tokens)}")
        text, kind = vocabulary.tokens[token], vocabulary.kinds[token]
        if kind in (TokenKind.UNUSED, TokenKind.UNDEFINED) and token not in vocabulary.control:
            return b""
        if token in vocabulary.control or kind == TokenKind.USER_DEFINED:
            return text.encode()
        return spm.to_bytes(text, kind) if self._is_spm or kind == TokenKind.BYTE else bpe.to_bytes(text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`: what `encode` was given. Control tokens are left out, or shown by name."""
        stream = Detokenizer(self._piece(skip_special), drop_space=self._drops_space)
        return "".join([*map(stream.push, map(int, ids)), stream.flush()])

    def stream(self, *, previous: int | None = None, skip_special: bool = True) -> Detokenizer:
        """A detokenizer for tokens that follow others.

        `previous` is the token before the first; where it is a control token, the space that the vocabulary puts at
        the start of a text is left out.
        """
        starts = self._drops_space and previous is not None and previous in self.vocabulary.control
        return Detokenizer(self._piece(skip_special), drop_space=starts)

    def _piece(self, skip_special: bool) -> _Pieces:
        return _Pieces(self, skip_special)


class _Pieces:
    """Bytes of a token as a stream shows them; none for an id in the padding that a model's logits may end with."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.vocabulary.control if skip_special else frozenset()

    def __call__(self, token: int) -> bytes:
        hidden = token in self._hidden or token >= self._tokenizer.n_vocab
        return b"" if hidden else self._tokenizer.token_bytes(token)


def _scores(gguf: GGUFFile, n_tokens: int) -> list[float]:
    if "tokenizer.ggml.scores" not in gguf.metadata:
        return [0.0] * n_tokens
    scores = gguf.get_array("tokenizer.ggml.scores").astype(np.float32)
    if len(scores) < n_tokens or not np.isfinite(scores).all():
        raise ModelFormatError(f"{gguf.path}: tokenizer.ggml.scores does not give a finite score for each token")
    return [float(score) for score in scores[:n_tokens]]


def _is_phi3(gguf: GGUFFile) -> bool:
    """Phi-3's special tokens take the white space after them; its files do not say so, so llama.cpp goes by name."""
    name = gguf.get_str("general.name", "").lower()
    return "phi-3" in name or "phi3" in name


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"the text is not valid Unicode: a lone surrogate at position {exc.start}") from exc
