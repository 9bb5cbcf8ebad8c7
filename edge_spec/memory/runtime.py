"""What the process holds besides the models: interpreter, libraries, tokenizer, look-up indexes.

These are measurements, not formulas: anonymous bytes at the points named, CPython 3.11, Linux, 64 bits, ONNX Runtime
1.31, llama.cpp as of llama-cpp-python 0.3.36, OpenVINO 2026.4. `python -m tools.memory_grid` measures the sums again.
"""

from __future__ import annotations

MIB = 1 << 20

PYTHON = 21 * MIB
"""The interpreter with NumPy and edge_spec's own modules, once `Engine.load` has been imported."""

TEMPLATE = 4 * MIB
"""jinja2 and the compiled chat template."""

TOKENIZER = 7 * MIB // 2
TOKENIZER_PER_TOKEN = 350
TOKENIZER_PER_MERGE = 145
"""A byte-level BPE of `tokenizers`, with what it keeps of the words that it has cut: 27 MiB for 49,152 tokens and as
many merges, 75 for 151,936, 14 for 32,000 with next to none."""
TOKENIZER_BUILD_PER_TOKEN = 340
"""More of it while it is built; it is built before any weights are loaded."""

LIBRARY = {"onnx": 1 * MIB, "native": 2 * MIB, "openvino": 30 * MIB, "llama": 3 * MIB}
"""A backend's library itself: relocated data, allocator, thread stacks that were touched. Native: the `onnx` package,
which reads the graph."""

SESSION = {"onnx": 1 * MIB, "native": MIB // 4, "openvino": 5 * MIB, "llama": 1 * MIB}
SESSION_PER_LAYER = {"onnx": 110 << 10, "native": 16 << 10, "openvino": 200 << 10, "llama": 24 << 10}
"""The graph of one model inside its library."""

LLAMA_VOCABULARY_PER_TOKEN = 215
"""llama.cpp keeps a vocabulary of its own for each model."""

NATIVE_REUSED_PER_MERGE = 100
"""Building the tokenizer leaves 8 MiB of the allocator's memory free for 49,152 merges and 19 for 151,387. It counts as
the tokenizer's; a native model's arrays, which come from that allocator, lie in most of it."""

LOOKUP_PER_TOKEN = 330
"""The index of the text so far (`drafting.lookup`): two dictionaries and their keys, a token of context."""

HISTORY = 24 * MIB
"""Past answers: a full file of 2^20 tokens as a `drafting.corpus.Corpus`, 16 bytes a token, and what building takes."""

REACHED_ROWS = 1024
"""Most rows of a trimmed head that are kept beside it (`backends.trimmed_head`)."""

KEPT_EMBEDDINGS = 512
"""Rows of the embedding table that stay decoded (`backends.embedding_table`)."""

RESERVED = {"onnx": 8 * MIB, "native": 0, "openvino": 94 * MIB, "llama": 4 * MIB}
RESERVED_PER_PROCESSOR = 40 * MIB
RESERVED_PER_THREAD = 8 * MIB
"""Address space that is set aside, and counted by RLIMIT_DATA, but not touched: the libraries' arenas; for every
processor of the machine a buffer (32 MiB) and a thread's stack (8) of NumPy's OpenBLAS, which asks for them when it is
imported; the stack of each thread that a model runs on."""

SHARED_LIBRARIES = {"onnx": 50 * MIB, "native": 29 * MIB, "openvino": 90 * MIB, "llama": 33 * MIB}
"""Code of Python and of a backend's library that is in memory while it runs: mapped files, shared between processes."""

EXPORTER = 6 * MIB
EXPORTER_PER_TOKEN = 70
EXPORT_BYTES_PER_WEIGHT = 8
"""Exporting: the libraries for it and the graph; the vocabulary, which is copied; what a thread holds a weight of its
chunk."""
