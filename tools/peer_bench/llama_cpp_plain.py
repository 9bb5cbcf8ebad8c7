"""Plain llama.cpp, as its users run it: flash attention where it likes, batches of 512, an f16 cache, mapped weights.

A loop of its own on the low-level API, not our backend: what is compared is llama.cpp, at its best. Greedy choice is
NumPy's argmax over the row in place, which is faster than llama.cpp's own sampler chain.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np

from peer_bench.answer import Answer, Settings
from peer_bench.prompts import Reading

_BATCH = 512


class LlamaCppPlain:
    """The pair's target alone, from the same GGUF, reading the very ids that our engine reads."""

    def __init__(self, settings: Settings) -> None:
        from edge_spec.store import Store

        store = Store()
        pair = store.pair(settings.pair)
        path = store.resolve(pair.target).path
        self._reading = Reading(path, pair.system)
        self._library, self._model, self._context = _open(path, settings)  # until the process ends
        self._memory = self._library.llama_get_memory(self._context)
        self._n_vocab = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
        self._n_ctx = settings.n_ctx
        self.about = f"llama.cpp through llama-cpp-python {self._library.__version__}, {path.name}"

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """See `Contender`."""
        self._library.llama_memory_clear(self._memory, True)
        started = time.perf_counter()
        ids = self._reading.ids(prompt)
        if len(ids) + max_tokens > self._n_ctx:
            raise ValueError(f"a prompt of {len(ids)} tokens and {max_tokens} more do not fit n_ctx={self._n_ctx}")
        for start in range(0, len(ids), _BATCH):
            self._decode(ids[start : start + _BATCH])
        generated = [self._most_likely()]
        first = last = time.perf_counter()
        steps = 0
        while len(generated) < max_tokens and generated[-1] not in self._reading.tokenizer.stop_ids:
            self._decode(generated[-1:])
            generated.append(self._most_likely())
            steps += 1
            last = time.perf_counter()
        return Answer(
            token_ids=generated,
            text=self._reading.tokenizer.decode(generated),
            prompt_tokens=len(ids),
            ttft_s=first - started,
            decode_s=last - first,
            wall_s=last - started,
            steps=steps,
        )

    def _decode(self, ids: list[int]) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        code = self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, len(ids)))
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _most_likely(self) -> int:
        row = self._library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(row, (self._n_vocab,)).argmax())


def _open(path: Path, settings: Settings) -> tuple[Any, Any, Any]:
    """The library, the model and a context; the log callback is ours, quiet and kept alive."""
    from edge_spec.backends._llama_library import import_library

    library = import_library()
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    params = library.llama_context_default_params()
    params.n_ctx = settings.n_ctx
    params.n_batch = params.n_ubatch = _BATCH
    params.n_threads = params.n_threads_batch = settings.threads
    params.n_outputs_max = params.n_outputs_max_per_seq = 1  # else logits for a whole batch are reserved
    context = library.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    return library, model, context
