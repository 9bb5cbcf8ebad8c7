"""An export of ours in the form that onnxruntime-genai runs: token ids go in, logits of every position come out.

The matrices stay in the export's own file, which is linked beside the graph. What the engine of ours keeps outside of
the graph is put into it: the embedding table (float16), the rotary tables, the lengths. A trimmed head is refused:
genai wants logits of the whole vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from edge_spec.export import Export
from edge_spec.formats.gguf import GGUFFile

EMBEDDING = "token_embd.weight"
_TABLE_ROWS = 4096
"""Rows of the embedding table that are converted at a time."""


def write_genai_model(
    folder: Path,
    target: Export,
    draft: Export | None,
    *,
    n_ctx: int,
    threads: int,
    stop_ids: Collection[int],
) -> None:
    """Write the graphs and `genai_config.json` into `folder`; ValueError for an export that genai cannot run."""
    config: dict[str, Any] = {
        "model": {
            "type": target.config.architecture,
            "vocab_size": target.config.n_vocab,
            "context_length": n_ctx,
            "eos_token_id": sorted(stop_ids),
            "pad_token_id": min(stop_ids),
            "decoder": _write_decoder(folder, "target", target, n_ctx=n_ctx, threads=threads),
        },
        "search": {"do_sample": False, "max_length": n_ctx, "past_present_share_buffer": True},
    }
    if draft is not None:
        config["model"]["draft"] = _write_decoder(folder, "draft", draft, n_ctx=n_ctx, threads=threads)
    (folder / "genai_config.json").write_text(json.dumps(config, indent=1), "utf-8")


def _write_decoder(folder: Path, name: str, export: Export, *, n_ctx: int, threads: int) -> dict[str, Any]:
    import onnx

    if export.read_head_ids() is not None:
        raise ValueError(f"{export.path.name}: genai runs exports with a whole head only")
    config = export.config
    place = folder / name
    place.mkdir()
    _link(export.weights_file.resolve(), place / export.weights_file.name)
    model = onnx.load(export.model_file, load_external_data=False)
    _take_ids(model.graph, export, place, n_ctx)
    onnx.save_model(model, str(place / "model.onnx"))
    return {
        "filename": f"{name}/model.onnx",
        "session_options": {"log_id": name, "intra_op_num_threads": threads, "provider_options": []},
        "hidden_size": config.hidden,
        "head_size": config.head_dim,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key.%d",
            "past_value_names": "past_value.%d",
        },
        "outputs": {"logits": "logits", "present_key_names": "key.%d", "present_value_names": "value.%d"},
    }


def _take_ids(graph: Any, export: Export, place: Path, n_ctx: int) -> None:
    """Make `input_ids` and `attention_mask`, int64 [1, S] and [1, length], the graph's inputs beside the cache."""
    from onnx import TensorProto, helper, numpy_helper

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "length"])
    kept = [value for value in graph.input if value.name.startswith("past_")]
    del graph.input[:]
    graph.input.extend([ids, mask, *kept])
    graph.initializer.append(_embedding_table(export, place))
    constants = {
        "genai.zero": np.array(0, np.int64),
        "genai.one": np.array(1, np.int64),
        "genai.last_axis": np.array([1], np.int64),
        **export.config.rope_inputs(n_ctx, n_ctx),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    steps = [
        ("Gather", ["genai.table", "input_ids"], "genai.halves", {}),
        ("Cast", ["genai.halves"], "embeddings", {"to": TensorProto.FLOAT}),
        ("Shape", ["input_ids"], "genai.ids_shape", {}),
        ("Gather", ["genai.ids_shape", "genai.one"], "genai.tokens", {}),
        ("Range", ["genai.zero", "genai.tokens", "genai.one"], "rows", {}),
        ("ReduceSum", ["attention_mask", "genai.last_axis"], "genai.length", {"keepdims": 0}),
        ("Sub", ["genai.length", "genai.one"], "genai.newest", {}),
        ("Cast", ["genai.newest"], "seqlens_k", {"to": TensorProto.INT32}),
        ("Shape", ["attention_mask"], "genai.mask_shape", {}),
        ("Gather", ["genai.mask_shape", "genai.one"], "genai.total", {}),
        ("Cast", ["genai.total"], "total_sequence_length", {"to": TensorProto.INT32}),
    ]
    nodes = [helper.make_node(kind, given, [out], name=out, **fields) for kind, given, out, fields in steps]
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def _embedding_table(export: Export, place: Path) -> Any:
    """The table as an initializer in a file of its own, float16 [n_vocab, hidden]."""
    from onnx import TensorProto

    n_vocab, hidden = export.config.n_vocab, export.config.hidden
    with GGUFFile(export.source_file) as source, (place / "embeddings.bin").open("wb") as file:
        for start in range(0, n_vocab, _TABLE_ROWS):
            rows = np.arange(start, min(start + _TABLE_ROWS, n_vocab))
            file.write(source.dequantize(EMBEDDING, rows).astype(np.float16).tobytes())
    table = TensorProto(name="genai.table", data_type=TensorProto.FLOAT16, dims=[n_vocab, hidden])
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "embeddings.bin"), ("offset", 0), ("length", 2 * n_vocab * hidden)):
        table.external_data.add(key=key, value=str(value))
    return table


def _link(file: Path, place: Path) -> None:
    """A second name for a file; a copy where the file system has none."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
