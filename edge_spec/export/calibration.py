"""The text that a model reads at export, so that each matrix is rounded for the inputs that it will get.

Conversations of several kinds and languages, written for this package, in the model's own chat template.
"""

from __future__ import annotations

import json
from importlib import resources

from edge_spec.chat_template import ChatTemplate
from edge_spec.errors import EdgeSpecError
from edge_spec.formats.gguf import GGUFFile
from edge_spec.tokenizer import Tokenizer

MAX_TOKENS = 1024
"""Of all texts: twice as many hardly lowered the error on other texts."""

MAX_TEXT_TOKENS = 512
_FEWEST_TOKENS = 256


def calibration_texts(gguf: GGUFFile, n_ctx: int, n_vocab: int) -> list[list[int]]:
    """The texts as ids, each of at most `n_ctx` tokens; none where the file's tokenizer or template cannot do it."""
    try:
        tokenizer, template = Tokenizer.from_gguf(gguf), ChatTemplate.from_gguf(gguf)
        texts, left = [], MAX_TOKENS
        for messages in _conversations():
            ids = template.render_ids(messages, tokenizer, add_generation_prompt=False)
            ids = ids[: min(n_ctx, MAX_TEXT_TOKENS, left)]
            left -= len(ids)
            if ids:
                texts.append(ids)
    except EdgeSpecError:
        return []
    if MAX_TOKENS - left < _FEWEST_TOKENS or max(map(max, texts)) >= n_vocab:
        return []
    return texts


def _conversations() -> list[list[dict[str, str]]]:
    text = resources.files("edge_spec.export").joinpath("calibration.json").read_text("utf-8")
    return [[dict(message) for message in messages] for messages in json.loads(text)]
