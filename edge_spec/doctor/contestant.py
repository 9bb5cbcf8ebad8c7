"""One model on one backend, in a process of its own: the process's side (`main`), and the doctor's."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any

from edge_spec.backends.base import CausalLM
from edge_spec.errors import BackendError
from edge_spec.worker_process import WorkerProcess, serve


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a contestant loads. `model` is named as for `loading.find_source`; `recipe` None follows the source."""

    model: str
    backend: str
    is_draft: bool
    threads: int
    n_ctx: int
    recipe: str | None
    pad_rows: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a contestant says of itself once it is ready. `load_s` leaves out exporting and the check of the rows."""

    load_s: float
    recipe: str
    engine: str
    row_alignment: int | None


class Contestant:
    """The doctor's end of a contestant's process."""

    def __init__(self, job: Job) -> None:
        """Start it and wait until its model is loaded; BackendError says why it is not."""
        code = f"from {__name__} import main; main()"
        self._process = WorkerProcess(f"{job.model} on {job.backend}", ["-c", code, json.dumps(asdict(job))])
        try:
            self.loaded = Loaded(**self._process.receive())
        except BaseException:
            self.close()
            raise

    def read(self, tokens: int) -> float:
        """Append that many tokens to the cache; seconds."""
        return float(self._process.ask(do="read", tokens=tokens))

    def time(self, rows: list[int], cached: int) -> dict[int, float]:
        """Seconds of one pass of each of `rows` behind the first `cached` tokens."""
        return {int(n): float(seconds) for n, seconds in self._process.ask(do="time", rows=rows, cached=cached).items()}

    def memory(self) -> tuple[int, int]:
        """Bytes that the process holds now: anonymous ones, and pages of mapped files."""
        anonymous, mapped = self._process.ask(do="memory")
        return int(anonymous), int(mapped)

    def close(self) -> None:
        """End the process."""
        self._process.close()


def main() -> None:
    """The process: load, say so, then do what is asked until the input ends."""
    serve(_start)


def _start() -> tuple[dict[str, Any], partial[Any]]:
    model, loaded = _load(Job(**json.loads(sys.argv[1])))
    return asdict(loaded), partial(_do, model)


def _load(job: Job) -> tuple[_Model, Loaded]:
    from edge_spec.backends.base import PaddedRows
    from edge_spec.export.recipe import find_recipe
    from edge_spec.loading import Loader, draft_recipe, engine_key, find_source
    from edge_spec.store import Store

    store = Store()
    source = find_source(store, job.model)
    recipe = draft_recipe(source) if job.is_draft else find_recipe(job.recipe) if job.recipe else None
    moments: dict[tuple[str, int], float] = {}

    def note(stage: str, done: int, _total: int) -> None:
        moments[stage.partition(" ")[0], done] = perf_counter()

    loader = Loader(store=store, backend=job.backend, threads=job.threads, progress=note)
    loaded = loader.load(source, n_ctx=job.n_ctx, recipe=recipe, aligned=job.pad_rows and not job.is_draft)
    if loaded.backend != job.backend:
        raise BackendError(f"{source.name} runs on {loaded.backend} only")
    alignment = loaded.model.spec.row_alignment
    if isinstance(loaded.model, PaddedRows):
        loaded.model.align_rows(None)  # what padding costs is told from the widths that it makes
    load_s = moments["load", 1] - moments["load", 0]
    about = Loaded(load_s=load_s, recipe=loaded.recipe, engine=engine_key(job.backend), row_alignment=alignment)
    return _Model(loaded.model, job.is_draft), about


@dataclass(frozen=True, slots=True)
class _Model:
    lm: CausalLM
    is_draft: bool


def _do(model: _Model, *, do: str, tokens: int = 0, rows: list[int] | None = None, cached: int = 0) -> Any:
    from edge_spec.doctor.passes import fill, time_passes
    from edge_spec.memory.process import process_memory
    from edge_spec.types import Output

    if do == "read":
        started = perf_counter()
        fill(model.lm, model.lm.length + tokens)
        return perf_counter() - started
    if do == "time":
        model.lm.rollback(cached)
        want = Output.TOP_K if model.is_draft else Output.LOGITS  # as they are used
        return {time.rows: time.seconds for time in time_passes(model.lm, rows or (), repeats=1, want=want)}
    assert do == "memory", do
    usage = process_memory().read()
    return usage.anonymous_bytes, usage.resident_bytes - usage.anonymous_bytes
