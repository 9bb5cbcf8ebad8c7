"""onnxruntime-genai on the exports that our engine runs: plain, with the pair's draft, or with n-grams.

`pip install onnxruntime-genai` beside edge_spec. It reads the very ids that our engine reads; the draft is exported
with its whole head (the recipe int4), since genai shares no vocabulary with a trimmed one.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from peer_bench.answer import Answer, Settings
from peer_bench.genai_model import write_genai_model
from peer_bench.prompts import Reading

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "draft": {"max_draft_tokens": 3},
    "ngram": {"ngram_size": 3, "max_draft_tokens": 8, "min_adaptive_k": 2, "ngram_chained_lookup": True},
}
"""Speculative options of each mode, by the names of genai's own documentation (docs/SpeculativeDecoding.md there)."""


class Genai:
    """The pair's target, and in the mode `draft` its draft, in one of MODES."""

    def __init__(self, settings: Settings, mode: str) -> None:
        import onnxruntime_genai as genai

        from edge_spec.export.exporter import ensure_export
        from edge_spec.export.recipe import RECIPES
        from edge_spec.store import Store

        store = Store()
        pair = store.pair(settings.pair)
        names = [pair.target, pair.draft] if mode == "draft" else [pair.target]
        sources = [store.resolve(name) for name in names if name is not None]
        if len(sources) < len(names):
            raise ValueError(f"the pair {settings.pair} has no draft")
        self._reading = Reading(sources[0].path, pair.system)
        exports = [
            ensure_export(source.path, source.sha256, RECIPES["int4"], store.exports_dir, threads=settings.threads)
            for source in sources
        ]
        store.cache_dir.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="genai-", dir=store.cache_dir)  # until the process ends
        write_genai_model(
            Path(self._folder.name),
            exports[0],
            exports[1] if len(exports) > 1 else None,
            n_ctx=settings.n_ctx,
            threads=settings.threads,
            stop_ids=self._reading.tokenizer.stop_ids,
        )
        self._genai = genai
        self._model = genai.Model(self._folder.name)
        self._options = MODES[mode]
        self._n_ctx = settings.n_ctx
        self.about = f"onnxruntime-genai {genai.__version__}, {mode}, the export {exports[0].path.name}"

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """See `Contender`."""
        started = time.perf_counter()
        ids = self._reading.ids(prompt)
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=min(self._n_ctx, len(ids) + max_tokens), do_sample=False)
        if self._options:
            params.set_speculative_options(**self._options)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(ids)
        generated: list[int] = []
        first = last = started
        while len(generated) < max_tokens and not generator.is_done():
            generator.generate_next_token()
            generated.append(int(generator.get_next_tokens()[0]))
            last = time.perf_counter()
            first = last if len(generated) == 1 else first
        told = generator.get_speculative_stats() if self._options else {}
        accepted = int(told.get("draft_tokens_accepted", 0))
        return Answer(
            token_ids=generated,
            text=self._reading.tokenizer.decode(generated),
            prompt_tokens=len(ids),
            ttft_s=first - started,
            decode_s=last - first,
            wall_s=last - started,
            steps=max(0, len(generated) - 1 - accepted),  # a pass yields one token, and those that it accepted
            drafted=int(told.get("draft_tokens_proposed", 0)),
            accepted=accepted,
        )
