"""What each layer of a known architecture keeps of a sequence, from the metadata of a GGUF.

Source of every entry and formula: llama.cpp, `src/models/*.cpp` (load_arch_hparams) and `src/llama-hparams.cpp`
(n_embd_r, n_embd_s). An architecture that is in none of the tables is refused: its cache would be a guess.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError
from edge_spec.formats.gguf import GGUFArray, GGUFFile
from edge_spec.memory.facts import Layer

MAX_LAYERS = 4096

_FULL = """
llama mistral3 smollm3 qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe phi2 phi3 phimoe gemma starcoder
starcoder2 falcon gpt2 gptneox mpt bloom baichuan stablelm command-r olmo olmoe internlm2 minicpm xverse dbrx granite
granitemoe exaone glm4 chatglm nemotron deepseek orion arctic refact codeshell bitnet jais arcee ernie4_5 ernie4_5-moe
hunyuan-dense hunyuan-moe seed_oss dots1 bailingmoe apertus deci openelm
"""
FULL = frozenset(_FULL.split())
"""Every layer sees, and keeps, the whole context: multi-head, grouped-query and multi-query attention."""


@dataclass(frozen=True, slots=True)
class _Windows:
    """Every so many-th layer sees all tokens, the others the last `default` ones (0: the file has to say)."""

    every: int
    default: int = 0
    full_first: bool = False


WINDOWED = {
    "gemma2": _Windows(2, 4096),
    "gemma3": _Windows(6),
    "cohere2": _Windows(4),
    "exaone4": _Windows(4, 4096),
    "gpt-oss": _Windows(2),
    "llama4": _Windows(4, 8192),
    "olmo2": _Windows(4),
    "smallthinker": _Windows(4, 4096, full_first=True),
    "plamo3": _Windows(8),
}
"""Windowed and full layers take turns."""

LATENT = frozenset({"deepseek2"})
"""Multi-head latent attention: one compressed key a token, no values, where the file has the absorbed projections."""

RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
"""States of a fixed size instead of a cache."""

HYBRID = frozenset(
    {"jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "qwen3next", "qwen35"}
)
"""Recurrent layers and attention layers, or layers that are both (falcon-h1)."""

KNOWN = FULL | WINDOWED.keys() | LATENT | RECURRENT | HYBRID


def layers_of(gguf: GGUFFile) -> tuple[Layer, ...]:
    """The layers of a model. UnsupportedArchitectureError names an architecture that is not known here."""
    architecture = gguf.architecture
    if architecture not in KNOWN:
        raise UnsupportedArchitectureError(
            f"{gguf.path.name}: what the architecture {architecture!r} keeps of a context is not known here, and is "
            f"not guessed; known are {', '.join(sorted(KNOWN))}"
        )
    n_layer = gguf.hparam_int("block_count")
    if not 0 < n_layer <= MAX_LAYERS:
        raise ModelFormatError(f"{gguf.path}: {n_layer} layers")
    if architecture in RECURRENT:
        return (Layer(conv_state=_conv_state(gguf), recurrent_state=_recurrent_state(gguf)),) * n_layer
    attention = _attention(gguf, n_layer)
    if architecture not in HYBRID:
        return attention
    state = Layer(conv_state=_conv_state(gguf), recurrent_state=_recurrent_state(gguf))
    attends = architecture == "falcon-h1"
    return tuple(
        _joined(layer, state, attends=attends) if recurrent else layer
        for layer, recurrent in zip(attention, _recurrent(gguf, attention), strict=True)
    )


def _attention(gguf: GGUFFile, n_layer: int) -> tuple[Layer, ...]:
    heads = by_layer(gguf, "attention.head_count", n_layer) or (1,) * n_layer
    kv_heads = by_layer(gguf, "attention.head_count_kv", n_layer) or heads
    default = gguf.hparam_int("embedding_length") // max(1, heads[0] or max(heads))
    key_dim = gguf.hparam_int("attention.key_length", default)
    value_dim = gguf.hparam_int("attention.value_length", default)
    if gguf.architecture in LATENT and gguf.hparam_int("attention.key_length_mla", 0):
        value_dim = 0
    windows = _windows(gguf, n_layer)
    return tuple(
        Layer(kv_heads=count, key_dim=key_dim, value_dim=value_dim, window=window)
        for count, window in zip(kv_heads, windows, strict=True)
    )


def _windows(gguf: GGUFFile, n_layer: int) -> tuple[int, ...]:
    pattern = WINDOWED.get(gguf.architecture)
    window = gguf.hparam_int("attention.sliding_window", pattern.default) if pattern else 0
    if pattern is None or window <= 0:
        return (0,) * n_layer
    flags = by_layer(gguf, "attention.sliding_window_pattern", n_layer)
    if flags and isinstance(gguf.metadata[gguf.hparam("attention.sliding_window_pattern")], GGUFArray):
        return tuple(window if flag else 0 for flag in flags)
    every, full = flags[0] if flags else pattern.every, 0 if pattern.full_first else -1
    return tuple(0 if every > 0 and layer % every == full % every else window for layer in range(n_layer))


def _recurrent(gguf: GGUFFile, attention: tuple[Layer, ...]) -> tuple[bool, ...]:
    """Which layers of a hybrid are recurrent."""
    n_layer, architecture = len(attention), gguf.architecture
    if architecture == "falcon-h1":
        return (True,) * n_layer
    if architecture in ("qwen3next", "qwen35"):
        every = gguf.hparam_int("full_attention_interval", 4)
        return tuple((layer + 1) % max(1, every) != 0 for layer in range(n_layer))
    without_heads = tuple(not layer.kv_heads for layer in attention)
    if architecture == "nemotron_h":
        widths = by_layer(gguf, "feed_forward_length", n_layer) or (0,) * n_layer
        return tuple(none and not width for none, width in zip(without_heads, widths, strict=True))
    return without_heads


def _joined(layer: Layer, state: Layer, *, attends: bool) -> Layer:
    """A recurrent layer; only falcon-h1's attend as well, whatever heads the other files name for theirs."""
    return replace(layer if attends else Layer(), conv_state=state.conv_state, recurrent_state=state.recurrent_state)


