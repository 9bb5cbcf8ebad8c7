"""Laws of tokenizers, on small vocabularies."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError, UsageError, VocabMismatchError
from edge_spec.formats.gguf import GGUFFile
from edge_spec.tokenizer import Tokenizer, check_same_vocabulary
from edge_spec.tokenizer.special import Shield, SpecialTokens
from tests.gguf_builder import F32, I32, Typed, write_gguf
from tests.random_text import random_texts
from tests.vocabularies import bpe_metadata, spm_metadata

Make = Callable[..., Tokenizer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(metadata: dict[str, Any]) -> Tokenizer:
        with GGUFFile(write_gguf(tmp_path / "vocabulary.gguf", metadata)) as gguf:
            return Tokenizer.from_gguf(gguf)

    return build


def names(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.tokens()[i] for i in ids]


def test_merges_apply_in_their_order(make: Make) -> None:
    tokenizer = make(bpe_metadata())
    assert names(tokenizer, tokenizer.encode("hi hi h")) == ["hi", "Ġhi", "Ġ", "h"]
    assert names(make(bpe_metadata(("Ġ h", "h i"))), tokenizer.encode(" hi")) != ["Ġh", "i"]


def test_the_first_of_two_equal_merges_counts(make: Make) -> None:
    tokenizer = make(bpe_metadata(("h i", "i s")) | {"tokenizer.ggml.merges": ["h i", "i s", "h i"]})
    assert names(tokenizer, tokenizer.encode("his")) == ["hi", "s"]


@pytest.mark.parametrize("metadata", [bpe_metadata(), spm_metadata()], ids=["bpe", "spm"])
def test_decoding_gives_back_what_was_encoded(make: Make, metadata: dict[str, Any]) -> None:
    tokenizer = make(metadata)
    for text in random_texts(200, seed=8):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("metadata", [bpe_metadata(), spm_metadata()], ids=["bpe", "spm"])
def test_streaming_gives_whole_characters_and_the_same_text(make: Make, metadata: dict[str, Any]) -> None:
    tokenizer = make(metadata)
    for text in random_texts(100, seed=9):
        stream = tokenizer.stream(previous=tokenizer.eos_id)
        pieces = [stream.push(token) for token in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert stream.flush() == ""
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_an_incomplete_character_waits_and_is_replaced_only_at_the_end(make: Make) -> None:
    tokenizer = make(bpe_metadata())
    *most, last = tokenizer.encode("🙂")
    stream = tokenizer.stream()
    assert [stream.push(token) for token in most] == ["", "", ""]
    assert stream.push(last) == "🙂"
    assert [stream.push(token) for token in most] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    broken = tokenizer.stream()
    assert broken.push(most[0]) + broken.push(tokenizer.encode("h")[0]) == "\ufffdh"


def test_control_tokens_are_text_unless_asked_for(make: Make) -> None:
    tokenizer = make(bpe_metadata())
    text = "<|im_start|>hi<|im_end|>"
    assert names(tokenizer, tokenizer.encode(text, special=True)) == ["<|im_start|>", "hi", "<|im_end|>"]
    plain = tokenizer.encode(text)
    assert not tokenizer.vocabulary.control.intersection(plain)
    assert tokenizer.decode(plain) == text


def test_control_tokens_are_hidden_unless_asked_for(make: Make) -> None:
    tokenizer = make(bpe_metadata())
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>", special=True)
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"
    assert tokenizer.token_bytes(ids[0]) == b"<|im_start|>"


def test_user_defined_tokens_are_always_cut_out_longest_first(make: Make) -> None:
    tokenizer = make(bpe_metadata(user_defined=("<t>", "<t><t>")))
    assert names(tokenizer, tokenizer.encode("h<t><t><t>")) == ["h", "<t><t>", "<t>"]
    assert tokenizer.decode(tokenizer.encode("h<t>")) == "h<t>"


def test_the_longest_special_token_wins_wherever_it_stands() -> None:
    special = SpecialTokens({1: "ab", 2: "bcd"}, control={1, 2})
    assert special.cut("abcd", special=True) == ["a", 2]
    assert special.cut("abcd", special=True, shielded=[3]) == [1, "cd"]
    assert special.cut("abcd", special=False) == ["abcd"]
    assert special.cut("", special=True) == []
    assert SpecialTokens({1: "x"}, control={1}, swallow_space={1}).cut("ax \n b", special=True) == ["a", 1, "b"]


def test_bos_is_added_on_demand(make: Make) -> None:
    tokenizer = make(spm_metadata())
    assert tokenizer.add_bos
    assert tokenizer.encode("", add_bos=True) == [1]
    assert tokenizer.encode("") == []
    assert not make(bpe_metadata()).add_bos
    assert make(bpe_metadata(pre="llama-bpe")).add_bos
    assert not make(bpe_metadata(pre="llama-bpe") | {"tokenizer.ggml.add_bos_token": False}).add_bos


def test_sentencepiece_prefixes_a_space_and_spells_the_unknown_in_bytes(make: Make) -> None:
    tokenizer = make(spm_metadata())
    assert names(tokenizer, tokenizer.encode("hi!é")) == ["▁hi", "!", "<0xC3>", "<0xA9>"]
    assert names(tokenizer, tokenizer.encode("</s>hi", special=True)) == ["</s>", "▁hi"]
    bare = make(spm_metadata(extra={"tokenizer.ggml.add_space_prefix": False}))
    assert names(bare, bare.encode("hi")) == ["h", "i"]


def test_a_stream_drops_the_prefixed_space_only_after_a_special_token(make: Make) -> None:
    tokenizer = make(spm_metadata())
    word = tokenizer.encode("hi")
    for previous, shown in ((None, " hi"), (word[-1], " hi"), (tokenizer.eos_id, "hi")):
        stream = tokenizer.stream(previous=previous)
        assert "".join(map(stream.push, word)) == shown


def test_stop_ids_are_those_that_the_vocabulary_marks(make: Make) -> None:
    tokenizer = make(bpe_metadata(user_defined=("<|eot_id|>", "<think>")))
    stops = {"<|endoftext|>", "<|im_end|>", "<|eot_id|>"}
    assert {tokenizer.tokens()[i] for i in tokenizer.stop_ids} == stops
    assert tokenizer.eos_id in tokenizer.stop_ids


def test_end_is_no_stop_where_turns_end_otherwise(make: Make) -> None:
    tokenizer = make(bpe_metadata(user_defined=("<|end|>", "<|return|>", "<|call|>")))
    assert "<|end|>" not in {tokenizer.tokens()[i] for i in tokenizer.stop_ids}


def test_an_unused_token_stands_for_nothing_and_an_unknown_id_is_refused(make: Make) -> None:
    tokenizer = make(bpe_metadata(padding=2))
    assert tokenizer.token_bytes(tokenizer.n_vocab - 1) == b""
    for outside in (-1, tokenizer.n_vocab):
        with pytest.raises(UsageError, match="no token"):
            tokenizer.token_bytes(outside)


def test_an_id_in_the_padding_of_the_logits_is_no_text(make: Make) -> None:
    tokenizer = make(bpe_metadata())
    ids = tokenizer.encode("hi")
    assert tokenizer.decode([*ids, tokenizer.n_vocab, tokenizer.n_vocab + 100, *ids]) == "hihi"


@pytest.mark.parametrize("metadata", [bpe_metadata, spm_metadata])
def test_a_tokenizer_is_shared_where_the_vocabulary_is_the_same(metadata: Any, make: Make, tmp_path: Path) -> None:
    first = make(metadata())
    with GGUFFile(write_gguf(tmp_path / "same.gguf", metadata())) as same:
        assert Tokenizer.from_gguf(same, share=first) is first
    with GGUFFile(write_gguf(tmp_path / "other.gguf", metadata() | {"tokenizer.ggml.eos_token_id": 5})) as other:
        assert Tokenizer.from_gguf(other, share=first) is not first


def test_a_lone_surrogate_is_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="position 2"):
        make(bpe_metadata()).encode("hi\ud800")


def test_an_unknown_tokenizer_or_pre_tokenizer_is_refused_by_name(make: Make) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'rwkv'.*gpt2, llama"):
        make(bpe_metadata(extra={"tokenizer.ggml.model": "rwkv"}))
    with pytest.raises(UnsupportedArchitectureError, match=r"'martian'.*qwen2.*smollm"):
        make(bpe_metadata(pre="martian"))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (bpe_metadata(extra={"tokenizer.ggml.tokens": ["a", "b", "a"]}), "'a' appears twice"),
        (bpe_metadata(extra={"tokenizer.ggml.token_type": Typed(I32, [1])}), "token_type"),
        (bpe_metadata(extra={"tokenizer.ggml.token_type": Typed(F32, [1.0] * 300)}), "token_type"),
        (bpe_metadata(extra={"tokenizer.ggml.eos_token_id": 9999}), "eos_token_id is 9999"),
        (bpe_metadata(extra={"tokenizer.ggml.merges": ["hi"]}), "merges"),
        (bpe_metadata(extra={"tokenizer.ggml.merges": [""]}), "merges"),
        (bpe_metadata(extra={"tokenizer.ggml.merges": ["x y"]}), "merges"),
        (bpe_metadata(extra={"tokenizer.ggml.merges": Typed(I32, [1])}), "merges"),
        (spm_metadata(extra={"tokenizer.ggml.scores": Typed(F32, [1.0])}), "scores"),
        (spm_metadata(extra={"tokenizer.ggml.scores": Typed(F32, [float("nan")] * 300)}), "scores"),
        (spm_metadata(extra={"tokenizer.ggml.token_type": Typed(I32, [1] * 300)}), "neither an unknown"),
    ],
)
def test_an_inconsistent_vocabulary_is_refused(make: Make, metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelFormatError, match=reason):
        make(metadata)


def test_models_of_one_family_share_a_vocabulary_whatever_their_padding(make: Make) -> None:
    check_same_vocabulary(make(bpe_metadata()), make(bpe_metadata(padding=128)))
    check_same_vocabulary(make(bpe_metadata(padding=3)), make(bpe_metadata()))


def test_the_first_differing_token_is_named(make: Make) -> None:
    ours, theirs = make(bpe_metadata()), make(bpe_metadata(("h i", "Ġ h")))
    with pytest.raises(VocabMismatchError, match=r"token 257 is 'Ġhi' to the target and 'Ġh' to the draft"):
        check_same_vocabulary(ours, theirs)
    longer = make(bpe_metadata(user_defined=("<think>",)))
    with pytest.raises(VocabMismatchError, match=r"'<think>', is known to the draft only"):
        check_same_vocabulary(ours, longer)


def test_a_shield_marks_only_what_could_become_special() -> None:
    shield = Shield.against(["<|end|>", "<s>"], avoid="")
    for harmless in ("", " ", "plain text", "a < b", "a|b> c", "x <s"[:2]):
        assert shield.protect(harmless) == harmless
    for hostile in ("<s>", "a<|end|>b", "<|end|><|end|>", "ends <|en", "s> starts", "  d|>  "):
        marked = shield.protect(hostile)
        assert marked != hostile
        assert shield.remove(marked)[0] == hostile
        assert marked.strip() != hostile.strip()


def test_no_control_token_covers_shielded_text() -> None:
    source = random.Random(10)
    controls = {0: "<|end|>", 1: "<s>", 2: "||"}
    special = SpecialTokens(controls, control=set(controls))
    shield = Shield.against(special.control_texts, avoid="")
    for _ in range(500):
        parts = ["".join(source.choices("<|end>s ", k=source.randint(0, 12))) for _ in range(3)]
        # What a template writes is a whole token, or nothing that could begin or end one.
        glue = source.choice(["<|end|>", "<s>", "\n", ""])
        text, shielded = shield.remove(glue.join(map(shield.protect, parts)))
        assert text == glue.join(parts)
        found = [item for item in special.cut(text, special=True, shielded=shielded) if isinstance(item, int)]
        assert [controls[item] for item in found] == [glue] * 2 * (glue in controls.values())
