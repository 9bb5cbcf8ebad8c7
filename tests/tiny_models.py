"""Tiny random-weight GGUF files: real in every field that a loader looks at, a few MiB on disk, quickly written.

llama.cpp loads them, so they stand in for a real model wherever only the plumbing is tested, and two readers of the
same file (llama.cpp and ours) can be compared.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = (
    " the", " and", " of", " to", " in", " is", "ing", "er", "re", "on", "def", " return", " self", "list", "merge",
    " sorted", "    ", "\n\n", " for", " if", " else", "ä", "é", " 日",
)  # fmt: skip
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5

_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 128,
    "rope.scaling.yarn_beta_fast": 16.0,
    "rope.scaling.yarn_log_multiplier": 0.5,
}
_LONG_ROPE = {"rope.scaling.original_context_length": 256, "rope.scaling.attn_factor": 1.2}
_WINDOWS = {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}


class Peculiar(NamedTuple):
    """What an architecture's file has that a llama's has not."""

    metadata: Mapping[str, Any] = {}
    """Keys without the architecture's name."""
    biases: bool = False
    fused: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    rope_pairs: int = 0
    """Length of the two tables that stretch the rotary embedding, if there are any."""


PECULIARITIES = {
    "llama": Peculiar(),
    "mistral3": Peculiar(_YARN | {"attention.temperature_scale": 0.1}),
    "smollm3": Peculiar(),
    "qwen2": Peculiar(biases=True),
    "qwen3": Peculiar(qk_norm=True),
    "phi3": Peculiar(_LONG_ROPE | {"rope.dimension_count": 48}, fused=True, rope_pairs=24),
    "gemma2": Peculiar(_WINDOWS | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}, post_norms=True),
    "gemma3": Peculiar(_WINDOWS | {"rope.freq_base": 1e6, "rope.scaling.factor": 8.0}, qk_norm=True, post_norms=True),
}

Blocks = NDArray[np.uint8]


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table), indexed by byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def tiny_vocabulary(n_vocab: int | None = None) -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges: 256 bytes, the merges' results, the specials, then padding up to `n_vocab`."""
    alphabet = byte_alphabet()
    tokens, merges = list(alphabet), []
    for word in _WORDS:
        left, *rest = (alphabet[byte] for byte in word.encode())
        for right in rest:
            merge = f"{left} {right}"
            left += right
            if left not in tokens:
                tokens.append(left)
                merges.append(merge)
    types = [_NORMAL] * len(tokens) + [_CONTROL] * len(SPECIAL_TOKENS)
    tokens += SPECIAL_TOKENS
    padding = 0 if n_vocab is None else n_vocab - len(tokens)
    assert padding >= 0, f"n_vocab must be at least {len(tokens)}"
    tokens += [f"[PAD{index}]" for index in range(padding)]
    return tokens, types + [_UNUSED] * padding, merges


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    tensor_type: str = "F32",
    tensor_types: Mapping[str, str] | None = None,
    tied: bool = True,
    n_layer: int = 2,
    hidden: int = 256,
    n_head: int = 4,
    n_kv_head: int = 2,
    ff: int = 512,
    n_ctx: int = 512,
    n_vocab: int | None = None,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model of one of the architectures in `PECULIARITIES`.

    Windows are of 8 tokens in every other layer, and soft caps small enough to matter, where an architecture has them.
    `tensor_type` is F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K or Q6_K, for every matrix; `tensor_types`
    makes exceptions by part of a tensor's name (`{"ffn_down": "Q6_K"}`). Norms and biases are F32, as everywhere.
    The same arguments write the same bytes. `metadata` sets keys (`{"general.name": "x"}`), None drops one.
    """
    peculiar = PECULIARITIES[architecture]
    head_dim = (metadata or {}).get(f"{architecture}.attention.key_length", hidden // n_head)
    tokens, vocabulary = vocabulary_metadata(n_vocab, pre="qwen2" if architecture == "qwen2" else "smollm")
    defaults = {
        f"{architecture}.block_count": n_layer,
        f"{architecture}.context_length": n_ctx,
        f"{architecture}.embedding_length": hidden,
        f"{architecture}.feed_forward_length": ff,
        f"{architecture}.attention.head_count": n_head,
        f"{architecture}.attention.head_count_kv": n_kv_head,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.rope.dimension_count": head_dim,
        f"{architecture}.vocab_size": len(tokens),
        **vocabulary,
    }
    defaults |= {f"{architecture}.{key}": value for key, value in peculiar.metadata.items()}
    shapes = _tensor_shapes(
        peculiar,
        n_vocab=len(tokens),
        n_layer=n_layer,
        hidden=hidden,
        head_dim=head_dim,
        n_head=n_head,
        n_kv_head=n_kv_head,
        ff=ff,
        tied=tied,
    )
    kinds = {"": tensor_type} | dict(tensor_types or {})
    return write_random_gguf(path, architecture, {**defaults, **(metadata or {})}, shapes, kinds, seed=seed)


def vocabulary_metadata(n_vocab: int | None, *, pre: str = "smollm") -> tuple[list[str], dict[str, Any]]:
    """The tokens of a file, and its keys for them, with a name and a chat template."""
    tokens, types, merges = tiny_vocabulary(n_vocab)
    return tokens, {
        "general.name": "tiny",  # llama.cpp gives names with phi3 in them a vocabulary of their own
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write_random_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    kinds: Mapping[str, str],
    *,
    seed: int = 0,
) -> Path:
    """Write random tensors of these NumPy shapes, with `metadata` (None drops a key).

    `kinds`: types of matrices by part of their name, the last that fits; vectors, norms and biases are F32.
    """
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key != "general.architecture" and value is not None:
            writer.add_key_value(key, value, *_value_type(value))
    for name, shape in shapes:
        if name.endswith("ssm_a"):  # rates of decay: below 0, or a recurrent state grows without bound
            writer.add_tensor(name, -rng.uniform(0.5, 1.5, shape).astype(np.float32))
            continue
        if len(shape) == 1:
            mean, std = (1.0, 0.1) if "norm" in name else (2.0, 0.2) if "rope" in name else (0.0, 0.1)
            writer.add_tensor(name, rng.normal(mean, std, shape).astype(np.float32))
            continue
        # An embedding well below the layers' unit scale: logits must depend on the context, not on the last token.
        std = 0.1 if "embd" in name or name.startswith("output") else shape[-1] ** -0.5
        chosen = [kind for part, kind in kinds.items() if part in name][-1]
        _add_matrix(writer, name, shape, std=std, kind=gguf.GGMLQuantizationType[chosen], rng=rng)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _value_type(value: Any) -> tuple[Any, Any]:
    """GGUF's type of a Python value, and of its elements."""
    import gguf

    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    if isinstance(value, list):
        element = gguf.GGUFValueType["INT32" if isinstance(value[0], int) else kinds[type(value[0])]]
        return gguf.GGUFValueType.ARRAY, element
    return gguf.GGUFValueType[kinds[type(value)]], None


