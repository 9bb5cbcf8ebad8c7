"""Facts from a checkpoint as model hubs have them: `config.json`, and the headers of safetensors files beside it.

The config gives the shapes of the tensors that it implies. Where there are weights, the type that they have most
bytes of counts, and the number of their elements has to be the one that the config implies.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edge_spec.errors import ModelFormatError, ModelNotFoundError
from edge_spec.export.architecture import DecoderConfig
from edge_spec.export.reading import HEAD_DIM_STEP
from edge_spec.export.traits import TRAITS
from edge_spec.formats.gguf import GGMLType
from edge_spec.memory.checkpoint_families import (
    Family,
    Sizes,
    find_family,
    implied_shapes,
    layers_of_config,
    read_sizes,
)
from edge_spec.memory.facts import ModelFacts, Origin
from edge_spec.memory.read_export import shaped_tensor

CONFIG = "config.json"
MAX_HEADER_BYTES = 100 << 20
"""The safetensors format's own limit."""
MAX_LAYERS = 4096
_TOLERANCE = 0.005
"""Buffers that are stored beside weights (rotary frequencies), and heads stored twice, come to less than that."""

_TYPES = {"F64": GGMLType.F64, "F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}
_DTYPES = {"float32": GGMLType.F32, "float16": GGMLType.F16, "bfloat16": GGMLType.BF16}


def facts_of_checkpoint(path: Path) -> ModelFacts:
    """Facts of a checkpoint's folder, or of a bare config file.

    Raises ModelNotFoundError, ModelFormatError (also where config and weights disagree), UnsupportedArchitectureError.
    """
    file = path / CONFIG if path.is_dir() else path
    name = file.parent.resolve().name if file.name == CONFIG else file.stem
    config = _read_config(file)
    config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    family = find_family(config, name)
    sizes = read_sizes(config, family, name)
    if sizes.n_layer > MAX_LAYERS:
        raise ModelFormatError(f"{file}: {sizes.n_layer} layers")
    shapes = implied_shapes(config, family, sizes, name)
    kind = _DTYPES.get(str(config.get("torch_dtype") or config.get("dtype")), GGMLType.BF16)
    weights = sorted(file.parent.glob("*.safetensors")) if path.is_dir() else []
    if weights:
        kind = _check_weights(weights, sum(math.prod(shape) for shape in shapes.values()), sizes)
    decoder, refusal = _exportable(family, sizes, name)
    n_expert = int(config.get(family.experts) or 0) if family.experts else 0
    used = int(config.get("num_experts_per_tok") or 0) if n_expert else 0
    return ModelFacts(
        name=name,
        origin=Origin.CHECKPOINT if weights else Origin.CONFIG,
        architecture=family.architecture,
        hidden=sizes.hidden,
        n_head=sizes.n_head,
        n_ff=used * int(config.get("moe_intermediate_size") or sizes.n_ff) if n_expert else sizes.n_ff,
        n_vocab=sizes.n_vocab,
        n_ctx_train=sizes.n_ctx_train,
        layers=layers_of_config(config, family, sizes, name),
        tensors={tensor: shaped_tensor(tensor, shape, kind) for tensor, shape in shapes.items()},
        config=decoder,
        refusal=refusal,
        marked_ids=np.empty(0, np.int64),
        n_expert=n_expert,
        n_expert_used=used,
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as exc:
        raise ModelNotFoundError(f"there is no file {file}") from exc
    except (OSError, ValueError) as exc:
        raise ModelFormatError(f"{file} is no model's config: {exc}") from exc
    if not isinstance(config, dict):
        raise ModelFormatError(f"{file} is no model's config: it holds no object")
    return config


def _check_weights(files: list[Path], implied: int, sizes: Sizes) -> GGMLType:
    """The type that most weights have; ModelFormatError where their number is not the one that the config implies."""
    elements: Counter[str] = Counter()
    for file in files:
        for tensor in _read_header(file).values():
            elements[tensor["dtype"]] += math.prod(tensor["shape"])
    stored, dtype = sum(elements.values()), elements.most_common(1)[0][0]
    twice = sizes.n_vocab * sizes.hidden if sizes.tied else 0
    if not implied * (1 - _TOLERANCE) <= stored <= (implied + twice) * (1 + _TOLERANCE):
        raise ModelFormatError(
            f"{files[0].parent}: the weights have {stored:,} elements, the config implies {implied:,}; "
            "a part is missing, or the weights are of another model"
        )
    if dtype not in _TYPES:
        raise ModelFormatError(f"{files[0].parent}: weights of the type {dtype}; convert the model to a GGUF first")
    return _TYPES[dtype]


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensors of a safetensors file: eight bytes with the length of a JSON object, then that."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER_BYTES, file.stat().st_size):
                raise ValueError(f"a header of {length} bytes")  # noqa: TRY301
            header = json.loads(stream.read(length))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        for tensor in tensors.values():
            if not all(isinstance(size, int) and size >= 0 for size in tensor["shape"]):
                raise ValueError("a shape that is none")  # noqa: TRY301
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as exc:
        raise ModelFormatError(f"{file} is no safetensors file: {exc}") from exc
    else:
        return tensors


def _exportable(family: Family, sizes: Sizes, name: str) -> tuple[DecoderConfig | None, str | None]:
    """The decoder as the exporter would read it of the model's GGUF, for its shapes; or why there would be none."""
    if family.architecture not in TRAITS or family.experts:
        return None, f"the exporter knows the architectures {', '.join(TRAITS)}, not {name}'s ({family.architecture})"
    if sizes.head_dim % HEAD_DIM_STEP:
        return None, f"{name}: heads of {sizes.head_dim} values; the exporter wants multiples of {HEAD_DIM_STEP}"
    return DecoderConfig(
        architecture=family.architecture,
        n_layer=sizes.n_layer,
        hidden=sizes.hidden,
        n_head=sizes.n_head,
        n_kv_head=sizes.n_kv_head,
        head_dim=sizes.head_dim,
        n_ff=sizes.n_ff,
        n_vocab=sizes.n_vocab,
        n_ctx_train=sizes.n_ctx_train,
        rms_epsilon=1e-5,
        rope_base=1e4,
        rope_dim=sizes.head_dim,
        rope_interleaved=TRAITS[family.architecture].rope_interleaved,
        rope_factors=None,
        tied=sizes.tied,
    ), None
