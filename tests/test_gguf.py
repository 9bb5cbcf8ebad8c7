"""Reading GGUF files: what is in them comes out, and what is wrong with them is said in bounded time and memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_spec.errors import EdgeSpecError, ModelFormatError, ModelNotFoundError, UnsupportedArchitectureError
from edge_spec.formats import gguf_header
from edge_spec.formats.gguf import GGMLType, GGUFFile
from tests import gguf_builder as b
from tests.gguf_builder import TensorSpec, Typed, build_gguf, text, value, write_gguf

METADATA = {
    "general.architecture": "llama",
    "general.name": "tiny ✓",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.5,
    "llama.big": Typed(b.U64, 1 << 60),
    "llama.negative": Typed(b.I16, -3),
    "llama.flag": True,
    "tokenizer.ggml.tokens": ["a", "", "日本"],
    "tokenizer.ggml.token_type": Typed(b.I32, [1, 2, 3]),
    "llama.flags": [True, False],
}
WEIGHTS = np.arange(24, dtype=np.float32).reshape(3, 8)
Q8 = np.concatenate([np.frombuffer(np.float16(0.5).tobytes() + bytes(range(32)), np.uint8)] * 2).tobytes()
TENSORS = [
    TensorSpec("w", (8, 3), 0, WEIGHTS.tobytes()),
    TensorSpec("h", (5,), 1, np.arange(5, dtype=np.float16).tobytes()),
    TensorSpec("q", (32, 2), 8, Q8),
    TensorSpec("i", (4,), 26, np.arange(4, dtype=np.int32).tobytes()),
]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", METADATA, TENSORS)


def refusal(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def header(n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_comes_out_as_it_went_in(tmp_path: Path, version: int) -> None:
    with GGUFFile(write_gguf(tmp_path / "t.gguf", METADATA, TENSORS, version=version)) as gguf:
        assert gguf.version == version
        assert gguf.architecture == "llama"
        assert list(gguf.metadata) == list(METADATA)
        assert gguf.get_str("general.name") == "tiny ✓"
        assert gguf.get_int("llama.big") == 1 << 60
        assert gguf.get_int("llama.negative") == -3
        assert gguf.get_bool("llama.flag") is True
        assert gguf.hparam("block_count") == "llama.block_count"
        assert gguf.hparam_int("block_count") == 2
        assert gguf.hparam_float("rope.freq_base") == 10000.5
        assert gguf.hparam_float("block_count") == 2.0
        assert gguf.hparam_str("none", "fallback") == "fallback"
        assert gguf.get_strings("tokenizer.ggml.tokens") == ["a", "", "日本"]
        assert gguf.get_array("tokenizer.ggml.token_type").tolist() == [1, 2, 3]
        assert gguf.get_array("llama.flags").tolist() == [True, False]


def test_arrays_act_as_sequences(tiny: Path) -> None:
    with GGUFFile(tiny) as gguf:
        tokens: Any = gguf.metadata["tokenizer.ggml.tokens"]
        types: Any = gguf.metadata["tokenizer.ggml.token_type"]
        assert (len(tokens), tokens[2], tokens[-3], tokens[1:]) == (3, "日本", "a", ["", "日本"])
        assert (list(types), types[1], types[:2]) == ([1, 2, 3], 2, [1, 2])
        with pytest.raises(IndexError):
            tokens[3]


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("get_int", "general.name"),
        ("get_int", "llama.flag"),
        ("get_int", "llama.rope.freq_base"),
        ("get_float", "llama.flag"),
        ("get_bool", "llama.block_count"),
        ("get_str", "llama.block_count"),
        ("get_strings", "tokenizer.ggml.token_type"),
        ("get_strings", "general.name"),
        ("get_array", "tokenizer.ggml.tokens"),
        ("get_int", "no.such.key"),
        ("hparam_int", "no_such_key"),
    ],
)
def test_a_missing_or_wrongly_typed_key_is_named(tiny: Path, method: str, key: str) -> None:
    with GGUFFile(tiny) as gguf, pytest.raises(ModelFormatError, match=key):
        getattr(gguf, method)(key)


def test_a_float_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with GGUFFile(write_gguf(tmp_path / "t.gguf", {"x": float("nan")})) as gguf, pytest.raises(ModelFormatError):
        gguf.get_float("x")


def test_tensors_lie_where_the_file_says(tiny: Path) -> None:
    with GGUFFile(tiny) as gguf:
        assert list(gguf.tensors) == ["w", "h", "q", "i"]
        info = gguf.tensors["w"]
        assert (info.shape, info.type, info.n_bytes, info.n_elements) == ((3, 8), GGMLType.F32, 96, 24)
        assert tiny.read_bytes()[info.offset : info.offset + info.n_bytes] == WEIGHTS.tobytes()
        assert gguf.raw("q").shape == (2, 34)
        assert gguf.raw("q").tobytes() == Q8
        assert not gguf.raw("q").flags.writeable


def test_dequantize_gives_the_values_whole_or_by_rows(tiny: Path) -> None:
    with GGUFFile(tiny) as gguf:
        np.testing.assert_array_equal(gguf.dequantize("w"), WEIGHTS)
        np.testing.assert_array_equal(gguf.dequantize("w", slice(1, 3)), WEIGHTS[1:3])
        np.testing.assert_array_equal(gguf.dequantize("w", np.array([2, 0])), WEIGHTS[[2, 0]])
        np.testing.assert_array_equal(gguf.dequantize("h"), np.arange(5, dtype=np.float32))
        np.testing.assert_array_equal(gguf.dequantize("q", slice(1, 2)), np.arange(32, dtype=np.float32)[None] / 2)
        gguf.release("w")
        np.testing.assert_array_equal(gguf.dequantize("w"), WEIGHTS)
        with pytest.raises(ValueError, match="vector"):
            gguf.dequantize("h", slice(0, 1))
        with pytest.raises(UnsupportedArchitectureError, match="I32"):
            gguf.dequantize("i")
        with pytest.raises(ModelFormatError, match="nothing"):
            gguf.raw("nothing")


def test_a_type_that_nothing_decodes_is_named(tmp_path: Path) -> None:
    tensor = TensorSpec("x", (256,), GGMLType.Q8_K, bytes(292))
    with (
        GGUFFile(write_gguf(tmp_path / "t.gguf", tensors=[tensor])) as gguf,
        pytest.raises(UnsupportedArchitectureError, match="Q8_K"),
    ):
        gguf.dequantize("x")


def test_views_outlive_the_file_and_closing_twice_is_fine(tiny: Path) -> None:
    gguf = GGUFFile(tiny)
    view = gguf.raw("q")
    gguf.close()
    gguf.close()
    assert view.tobytes() == Q8
    with pytest.raises(ValueError, match="closed"):
        gguf.raw("q")


def test_our_table_of_types_is_that_of_the_gguf_package() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    ours = {int(kind): (kind.name, kind.block_size, kind.type_size) for kind in GGMLType}
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {number: ours[number] for number in ours.keys() & theirs.keys()} == {
        number: theirs[number] for number in ours.keys() & theirs.keys()
    }
    assert len(ours.keys() & theirs.keys()) > 25


def test_a_missing_file_is_not_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"nowhere\.gguf"):
        GGUFFile(tmp_path / "nowhere.gguf")
    with pytest.raises(ModelFormatError, match="not a regular file"):
        GGUFFile(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"G", "not a GGUF"),
        (b"GGML" + bytes(60), "not a GGUF"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF"),
        (b"GGUF", "truncated"),
        (header(version=1), "version 1"),
        (header(version=0x03000000), "big-endian"),
        (header(n_tensors=1 << 63), "number of tensors"),
        (header(n_keys=1 << 63), "number of keys"),
        (header(n_keys=1000), "cannot fit"),
        (header(n_tensors=1000), "cannot fit"),
        (header(n_keys=1) + struct.pack("<Q", 1 << 62) + bytes(40), "length of a key"),
        (header(n_keys=1) + text(b"\xff\xfe") + value(1), "not UTF-8"),
        (header(n_keys=1) + text("k") + struct.pack("<I", 99) + bytes(8), "unknown value type 99"),
        (header(n_keys=1) + text("k") + struct.pack("<IQ", 8, 1 << 40) + bytes(8), "the length of the value of k"),
        (header(n_keys=1) + text("k") + struct.pack("<IIQ", 9, 4, 1 << 62) + bytes(8), "array length of k"),
        (header(n_keys=1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 62) + bytes(8), "array length of k"),
        (header(n_keys=1) + text("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 62) + bytes(8), "element of k"),
        (header(n_keys=1) + text("k") + struct.pack("<IIQQQ", 9, 8, 2, 1 << 62, 1), "element 1 of k"),
        (header(n_keys=1) + text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(20), "array of arrays"),
        (build_gguf([("k", 1), ("k", 2)]), "'k' appears twice"),
        (build_gguf({"general.alignment": 0}), "power of two"),
        (build_gguf({"general.alignment": 48}), "power of two"),
        (build_gguf({"general.alignment": "32"}), "power of two"),
        (build_gguf({"general.alignment": 1 << 31}), "power of two"),
        (build_gguf(tensors=[TENSORS[0], TENSORS[0]]), "'w' appears twice"),
        (build_gguf(tensors=[TensorSpec("t", (), 0, bytes(4))]), "0 dimensions"),
        (build_gguf(tensors=[TensorSpec("t", (1,) * 5, 0, bytes(4))]), "5 dimensions"),
        (build_gguf(tensors=[TensorSpec("t", (0, 4), 0, b"")]), "is empty"),
        (build_gguf(tensors=[TensorSpec("t", (33,), 8, bytes(34))]), "no multiple"),
        (build_gguf(tensors=[TensorSpec("t", (4,), 99, bytes(16))]), "unknown type 99"),
        (build_gguf(tensors=[TensorSpec("t", (1 << 63,) * 4, 0, bytes(16))]), "truncated"),
        (build_gguf(tensors=[TensorSpec("t", (4,), 0, b""), TensorSpec("u", (4,), 0, bytes(32))]), "overlap"),
        (build_gguf(tensors=[TensorSpec("t", (4,), 0, bytes(16))], alignment=8)[:-4], "truncated"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in refusal(tmp_path, content)


def test_an_array_that_is_not_utf8_is_refused_when_it_is_decoded(tmp_path: Path) -> None:
    with (
        GGUFFile(write_gguf(tmp_path / "t.gguf", {"k": ["fine", b"\xc3"]})) as gguf,
        pytest.raises(ModelFormatError, match="element 1 of k is not UTF-8"),
    ):
        gguf.get_strings("k")


def test_a_misaligned_tensor_is_refused(tmp_path: Path) -> None:
    content = bytearray(build_gguf(tensors=[TensorSpec("t", (4,), 0, bytes(64))]))
    offset = content.index(b"t", 24) + 1 + 4 + 8 + 4
    content[offset : offset + 8] = struct.pack("<Q", 4)
    assert "not aligned" in refusal(tmp_path, bytes(content))


def test_hostile_counts_cost_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_ARRAY_STRINGS", 1000)
    monkeypatch.setattr(gguf_header, "MAX_TEXT_BYTES", 1000)
    many = Typed(b.STRING, [""] * 600)
    long = "x" * 600
    tracemalloc.start()
    try:
        assert "more than 1000 strings" in refusal(tmp_path, build_gguf({"a": many, "b": many}))
        assert "more than 1000 bytes" in refusal(tmp_path, build_gguf({"a": long, "b": long}))
        for count in (1 << 24, 1 << 40, (1 << 64) - 1):
            refusal(tmp_path, header(n_tensors=count) + bytes(1 << 16))
            refusal(tmp_path, header(n_keys=count) + bytes(1 << 16))
            refusal(tmp_path, header(n_keys=1) + text("k") + struct.pack("<IIQ", 9, 10, count) + bytes(1 << 10))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = build_gguf(METADATA, TENSORS)
    needed = len(whole) - (-16 % 32)
    for length in range(needed):
        refusal(tmp_path, whole[:length])


def test_random_damage_raises_nothing_but_our_errors(tmp_path: Path) -> None:
    whole = build_gguf(METADATA, TENSORS)
    source = random.Random(0)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            damaged[source.randrange(4, len(damaged))] = source.choice([0, 1, 127, 128, 255, source.randrange(256)])
        path.write_bytes(damaged)
        try:
            _read_all(path)
        except EdgeSpecError:
            refused += 1
    assert 100 < refused < 1500


def _read_all(path: Path) -> None:
    with GGUFFile(path) as gguf:
        for name in gguf.tensors:
            if gguf.tensors[name].type not in (GGMLType.I32,):
                gguf.raw(name)
        for key, item in gguf.metadata.items():
            if not isinstance(item, str | int | float):
                (gguf.get_strings if item.type == b.STRING else gguf.get_array)(key)
