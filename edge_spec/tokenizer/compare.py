"""Do two models mean the same by a token id?"""

from __future__ import annotations

import re

from edge_spec.errors import VocabMismatchError
from edge_spec.tokenizer.tokenizer import Tokenizer
from edge_spec.tokenizer.vocabulary import TokenKind

# Converters fill a vocabulary up to the width of the logits with such names.
_PADDING = re.compile(r"\[PAD\d+\]|\[EMPTY_\d+\]|<\|?(?:pad|dummy|extra|placeholder|unused)_?\d*\|?>|<dummy\d+>")


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """Raise VocabMismatchError, naming the first differing id, unless draft ids mean the same to the target.

    Families pad their vocabularies to different widths: trailing padding is not compared.
    """
    ours, theirs = _without_padding(target), _without_padding(draft)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            raise VocabMismatchError(f"token {i} is {a!r} to the target and {b!r} to the draft; {_REMEDY}")
    if len(ours) != len(theirs):
        i = min(len(ours), len(theirs))
        longer, name = (ours, "target") if len(ours) > i else (theirs, "draft")
        raise VocabMismatchError(f"token {i}, {longer[i]!r}, is known to the {name} only; {_REMEDY}")


_REMEDY = "use a draft of the target's own family, or none (--drafter lookup, --drafter none)"


def _without_padding(tokenizer: Tokenizer) -> list[str]:
    vocabulary = tokenizer.vocabulary
    end = tokenizer.n_vocab
    while end and (
        vocabulary.kinds[end - 1] == TokenKind.UNUSED or _PADDING.fullmatch(vocabulary.tokens[end - 1]) is not None
    ):
        end -= 1
    return list(vocabulary.tokens[:end])
