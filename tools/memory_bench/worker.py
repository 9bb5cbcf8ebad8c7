"""The process of one cell: load, fill the window, write, and tell the parent after each stage.

Run by `measure.py` as `python -m memory_bench.worker CELL`. A line of JSON goes out after each stage, and an empty line
comes back when the parent has looked.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memory_bench.cell import Cell
from memory_bench.proc import Memory, read_memory, reset_peak

_NEW_TOKENS = 96
"""Room that the prompt leaves in the window, for the chat template and the answer, which fills it unless the model ends
it."""

_peak = Memory()


def main() -> None:
    """Run one cell."""
    cell = Cell(**json.loads(sys.argv[1]))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print must not reach the parent

    def tell(stage: str, **facts: Any) -> None:
        global _peak  # noqa: PLW0603  (one process, one peak)
        _sample()
        # The mark starts anew before the parent looks, or it would find this stage's in the next one.
        reset_peak()
        replies.write(json.dumps({"stage": stage, "peak": asdict(_peak), **facts}) + "\n")
        replies.flush()
        _peak = Memory()
        sys.stdin.readline()

    from edge_spec.errors import EdgeSpecError

    try:
        from memory_bench.heard import LlamaLog

        log = LlamaLog() if cell.backend == "llama" else None
        if cell.recipe is not None:
            _run_export(cell, tell)
        elif cell.is_plain:
            _run_engine(cell, log, tell)
        else:
            _run_alone(cell, log, tell)
    except EdgeSpecError as exc:
        tell("refused", error=type(exc).__name__, message=str(exc))


def _run_engine(cell: Cell, log: Any, tell: Any) -> None:
    """As a user runs it: with the planner, its look-ups, and the draft if there is one."""
    from edge_spec import Engine

    tell("imported")
    loading = Engine.load(
        target=cell.model,
        draft=cell.draft,
        backend=cell.backend,
        # A planner may find that the draft does not pay, and then its cache stays empty: here it has to draft.
        drafter="model" if cell.draft else "auto",
        n_ctx=cell.n_ctx,
        threads=cell.threads,
        kv=cell.kv,
    )
    with closing(loading) as engine:
        models = [session._model for session in engine._sessions()]
        tell("loaded", heard=_heard(log, models))
        stream = engine.stream(_text(engine.count, cell.n_ctx - _NEW_TOKENS))
        for _ in stream:
            _sample()
        result = stream.result
        tell(
            "generated",
            heard=_heard(log, models),
            prompt_tokens=result.prompt_tokens,
            generated_tokens=result.generated_tokens,
            finish_reason=result.finish_reason,
            n_ctx=result.n_ctx,
            draft=result.draft,
            drafted=result.drafted,
            steps=result.steps,
            notes=result.notes,
        )


def _run_alone(cell: Cell, log: Any, tell: Any) -> None:
    """A model by itself, where batch or rows are not the engine's: passes of these very sizes."""
    from edge_spec.decoding.session import Session
    from edge_spec.export.finished import Export
    from edge_spec.loading import Loader, find_source, kernels_dir
    from edge_spec.store import Store

    tell("imported")
    store = Store()
    source = find_source(store, cell.model)
    if cell.backend == "llama":
        from edge_spec.backends import llama

        model: Any = llama.load(
            source.gguf, name=source.name, n_ctx=cell.n_ctx, threads=cell.threads, max_rows=cell.rows
        )
    else:
        loader = Loader(store=store, backend=cell.backend, threads=cell.threads)
        export = source.export or loader._export(source, None)
        assert isinstance(export, Export), "the grid's models are exported from GGUFs"
        more: dict[str, Any] = {}
        if cell.backend == "onnx":
            from edge_spec.backends.onnx import OnnxModel as Model
        elif cell.backend == "native":
            from edge_spec.backends.native import NativeModel as Model  # type: ignore[assignment]

            more["kernels_dir"] = kernels_dir(store)
        else:
            from edge_spec.backends.openvino import OpenVinoModel as Model  # type: ignore[assignment]
        model = Model(export, name=source.name, n_ctx=cell.n_ctx, threads=cell.threads, max_rows=cell.rows, **more)
    with closing(Session(model)) as session:
        tell("loaded", heard=_heard(log, [model]))
        encode = source.tokenizer.encode
        ids = encode(_text(lambda text: len(encode(text)), cell.n_ctx - cell.rows))[: cell.n_ctx - cell.rows]
        session.decode(ids, chunk=cell.batch, on_progress=lambda _done, _total: _sample())
        session.decode(ids + ids[: cell.rows], rows=cell.rows)
        tell("generated", heard=_heard(log, [model]), prompt_tokens=len(ids), generated_tokens=0)


def _run_export(cell: Cell, tell: Any) -> None:
    """The exporter, as a first load runs it, into a folder that is gone afterwards."""
    from edge_spec.export.exporter import export_model
    from edge_spec.export.recipe import RECIPES
    from edge_spec.store import Store

    tell("imported")
    store = Store()
    local = store.resolve(cell.model)
    with tempfile.TemporaryDirectory(dir=store.exports_dir) as folder:
        made = export_model(
            local.path,
            RECIPES[cell.recipe or ""],
            Path(folder) / "export",
            sha256=local.sha256,
            threads=cell.threads,
            progress=lambda _done, _total: _sample(),
        )
        tell("generated", heard={"stored_weight_bytes": made.weight_bytes}, prompt_tokens=0, generated_tokens=0)


def _sample() -> None:
    global _peak  # noqa: PLW0603
    if (now := read_memory()) is not None:
        _peak = _peak.maximum(now)


def _heard(log: Any, models: list[Any]) -> dict[str, int]:
    from memory_bench.heard import buffers

    if log is not None:
        heard: dict[str, int] = log.sums()
        return heard
    total: Counter[str] = Counter()
    for model in models:
        total.update(buffers(model))
    return dict(total)


def _text(count: Any, n_tokens: int) -> str:
    """About `n_tokens` tokens of this repository's pages, over and over: what repeats is drafted by look-up.

    The text is found from below: counting a longer one would take memory that no prompt for this window takes.
    """
    pages = "\n".join(page.read_text("utf-8") for page in sorted(_root().glob("docs/*.md")))
    step, end = max(64, n_tokens // 16), 0  # characters
    while step > 4:
        while count(_beginning(pages, end + step)) <= n_tokens:
            end += step
        step //= 2
    return _beginning(pages, end)


def _beginning(pages: str, length: int) -> str:
    return (pages * (length // len(pages) + 1))[:length]


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


if __name__ == "__main__":
    main()
