"""Tiny checkpoints as Hugging Face lays them out, and the graph that optimum would make of one, written by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tests.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_vocabulary

if TYPE_CHECKING:
    import onnx

HIDDEN, N_HEAD, N_LAYER, N_CTX, N_VOCAB = 64, 4, 2, 128, 512
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64}

Array = NDArray[Any]


def tokenizer_json(n_vocab: int = N_VOCAB) -> dict[str, Any]:
    """A byte-level tokenizer of so many tokens, the vocabulary of `tiny_models`; bos comes before a text."""
    tokens, _, merges = tiny_vocabulary(n_vocab)
    special = [{"id": tokens.index(token), "content": token, "special": True} for token in SPECIAL_TOKENS]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    start = {"id": "<|im_start|>", "type_id": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token | flags for token in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": start}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|im_start|>": {
                    "id": "<|im_start|>",
                    "ids": [tokens.index("<|im_start|>")],
                    "tokens": ["<|im_start|>"],
                }
            },
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def write_checkpoint(
    path: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[str, Array]] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """A folder of an architecture that nothing here builds; `config` changes keys, None drops one."""
    path.mkdir(parents=True)
    sizes = {
        "model_type": "gpt_tiny",
        "vocab_size": N_VOCAB,
        "hidden_size": HIDDEN,
        "num_attention_heads": N_HEAD,
        "num_hidden_layers": N_LAYER,
        "max_position_embeddings": N_CTX,
    }
    described = {key: value for key, value in {**sizes, **(config or {})}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(described))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer or tokenizer_json()))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [N_VOCAB - 1]}))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_safetensors(path / "model.safetensors", tensors or {"wte": ("F32", np.zeros((N_VOCAB, HIDDEN), np.float32))})
    return path


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> Path:
    """A file of these tensors, each with the name of its type."""
    header, data = {}, b""
    for name, (dtype, values) in tensors.items():
        raw = np.ascontiguousarray(values, DTYPES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_optimum_graph(path: Path, *, seed: int = 0) -> Path:
    """A float32 decoder in optimum's layout, with every form of product that its exporter writes.

    Learned positions, layer norms, attention over a concatenated cache; MatMul, Gemm with and without a transposed
    matrix, a matrix behind an Identity, and a head that is the transposed embedding.
    """
    import onnx

    builder = _Graph(np.random.default_rng(seed))
    graph = builder.build()
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return path


class _Graph:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def build(self) -> onnx.GraphProto:
        from onnx import TensorProto, helper, numpy_helper

        head_dim = HIDDEN // N_HEAD
        self.matrix("wte", N_VOCAB, HIDDEN, 0.3)
        self.matrix("wpe", N_CTX, HIDDEN, 0.3)
        self.op("Identity", ["wte"], "wte.copy")
        self.op("Gather", ["wte.copy", "input_ids"], "embedded", axis=0)
        self.op("Gather", ["wpe", "position_ids"], "placed", axis=0)
        x = self.op("Add", ["embedded", "placed"], "x")
        self.op("Shape", ["attention_mask"], "mask.shape")
        self.op("Gather", ["mask.shape", self.shape("one", 1)], "total", axis=0)
        self.op(
            "Range", [self.number("zero", 0), self.op("Squeeze", ["total"], "total.0"), self.number("step", 1)], "keys"
        )
        self.op("Unsqueeze", ["position_ids", self.shape("last", 2)], "queries")
        self.op("LessOrEqual", ["keys", "queries"], "visible.3")
        self.op("Unsqueeze", ["visible.3", self.shape("heads.axis", 1)], "visible")
        for layer in range(N_LAYER):
            x = self.layer(layer, x, head_dim)
        self.op("Transpose", ["wte"], "head", perm=[1, 0])
        self.op("MatMul", [self.norm("final", x), "head"], "logits")
        inputs = [("input_ids", ["b", "s"]), ("attention_mask", ["b", "t"]), ("position_ids", ["b", "s"])]
        ints = [helper.make_tensor_value_info(name, TensorProto.INT64, dims) for name, dims in inputs]
        caches = [(f"{i}.{kind}") for i in range(N_LAYER) for kind in ("key", "value")]

        def floats(prefix: str, length: str) -> Iterator[onnx.ValueInfoProto]:
            for name in caches:
                dims = ["b", N_HEAD, length, head_dim]
                yield helper.make_tensor_value_info(f"{prefix}.{name}", TensorProto.FLOAT, dims)

        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", N_VOCAB])
        return helper.make_graph(
            self.nodes,
            "tiny",
            [*ints, *floats("past_key_values", "p")],
            [logits, *floats("present", "t")],
            [numpy_helper.from_array(values, name) for name, values in self.constants.items()],
        )

    def layer(self, layer: int, x: str, head_dim: int) -> str:
        name = f"layer.{layer}"
        self.op("MatMul", [self.norm(f"{name}.1", x), self.matrix(f"{name}.qkv", HIDDEN, 3 * HIDDEN)], f"{name}.all")
        self.op("Split", [f"{name}.all"], f"{name}.q", f"{name}.k", f"{name}.v", axis=-1, num_outputs=3)
        apart = self.shape("apart", 0, 0, N_HEAD, head_dim)
        for part in "qkv":
            self.op("Reshape", [f"{name}.{part}", apart], f"{name}.{part}.4")
            self.op("Transpose", [f"{name}.{part}.4"], f"{name}.{part}.h", perm=[0, 2, 1, 3])
        for part, kind in (("k", "key"), ("v", "value")):
            past = f"past_key_values.{layer}.{kind}"
            self.op("Concat", [past, f"{name}.{part}.h"], f"present.{layer}.{kind}", axis=2)
        self.op("Transpose", [f"present.{layer}.key"], f"{name}.keys", perm=[0, 1, 3, 2])
        self.op("MatMul", [f"{name}.q.h", f"{name}.keys"], f"{name}.scores")
        self.op("Mul", [f"{name}.scores", self.float("scale", head_dim**-0.5)], f"{name}.scaled")
        self.op("Where", ["visible", f"{name}.scaled", self.float("hidden", -1e9)], f"{name}.masked")
        self.op("Softmax", [f"{name}.masked"], f"{name}.weights", axis=-1)
        self.op("MatMul", [f"{name}.weights", f"present.{layer}.value"], f"{name}.seen")
        self.op("Transpose", [f"{name}.seen"], f"{name}.seen.t", perm=[0, 2, 1, 3])
        joined = self.op("Reshape", [f"{name}.seen.t", self.shape("joined", 0, 0, HIDDEN)], f"{name}.joined")
        self.op("Identity", [self.matrix(f"{name}.o", HIDDEN, HIDDEN)], f"{name}.o.copy")
        x = self.op("Add", [x, self.op("MatMul", [joined, f"{name}.o.copy"], f"{name}.out")], f"{name}.x")
        flat = self.op("Reshape", [self.norm(f"{name}.2", x), self.shape("flat", -1, HIDDEN)], f"{name}.flat")
        up = [flat, self.matrix(f"{name}.up", 2 * HIDDEN, HIDDEN), self.vector(f"{name}.up.bias", 2 * HIDDEN, 0.0)]
        self.op("Relu", [self.op("Gemm", up, f"{name}.wide", transB=1)], f"{name}.active")
        down = [
            f"{name}.active",
            self.matrix(f"{name}.down", 2 * HIDDEN, HIDDEN),
            self.vector(f"{name}.b", HIDDEN, 0.0),
        ]
        self.op("Gemm", down, f"{name}.narrow")
        self.op("Reshape", [f"{name}.narrow", self.shape("unflat", 1, -1, HIDDEN)], f"{name}.branch")
        return self.op("Add", [x, f"{name}.branch"], f"{name}.end")

    def norm(self, name: str, x: str) -> str:
        gain, bias = self.vector(f"{name}.gain", HIDDEN, 1.0), self.vector(f"{name}.shift", HIDDEN, 0.0)
        return self.op("LayerNormalization", [x, gain, bias], f"{name}.normed", axis=-1)

    def op(self, kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, list(outputs), name=outputs[0], **attributes))
        return outputs[0]

    def matrix(self, name: str, rows: int, columns: int, std: float | None = None) -> str:
        values = self.rng.normal(0, std or HIDDEN**-0.5, (rows, columns))
        self.constants[name] = values.astype(np.float32)
        return name

    def vector(self, name: str, length: int, mean: float) -> str:
        self.constants[name] = self.rng.normal(mean, 0.1, length).astype(np.float32)
        return name

    def float(self, name: str, value: float) -> str:
        self.constants[name] = np.array(value, np.float32)
        return name

    def number(self, name: str, value: int) -> str:
        self.constants[name] = np.array(value, np.int64)
        return name

    def shape(self, name: str, *values: int) -> str:
        self.constants[name] = np.array(values, np.int64)
        return name
