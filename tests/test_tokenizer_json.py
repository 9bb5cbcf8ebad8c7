"""Laws of tokenizers that come as a tokenizer.json: ids are those of the library that wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from edge_spec.chat_template import ChatTemplate
from edge_spec.checkpoint.folder import open_checkpoint
from edge_spec.checkpoint.metadata import tokenizer_metadata
from edge_spec.formats.gguf import GGUFFile
from edge_spec.formats.gguf_writer import write_metadata
from edge_spec.tokenizer import Tokenizer
from tests.random_text import random_texts
from tests.tiny_checkpoint import N_VOCAB, tokenizer_json, write_checkpoint
from tests.tiny_models import SPECIAL_TOKENS

Make = Callable[..., Tokenizer]
START, END = "<|im_start|>", "<|im_end|>"


def metaspace_json(scheme: str | None) -> dict[str, Any]:
    """A SentencePiece vocabulary with bytes; `scheme` None puts the space there by a normalizer."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("▁", "h"), ("h", "i"), ("▁", "hi"), ("▁h", "i")]
    vocabulary = ["<unk>", *pieces, "▁", *"abcdefghijklmnopqrstuvwxyz", "▁h", "hi", "▁hi"]
    added = [
        {"id": len(vocabulary) + i, "content": token, "special": True, "rstrip": token == END}
        | dict.fromkeys(("single_word", "lstrip", "normalized"), False)
        for i, token in enumerate((START, END))
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
        if scheme is None
        else None,
        "pre_tokenizer": None if scheme is None else space,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(vocabulary)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(described: dict[str, Any]) -> Tokenizer:
        folder = write_checkpoint(tmp_path / "checkpoint", tokenizer=described)
        if described["model"]["byte_fallback"]:
            (folder / "generation_config.json").unlink()  # it names an end that this vocabulary has not
        checkpoint = open_checkpoint(folder)
        metadata = {"general.architecture": "tiny"} | tokenizer_metadata(checkpoint, N_VOCAB)
        write_metadata(tmp_path / "tiny.gguf", metadata)
        with GGUFFile(tmp_path / "tiny.gguf") as gguf:
            return Tokenizer.from_gguf(gguf)

    return build


KINDS = {"bytes": tokenizer_json()} | {
    str(scheme): metaspace_json(scheme) for scheme in (None, "always", "first", "never")
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_library_s(make: Make, kind: str) -> None:
    ours, library = make(KINDS[kind]), Library.from_str(json.dumps(KINDS[kind]))
    library.encode_special_tokens = True
    for text in [*random_texts(100, seed=8), "hi hi", " hi", "  hi", "hi  there ", ""]:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_cut_out_as_the_library_does(make: Make, kind: str) -> None:
    ours, library = make(KINDS[kind]), Library.from_str(json.dumps(KINDS[kind]))
    for text in (f"{START}hi{END}hi {START}", f"hi{START} hi{END}  hi", f"{END}{END}hi", f"a{END}\n{START}b"):
        assert ours.encode(text, special=True) == library.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_encoded_is_decoded(make: Make, kind: str) -> None:
    tokenizer = make(KINDS[kind])
    for text in ["hi hi", "héllo 日本", f"a{END}b", *random_texts(50, seed=9)]:
        # A Metaspace puts no space before one that is there, so the two cannot be told apart.
        written = text.removeprefix(" ") if kind in ("always", "first") else text
        assert tokenizer.decode(tokenizer.encode(text)) == written


def test_names_of_control_tokens_in_plain_text_stay_plain(make: Make) -> None:
    tokenizer = make(KINDS["bytes"])
    assert not set(tokenizer.encode(f"x {START} y {END}")) & tokenizer.vocabulary.control


def test_the_checkpoint_s_own_ends_and_start_are_known(make: Make) -> None:
    tokenizer = make(tokenizer_json())
    names = tokenizer.tokens()
    assert tokenizer.bos_id == names.index(START)
    assert tokenizer.add_bos
    assert {names[i] for i in tokenizer.stop_ids} >= {END, "<|endoftext|>", names[N_VOCAB - 1]}
    assert set(SPECIAL_TOKENS) <= {names[i] for i in tokenizer.vocabulary.control}


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, ""),
        ({"tokenizer_config.json": {"chat_template": "one"}}, "one"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "two"}]}}, "two"),
        ({"chat_template.json": {"chat_template": "three"}}, "three"),
    ],
)
def test_the_chat_template_is_found_where_checkpoints_keep_it(files: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "chat_template.jinja").unlink()
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    keys = tokenizer_metadata(open_checkpoint(folder), N_VOCAB)
    assert keys.get("tokenizer.chat_template", "") == text


def test_a_prompt_is_rendered_with_the_checkpoint_s_template(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    write_metadata(tmp_path / "a.gguf", {"general.architecture": "x"} | tokenizer_metadata(checkpoint, N_VOCAB))
    with GGUFFile(tmp_path / "a.gguf") as gguf:
        tokenizer, template = Tokenizer.from_gguf(gguf), ChatTemplate.from_gguf(gguf)
    assert template.source == "model"
    ids = template.render_ids([{"role": "user", "content": f"hi {END}"}], tokenizer)
    names = [tokenizer.tokens()[i] for i in ids]
    assert names.count(START) == 2
    assert names.count(END) == 1
