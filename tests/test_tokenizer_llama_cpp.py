"""Our ids are llama.cpp's: on its own expected ids, and on random strings, for every vocabulary that we accept."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_spec.errors import UnsupportedArchitectureError
from edge_spec.formats.gguf import GGUFFile
from edge_spec.store import Store
from edge_spec.tokenizer import Tokenizer, check_same_vocabulary
from edge_spec.tokenizer.bpe import BYTE_OF
from edge_spec.tokenizer.pretokenizers import FAMILIES
from tests.gguf_builder import I32, Typed, metadata_of, write_gguf
from tests.llama_sources import expected, vocabulary_folder
from tests.llama_vocab import LlamaVocab
from tests.random_text import random_texts

SUPPORTED = (
    "aquila", "baichuan", "command-r", "deepseek-coder", "falcon", "gpt-2", "gpt-neox", "llama-bpe", "llama-spm", "mpt",
    "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip
REFUSED = {"bert-bge": "bert", "deepseek-llm": "deepseek-llm", "gemma-4": "gemma4", "nomic-bert-moe": "t5"}
PRE_NAMES = sorted(name for family in FAMILIES for name in family.names.split())


@pytest.fixture(scope="session")
def vocabularies() -> Path:
    return vocabulary_folder(Store().cache_dir)


def load(path: Path) -> Tokenizer:
    with GGUFFile(path) as gguf:
        return Tokenizer.from_gguf(gguf)


def assert_same_ids(path: Path, count: int, seed: int) -> None:
    ours = load(path)
    with LlamaVocab(path) as theirs:
        for text in random_texts(count, seed):
            for special in (False, True):
                assert ours.encode(text, special=special) == theirs.encode(text, special=special), (text, special)


def assert_same_meaning(path: Path) -> None:
    ours = load(path)
    with LlamaVocab(path) as theirs:
        assert ours.n_vocab == theirs.n_tokens
        assert set(ours.stop_ids) == theirs.stops()
        for token in range(ours.n_vocab):
            piece = theirs.piece(token)
            # llama.cpp spells out tokens that are not in the byte alphabet; we take them as they are.
            assert ours.token_bytes(token) == piece or piece.startswith(b"[UNK_BYTE_")


@pytest.mark.real
def test_every_vocabulary_file_is_either_supported_or_refused(vocabularies: Path) -> None:
    names = {path.stem.removeprefix("ggml-vocab-") for path in vocabularies.glob("*.gguf")}
    assert names == {*SUPPORTED, *REFUSED}


@pytest.mark.real
@pytest.mark.parametrize("name", SUPPORTED)
def test_ids_equal_those_that_llama_cpp_expects(vocabularies: Path, name: str) -> None:
    path = vocabularies / f"ggml-vocab-{name}.gguf"
    tokenizer = load(path)
    for text, ids in expected(path):
        assert tokenizer.encode(text) == ids, text


@pytest.mark.real
@pytest.mark.parametrize("name", SUPPORTED)
def test_ids_bytes_and_stops_equal_llama_cpps_on_its_vocabularies(vocabularies: Path, name: str) -> None:
    path = vocabularies / f"ggml-vocab-{name}.gguf"
    assert_same_ids(path, 300, seed=1)
    assert_same_meaning(path)


@pytest.mark.real
@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_vocabulary_is_refused_by_name(vocabularies: Path, name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=REFUSED[name]):
        load(vocabularies / f"ggml-vocab-{name}.gguf")


@pytest.mark.real
@pytest.mark.parametrize("pre", [family.names.split()[0] for family in FAMILIES])
def test_each_family_of_pre_tokenizers_cuts_as_llama_cpp_does(vocabularies: Path, tmp_path: Path, pre: str) -> None:
    """GPT-2's merges under another family's rules: wherever a cut differs, ids do."""
    with GGUFFile(vocabularies / "ggml-vocab-gpt-2.gguf") as gguf:
        metadata = metadata_of(gguf) | {"tokenizer.ggml.pre": pre}
    assert_same_ids(write_gguf(tmp_path / "vocab.gguf", metadata), 300, seed=2)


@pytest.mark.real
@pytest.mark.parametrize("pre", PRE_NAMES)
def test_each_pre_tokenizer_name_means_what_llama_cpp_means(tmp_path: Path, pre: str) -> None:
    """A vocabulary that merges any two printable ASCII characters shows the cuts of short texts."""
    printable = [char for char, byte in BYTE_OF.items() if 33 <= byte < 127 or byte in b" \n"]
    pairs = [(a, b) for a in printable for b in printable]
    tokens = [*BYTE_OF, *(a + b for a, b in pairs), "<|endoftext|>"]
    metadata = {
        "general.architecture": "gpt2",
        "gpt2.context_length": 64,
        "gpt2.embedding_length": 64,
        "gpt2.feed_forward_length": 64,
        "gpt2.block_count": 1,
        "gpt2.attention.head_count": 1,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": Typed(I32, [1] * (len(tokens) - 1) + [3]),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairs],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    assert_same_ids(write_gguf(tmp_path / "vocab.gguf", metadata), 60, seed=3)


@pytest.mark.real
def test_2000_random_texts_get_llama_cpps_ids_from_smollm2(smollm2_path: Path) -> None:
    assert_same_ids(smollm2_path, 2000, seed=4)
    assert_same_meaning(smollm2_path)


@pytest.mark.pair
def test_2000_random_texts_get_llama_cpps_ids_from_the_target(target_path: Path) -> None:
    assert_same_ids(target_path, 2000, seed=5)
    assert_same_meaning(target_path)


@pytest.mark.pair
def test_2000_random_texts_get_llama_cpps_ids_from_the_draft(draft_path: Path) -> None:
    assert_same_ids(draft_path, 2000, seed=6)
    assert_same_meaning(draft_path)


@pytest.mark.pair
def test_the_default_pair_shares_its_vocabulary(target_path: Path, draft_path: Path) -> None:
    check_same_vocabulary(load(target_path), load(draft_path))