def _conv_state(gguf: GGUFFile) -> int:
    hidden = gguf.hparam_int("embedding_length")
    if gguf.hparam_int("wkv.head_size", 0):
        return gguf.hparam_int("token_shift_count", 2) * hidden
    if kernel := gguf.hparam_int("shortconv.l_cache", 0):
        return hidden * (kernel - 1)
    inner, state = gguf.hparam_int("ssm.inner_size"), gguf.hparam_int("ssm.state_size")
    width = inner + 2 * gguf.hparam_int("ssm.group_count", 0) * state
    return max(0, gguf.hparam_int("ssm.conv_kernel") - 1) * width


def _recurrent_state(gguf: GGUFFile) -> int:
    if size := gguf.hparam_int("wkv.head_size", 0):
        return gguf.hparam_int("embedding_length") * size
    if gguf.hparam_int("shortconv.l_cache", 0):
        return 0
    return gguf.hparam_int("ssm.state_size") * gguf.hparam_int("ssm.inner_size")


def by_layer(gguf: GGUFFile, name: str, n_layer: int) -> tuple[int, ...]:
    """A parameter that is one number, or one a layer, for each layer; empty where the file has none."""
    key = gguf.hparam(name)
    value = gguf.metadata.get(key)
    if value is None:
        return ()
    if not isinstance(value, GGUFArray):
        return (gguf.get_int(key),) * n_layer
    numbers = tuple(int(number) for number in gguf.get_array(key))
    if len(numbers) < n_layer:
        raise ModelFormatError(f"{gguf.path}: {key} is for {len(numbers)} layers, not {n_layer}")
    return numbers[:n_layer]
