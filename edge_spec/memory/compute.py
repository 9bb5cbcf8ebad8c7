"""Buffers of a pass: activations, scores, logits, rotary tables; float32 unless said otherwise."""

from __future__ import annotations

from edge_spec.backends._padded_model import scored_rows
from edge_spec.backends.alignment import MAX_ALIGNMENT, round_up
from edge_spec.export.architecture import DecoderConfig, tensor_shapes
from edge_spec.export.graph import StoredMatrix
from edge_spec.kernels.library import CHUNK, LANES
from edge_spec.memory.facts import ModelFacts
from edge_spec.memory.kv import cells
from edge_spec.memory.runtime import REACHED_ROWS
from edge_spec.types import TOP_K

LLAMA_UBATCH = 512
"""Tokens that `backends.llama` lets llama.cpp plan a pass for."""


def logits_bytes(n_vocab: int, max_rows: int) -> int:
    """Logits of the rows that a decode may return, over the whole vocabulary."""
    return round_up(max_rows, MAX_ALIGNMENT) * n_vocab * 4


def trimmed_head_bytes(facts: ModelFacts, rows: int, max_rows: int, reached: int) -> int:
    """What scores a trimmed head's rows: logits (with and without the reached ones, below the best, and as shares),
    hidden states, and rows of tokens that were reached."""
    per_row = (4 * (rows + reached) + facts.hidden) * 4
    kept = rows * 8 + facts.n_vocab + reached * (facts.hidden * 4 + 12)
    return round_up(max_rows, MAX_ALIGNMENT) * per_row + kept


