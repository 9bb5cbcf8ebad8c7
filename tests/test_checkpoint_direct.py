"""Laws of checkpoints that our own graph builder takes: an export of one is the export of the GGUF made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_spec.backends.onnx import OnnxModel
from edge_spec.checkpoint.families import FAMILIES
from edge_spec.engine import Engine
from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError, UsageError
from edge_spec.export import RECIPES, Export, export_model
from edge_spec.export.folder import DESCRIPTION
from edge_spec.export.reading import read_config
from edge_spec.export.source import open_source, refusal_of
from edge_spec.export.traits import SUPPORTED
from edge_spec.formats.gguf import GGUFFile
from edge_spec.loading import find_source, running_backends
from edge_spec.memory.estimate import estimate
from edge_spec.memory.levers import find_levers
from edge_spec.memory.locate import find_facts
from edge_spec.memory.parts import Settings
from edge_spec.store import Store
from tests.checkpoint_of_gguf import MODEL_TYPES, write_checkpoint_of
from tests.tiny_checkpoint import tokenizer_json, write_safetensors
from tests.tiny_models import write_tiny_gguf

SIZES = {"n_layer": 4, "hidden": 128, "n_head": 4, "n_kv_head": 2, "ff": 256, "n_vocab": 512}


def pair(folder: Path, model_type: str = "llama", *, dtype: str = "F32", **options: Any) -> tuple[Path, Path]:
    """A tiny GGUF, and a checkpoint with the same weights."""
    config = options.pop("config", None)
    width = {"hidden": 256} if model_type == "phi3" else {}
    sizes = {**SIZES, **width, "tied": not model_type.startswith(("qwen", "mistral")), **options}
    kind = {"tensor_type": "BF16"} if dtype == "BF16" else {}
    gguf = write_tiny_gguf(folder / "tiny.gguf", architecture=MODEL_TYPES[model_type], **{**sizes, **kind})
    return gguf, write_checkpoint_of(gguf, folder / "checkpoint", model_type, dtype=dtype, config=config)


def export(source: Path, to: Path, recipe: str = "int8") -> Export:
    return export_model(source, RECIPES[recipe], to, sha256="0" * 64, threads=1)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    changed = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(changed))


def test_every_architecture_of_the_exporter_is_known_as_a_checkpoint() -> None:
    # Checkpoints of mistral3 hold a picture tower; nobody has made a text-only one.
    assert {family.architecture for family in FAMILIES.values()} == set(SUPPORTED) - {"mistral3"}
    assert set(FAMILIES) == set(MODEL_TYPES)


# The same export, byte for byte


@pytest.mark.parametrize(
    ("model_type", "recipe"),
    [*((name, recipe) for name in MODEL_TYPES for recipe in ("int8", "int4")), ("llama", "draft"), ("qwen2", "draft")],
)
def test_an_export_of_a_checkpoint_is_that_of_its_gguf(model_type: str, recipe: str, tmp_path: Path) -> None:
    vocabulary: dict[str, Any] = {"n_vocab": 40000, "n_layer": 1, "hidden": 64} if recipe == "draft" else {}
    gguf, checkpoint = pair(tmp_path, model_type, **vocabulary)
    ours, theirs = export(checkpoint, tmp_path / "ours", recipe), export(gguf, tmp_path / "theirs", recipe)
    assert ours.weights_file.read_bytes() == theirs.weights_file.read_bytes()
    assert same_numbers(ours, theirs)
    files = [{file.name for file in made.path.iterdir()} for made in (ours, theirs)]
    assert files[0] == files[1]
    assert ("head_ids.npy" in files[0]) == (recipe == "draft")
    for made in (ours, theirs):
        assert made.config == ours.config


def same_numbers(ours: Export, theirs: Export) -> bool:
    """Whether both exports give the same logits, to the bit but where a norm was stored less one."""
    logits = []
    for made in (ours, theirs):
        model = OnnxModel(made, name="tiny", n_ctx=64, threads=1, max_rows=20)
        logits.append(model.decode(list(range(3, 23)), rows=20).logits.copy())
        model.close()
    if ours.config.architecture.startswith("gemma"):
        return bool(np.abs(logits[0] - logits[1]).max() < 1e-4)
    return np.array_equal(logits[0], logits[1])


def test_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    gguf, checkpoint = pair(tmp_path, "qwen3", dtype="BF16")
    with open_source(checkpoint) as ours, GGUFFile(gguf) as theirs:
        for name, tensor in theirs.tensors.items():
            expected = theirs.dequantize(name)
            if len(tensor.shape) == 1:
                expected = (expected.view(np.uint32) & 0xFFFF0000).view(np.float32)
            np.testing.assert_array_equal(ours.dequantize(name), expected, err_msg=name)
            assert len(tensor.shape) == 1 or ours.tensors[name].type == tensor.type


def test_rows_are_picked_in_a_gguf_s_order(tmp_path: Path) -> None:
    gguf, checkpoint = pair(tmp_path, "llama")
    rows = np.array([5, 1, 127, 64])
    with open_source(checkpoint) as ours, GGUFFile(gguf) as theirs:
        for name in ("blk.1.attn_q.weight", "blk.1.attn_v.weight", "token_embd.weight"):
            np.testing.assert_array_equal(ours.raw(name), theirs.raw(name))
            for part in (rows % theirs.tensors[name].shape[0], slice(3, 40)):
                np.testing.assert_array_equal(ours.dequantize(name, part), theirs.dequantize(name, part))


def test_biases_of_a_llama_are_reordered_with_their_rows(tmp_path: Path) -> None:
    gguf, checkpoint = pair(tmp_path, "llama")
    with open_source(checkpoint) as source:
        order = source.raw("blk.0.attn_q.weight").view(np.float32)[:, 0]
    with GGUFFile(gguf) as theirs:
        expected = theirs.dequantize("blk.0.attn_q.weight")[:, 0]
    np.testing.assert_array_equal(order, expected)
    tensors = stored(checkpoint)
    for layer in range(4):
        for part in "qk":
            name = f"model.layers.{layer}.self_attn.{part}_proj"
            tensors[f"{name}.bias"] = ("F32", tensors[f"{name}.weight"][1][:, 0])
    write_safetensors(checkpoint / "model.safetensors", tensors)
    with open_source(checkpoint) as source:
        np.testing.assert_array_equal(source.dequantize("blk.0.attn_q.bias"), expected)


def stored(checkpoint: Path) -> dict[str, Any]:
    from edge_spec.formats.safetensors import SafetensorsFile

    with SafetensorsFile(checkpoint / "model.safetensors") as file:
        return {name: ("F32", file.values(name)) for name in file.tensors}


# The numbers of the config


@pytest.mark.parametrize(
    ("scaling", "check"),
    [
        ({"rope_type": "linear", "factor": 4.0}, lambda c: c.rope_factors == (4.0,) * 16),
        ({"rope_type": "default"}, lambda c: c.rope_factors is None),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            lambda c: c.rope_magnitude == pytest.approx(1 + 0.1 * np.log(4)) and c.rope_factors[-1] == 4.0,
        ),
        (
            {"type": "yarn", "factor": 4.0, "attention_factor": 1.0, "original_max_position_embeddings": 128},
            lambda c: c.rope_magnitude == pytest.approx(1.0),
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            lambda c: c.rope_factors[0] == 1.0 and c.rope_factors[-1] == 8.0 and sorted(c.rope_factors)[8] > 1,
        ),
    ],
)
def test_a_stretched_rotary_embedding_is_read(scaling: dict[str, Any], check: Any, tmp_path: Path) -> None:
    _, checkpoint = pair(tmp_path, "llama", config={"rope_scaling": scaling})
    with open_source(checkpoint) as source:
        assert check(read_config(source))
    later = {"rope_parameters": scaling | {"rope_theta": 10000.0}, "rope_scaling": None, "rope_theta": None}
    change_config(checkpoint, **later)
    with open_source(checkpoint) as source:
        assert check(read_config(source))


@pytest.mark.parametrize(
    ("model_type", "change", "windows"),
    [
        ("mistral", {"sliding_window": 16}, (16, 16, 16, 16)),
        ("mistral", {"sliding_window": 4096}, ()),
        ("phi3", {"sliding_window": 100}, (100, 100, 100, 100)),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, ()),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, (0, 0, 16, 16)),
        ("gemma2", {"layer_types": None}, (8, 0, 8, 0)),
        ("gemma3_text", {"layer_types": None}, (8, 8, 8, 8)),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 3}, (8, 8, 0, 8)),
    ],
)
def test_windows_are_those_of_the_config(
    model_type: str, change: dict[str, Any], windows: tuple[int, ...], tmp_path: Path
) -> None:
    _, checkpoint = pair(tmp_path, model_type, config=change)
    with open_source(checkpoint) as source:
        assert read_config(source).windows == windows


# What is refused


@pytest.mark.parametrize(
    ("model_type", "change", "error", "says"),
    [
        ("llama", {"model_type": "mamba"}, UnsupportedArchitectureError, "'mamba'"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedArchitectureError, "'dynamic'"),
        ("llama", {"hidden_act": "relu"}, UnsupportedArchitectureError, "'relu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, UnsupportedArchitectureError, "gptq"),
        ("gemma2", {"query_pre_attn_scalar": 100}, UnsupportedArchitectureError, "query_pre_attn_scalar is 100"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, UnsupportedArchitectureError, "three of four"),
        ("llama", {"rms_norm_eps": "small"}, ModelFormatError, "rms_norm_eps is 'small'"),
        ("llama", {"rope_theta": -1.0}, ModelFormatError, "rope_theta is -1.0"),
        ("llama", {"num_hidden_layers": 0}, ModelFormatError, "num_hidden_layers is 0"),
        ("llama", {"hidden_size": 1 << 40}, ModelFormatError, "beyond those of any model"),
        ("llama", {"num_attention_heads": 1 << 30}, ModelFormatError, "q_proj.weight has the shape"),
        ("llama", {"num_hidden_layers": 5}, ModelFormatError, r"model\.layers\.4\.input_layernorm\.weight is missing"),
        ("llama", {"intermediate_size": 99}, ModelFormatError, r"mlp\.gate_proj\.weight has the shape"),
        ("llama", {"vocab_size": 600}, ModelFormatError, "vocab_size is 600, and token_embd.weight has 512 rows"),
        ("llama", {"tie_word_embeddings": False}, ModelFormatError, r"the tensor lm_head\.weight is missing"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, ModelFormatError, "short_factor is no list"),
    ],
)
def test_a_config_that_departs_is_refused_by_name(
    model_type: str, change: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    _, checkpoint = pair(tmp_path, model_type, config=change)
    with pytest.raises(error, match=says):
        export(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def bad_tensors() -> Iterator[Any]:
    gate = "model.layers.2.mlp.gate_proj.weight"
    yield "missing", gate, None, ModelFormatError, rf"the tensor {gate} is missing"
    yield "shape", gate, ("F32", np.ones((7, 128))), ModelFormatError, rf"{gate} has the shape \(7, 128\)"
    yield "integers", gate, ("I64", np.ones((256, 128))), ModelFormatError, rf"{gate} holds integers"
    yield "not finite", gate, ("F32", np.full((256, 128), np.nan)), ModelFormatError, rf"{gate} holds values"
    odd = "model.layers.2.mlp.router.weight"
    yield "unknown", odd, ("F32", np.ones((4, 128))), UnsupportedArchitectureError, rf"no use for the tensor {odd}"
    query = "model.layers.1.self_attn.q_proj.weight"
    yield "query", query, ("F32", np.ones((96, 128))), ModelFormatError, rf"{query} has the shape"


@pytest.mark.parametrize(
    ("name", "values", "error", "says"), [pytest.param(*bad[1:], id=bad[0]) for bad in bad_tensors()]
)
def test_a_bad_tensor_is_refused_by_the_checkpoint_s_own_name(
    name: str, values: Any, error: type[Exception], says: str, tmp_path: Path
) -> None:
    _, checkpoint = pair(tmp_path, "llama")
    tensors = {key: value for key, value in stored(checkpoint).items() if key != name}
    write_safetensors(checkpoint / "model.safetensors", tensors | ({} if values is None else {name: values}))
    with pytest.raises(error, match=says):
        export(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_head_that_is_tied_may_be_stored_too_and_buffers_are_left_alone(tmp_path: Path) -> None:
    _, checkpoint = pair(tmp_path, "llama")
    tensors = stored(checkpoint)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", np.ones(16, np.float32))
    expected = export(checkpoint, tmp_path / "plain").weights_file.read_bytes()
    write_safetensors(checkpoint / "model.safetensors", tensors)
    assert export(checkpoint, tmp_path / "out").weights_file.read_bytes() == expected


# The engine, the store, the plan


def test_the_engine_exports_a_checkpoint_at_its_first_use_and_drafts_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    gguf, checkpoint = pair(tmp_path, "qwen2", dtype="F32")
    texts = []
    for draft, drafter in ((None, "lookup"), (checkpoint, "model")):
        with Engine.load(
            target=checkpoint, draft=draft, drafter=drafter, n_ctx=96, threads=1, backend="onnx"
        ) as engine:
            result = engine.generate("the list the list", max_tokens=24)
            assert (result.recipe, result.backend) == ("int8", "onnx")
            texts.append(result.text)
    assert texts[0] == texts[1]
    made = [path.parent for path in (tmp_path / "home").rglob(DESCRIPTION)]
    assert sorted(path.name.rsplit("-", 1)[0] for path in made) == ["draft", "int8"]
    with pytest.raises(UsageError, match=r"convert_hf_to_gguf\.py"):
        Engine.load(target=checkpoint, drafter="lookup", backend="llama")
    ours = find_facts(Store(), str(checkpoint))
    theirs = find_facts(Store(), str(gguf))
    assert (ours.origin, ours.config, ours.layers, ours.refusal) == ("checkpoint", theirs.config, theirs.layers, None)
    assert ours.tensor_bytes == theirs.tensor_bytes


def test_a_checkpoint_is_never_offered_what_runs_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    gguf, checkpoint = pair(tmp_path, "qwen2")
    assert "llama" in running_backends(find_source(Store(), gguf))
    assert "llama" not in running_backends(find_source(Store(), checkpoint))
    counted = estimate(find_facts(Store(), str(checkpoint)), None, Settings(n_ctx=1024))
    assert not [lever for lever in find_levers(counted) if "llama" in lever.option]


def test_what_only_optimum_can_export_is_told_by_a_reason(tmp_path: Path) -> None:
    _, checkpoint = pair(tmp_path, "llama")
    assert refusal_of(checkpoint) is None
    change_config(checkpoint, hidden_act="relu")
    assert "relu" in str(refusal_of(checkpoint))


@pytest.mark.real
def test_a_real_model_says_the_same_as_checkpoint_and_as_gguf(smollm2_path: Path, tmp_path: Path) -> None:
    """SmolLM2's weights, as its GGUF has them, in a checkpoint of float32."""
    vocabulary = tokenizer_of(smollm2_path)
    checkpoint = write_checkpoint_of(smollm2_path, tmp_path / "checkpoint", "llama", tokenizer=vocabulary)
    paths, texts = [tmp_path / "ours", tmp_path / "theirs"], []
    with GGUFFile(smollm2_path) as gguf:
        (checkpoint / "chat_template.jinja").write_text(gguf.get_str("tokenizer.chat_template"))
    made = [export(source, path) for source, path in zip((checkpoint, smollm2_path), paths, strict=True)]
    ours, theirs = (np.fromfile(one.weights_file, np.uint8) for one in made)
    assert np.array_equal(ours, theirs)
    for target in paths:
        with Engine.load(target=target, drafter="lookup", n_ctx=256) as engine:
            messages = "Write two sentences about the sea, then 3 * 14 = 42."
            texts.append(engine.generate(messages, max_tokens=32).token_ids)
    assert texts[0] == texts[1]


def tokenizer_of(path: Path) -> dict[str, Any]:
    """The tokenizer.json that a byte-level vocabulary in a GGUF came from, with SmolLM's way of cutting words."""
    with GGUFFile(path) as gguf:
        tokens, merges = (gguf.get_strings(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
        types = gguf.get_array("tokenizer.ggml.token_type")
    described = tokenizer_json()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": int(i), "content": tokens[i], "special": True} | flags for i in np.flatnonzero(types == 3)]
    cuts = [{"type": "Digits", "individual_digits": True}, described["pre_tokenizer"]]
    model = described["model"] | {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    return described | {
        "added_tokens": special,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": None,
        "model": model,
    }