def _tensor_shapes(
    peculiar: Peculiar,
    *,
    n_vocab: int,
    n_layer: int,
    hidden: int,
    head_dim: int,
    n_head: int,
    n_kv_head: int,
    ff: int,
    tied: bool,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and NumPy shapes ([out, in] for matrices) in file order."""
    queries, keys = n_head * head_dim, n_kv_head * head_dim
    inputs = {"attn_q": queries, "attn_k": keys, "attn_v": keys}
    gated = {"ffn_gate": ff, "ffn_up": ff}
    if peculiar.fused:
        inputs, gated = {"attn_qkv": queries + 2 * keys}, {"ffn_up": 2 * ff}
    yield "token_embd.weight", (n_vocab, hidden)
    for layer in range(n_layer):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (hidden,)
        for part, rows in inputs.items():
            yield f"{block}.{part}.weight", (rows, hidden)
            if peculiar.biases:
                yield f"{block}.{part}.bias", (rows,)
        if peculiar.qk_norm:
            yield f"{block}.attn_q_norm.weight", (head_dim,)
            yield f"{block}.attn_k_norm.weight", (head_dim,)
        yield f"{block}.attn_output.weight", (hidden, queries)
        yield f"{block}.ffn_norm.weight", (hidden,)
        for part, rows in gated.items():
            yield f"{block}.{part}.weight", (rows, hidden)
        yield f"{block}.ffn_down.weight", (hidden, ff)
        if peculiar.post_norms:
            yield f"{block}.post_attention_norm.weight", (hidden,)
            yield f"{block}.post_ffw_norm.weight", (hidden,)
    if peculiar.rope_pairs:
        yield "rope_factors_long.weight", (peculiar.rope_pairs,)
        yield "rope_factors_short.weight", (peculiar.rope_pairs,)
    yield "output_norm.weight", (hidden,)
    if not tied:
        yield "output.weight", (n_vocab, hidden)


def _add_matrix(
    writer: Any, name: str, shape: tuple[int, ...], *, std: float, kind: Any, rng: np.random.Generator
) -> None:
    if kind.name in _RANDOM_BLOCKS:
        assert shape[-1] % 256 == 0, "K-quants come in blocks of 256"
        blocks = _RANDOM_BLOCKS[kind.name](math.prod(shape) // 256, std, rng)
        writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=kind)
        return
    import gguf.quants

    values = rng.normal(0, std, shape).astype(np.float32)
    if kind.name == "F32":
        writer.add_tensor(name, values)
    elif kind.name == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _random_q4_k(count: int, std: float, rng: np.random.Generator) -> Blocks:
    """Blocks whose values d·scale·q − dmin·min are centred; drawn encoded, since gguf decodes K-quants only."""
    spread = 263.0  # standard deviation of scale·q − 7.5·min, for six-bit scales and mins and four-bit q
    scale = std / spread
    header = np.array([scale, 7.5 * scale], np.float16).view(np.uint8)
    payload = rng.integers(0, 256, (count, 12 + 128), np.uint8)
    return np.concatenate([np.broadcast_to(header, (count, 4)), payload], axis=1)


def _random_q6_k(count: int, std: float, rng: np.random.Generator) -> Blocks:
    """Blocks whose values are d·scale·(q − 32), with eight-bit scales and six-bit q."""
    payload = rng.integers(0, 256, (count, 128 + 64 + 16), np.uint8)
    header = np.array([std / 1365.0], np.float16).view(np.uint8)
    return np.concatenate([payload, np.broadcast_to(header, (count, 2))], axis=1)


_RANDOM_BLOCKS: dict[str, Callable[[int, float, np.random.Generator], Blocks]] = {
    "Q4_K": _random_q4_k,
    "Q6_K": _random_q6_k,
}


if __name__ == "__main__":
    print(write_tiny_gguf(Path(sys.argv[1]), architecture=sys.argv[2], tensor_type=sys.argv[3]))