def rope_bytes(facts: ModelFacts, n_ctx: int) -> int:
    """Cosines and sines of every position that the cache has room for, as ONNX Runtime's attention takes them."""
    if facts.config is None:
        return 0
    tables = len(facts.config.rope_names)
    return tables * cells(n_ctx, "onnx") * (facts.config.rope_dim // 2) * 4


def onnx_activations(facts: ModelFacts, batch: int) -> int:
    """Activations of a pass of `batch` tokens in ONNX Runtime's arena, as far as they are touched.

    A token takes about seven widths of the network (gate, its sigmoid, up and their product, and most of them once
    more, since the first pass of a width allocates tensor by tensor and the next ones in one block), three of the
    residual stream and of the attention's inputs, and more of these where each head is normed. The factors were fitted
    to passes of 128 tokens of seven models, from 0.1 to 1.5 billion weights, and meet each within 1 MiB. Nothing grows
    with the context: attention computes its scores in tiles.
    """
    config = facts.config
    inputs = config.qkv_rows if config else 3 * facts.hidden
    widths = 6.9 * facts.n_ff + 3 * (facts.hidden + inputs)
    if config is not None and (config.traits.qk_norm or config.traits.post_norms):
        widths += 7.3 * inputs
    return round(widths) * round_up(batch, MAX_ALIGNMENT) * 4 + _ARENA


def onnx_attention(facts: ModelFacts, n_ctx: int, batch: int) -> int:
    """Scores of a pass in one block, where they are capped: ONNX Runtime computes them in tiles only without a cap, and
    tiles take next to nothing. Measured, on a model with 12 heads and windows of 1,024 and 4,096 tokens."""
    if facts.config is None or not facts.config.attention_softcap:
        return 0
    return facts.n_head * round_up(batch, MAX_ALIGNMENT) * cells(n_ctx, "onnx") * 4


def native_activations(config: DecoderConfig, matrices: tuple[StoredMatrix, ...], batch: int) -> int:
    """What the native kernels' steps work in, as far as a pass of `batch` tokens touches it: the arrays of
    `kernels.program` and `kernels.matrices`, which have room for CHUNK tokens.

    Of a token: embedding, two sums of the residual stream, a branch and its norm; queries, keys and values; what
    attention makes of them, with two numbers a head; gate and up. And each of the three inputs of matrices as levels,
    a byte each, with a scale and a share for every block, once in each form that matrices of its length take.
    """
    heads = config.n_head * config.head_dim
    floats = 5 * config.hidden + config.qkv_rows + heads + 2 * config.n_head + 2 * config.n_ff
    forms = {(matrix.row_length, matrix.block, matrix.bits) for matrix in matrices}
    levels = 0
    for width in (config.hidden, heads, config.n_ff):
        blocks = [length // block for length, block, _ in forms if length == width]
        levels += sum(width + 4 * (n + round_up(n, LANES)) for n in blocks)
    return min(batch, CHUNK) * (4 * floats + levels)


def native_logits(config: DecoderConfig, rows: int, max_rows: int) -> tuple[int, int]:
    """Logits that the native kernels write, and the states they are made of, as they are allocated and as far as a
    pass that returns `max_rows` touches them: there is room for more, to score a text with. `rows`: the head's.

    Beside those of a trimmed head there are logits of tokens that were reached, and of each row the best.
    """
    max_rows = round_up(max_rows, MAX_ALIGNMENT)
    scored = scored_rows(rows, max_rows)
    row = 4 * (rows + config.hidden + 1)
    if rows < config.n_vocab:
        row += 4 * REACHED_ROWS + 12 * min(TOP_K, rows)
    return scored * row, max_rows * row


def native_trimmed_head(config: DecoderConfig, rows: int) -> int:
    """What `backends.trimmed_head` holds: ids, which tokens are known, rows of those that were reached."""
    if rows == config.n_vocab:
        return 0
    return 8 * rows + config.n_vocab + REACHED_ROWS * (4 * config.hidden + 12)


def native_vectors(config: DecoderConfig) -> int:
    """Norms, and biases of queries, keys and values, float32. Biases count for all models: the facts of an export do
    not tell which have them, and a plan made from a GGUF has to be that of its export."""
    norms = sum(shape[0] for shape in tensor_shapes(config).values() if len(shape) == 1)
    return 4 * (norms + config.n_layer * config.qkv_rows)


def openvino_activations(facts: ModelFacts, batch: int) -> int:
    """Activations of a pass of `batch` tokens in OpenVINO's CPU plugin; measured as widths of the network."""
    return round(_OPENVINO_WIDTHS * facts.n_ff + 2 * facts.hidden) * round_up(batch, MAX_ALIGNMENT) * 4


def openvino_attention(facts: ModelFacts, n_ctx: int) -> int:
    """What OpenVINO's attention takes besides where every head has keys of its own: it takes another way then, and
    holds about five times a layer's keys in float32; next to nothing where heads share them. Measured."""
    config = facts.config
    if config is None or config.n_kv_head < config.n_head:
        return 0
    return 5 * n_ctx * config.n_kv_head * config.head_dim * 4


_ARENA = 2 << 20
_OPENVINO_WIDTHS = 6.4


def llama_scheduler_bytes(facts: ModelFacts) -> int:
    """What llama.cpp's scheduler asks for and hardly touches: room for 30 copied inputs, twice, at every node that a
    graph may have, each a tensor's description and four numbers.

    Source: `ggml-backend.cpp` (ggml_backend_sched_new), `llama-context.cpp` (graph_max_nodes).
    """
    n_nodes = max(1024, 8 * len(facts.tensors))
    if facts.architecture in _LLAMA_LARGE_GRAPHS:
        n_nodes = max(40 * LLAMA_UBATCH, 32 * len(facts.tensors))
    copies = 2 * _LLAMA_SPLIT_INPUTS
    return n_nodes * (copies * _GGML_TENSOR_BYTES + 4 * 4 * (copies + 1))


_LLAMA_LARGE_GRAPHS = ("qwen3next", "qwen35")
_LLAMA_SPLIT_INPUTS = 30
_GGML_TENSOR_BYTES = 336


def llama_buffers(facts: ModelFacts, n_ctx: int, batch: int, max_rows: int) -> tuple[int, int]:
    """llama.cpp's compute buffer as it is allocated, and how much of it passes of `batch` tokens touch.

    Planned for passes of up to 512 tokens: three widths of the feed-forward network and four of the residual stream a
    token, and the attention mask, float16; or the logits, if they are more. Equal to the size in llama.cpp's log for
    dense models with flash attention.
    """
    ubatch = min(LLAMA_UBATCH, n_ctx)
    context = cells(n_ctx, "llama")

    def planned(n: int) -> int:
        network = n * 4 * (3 * facts.n_ff + 4 * facts.hidden)
        head = max_rows * 4 * (facts.n_vocab + facts.hidden)
        return max(network, head) + context * round_up(n, 64) * 2

    allocated = planned(ubatch)
    return allocated, min(allocated, planned(min(batch, ubatch)))
