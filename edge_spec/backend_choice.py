"""Which backend runs a target, and which its draft: the fastest of those that were timed in turn on this machine, and
native where it was not.

`edge-spec doctor --compare` takes the times and keeps them by processor and weights; they count while the libraries
are installed in the versions that were timed. Nothing is measured here: what is not known is not waited for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from edge_spec.cache_file import CacheFile
from edge_spec.cores import processor_features
from edge_spec.drafting import Costs
from edge_spec.errors import BackendUnavailableError, UsageError
from edge_spec.export.recipe import Recipe
from edge_spec.loading import BACKENDS, KV_TYPES, chosen_draft_backend, engine_key, installed_backends
from edge_spec.processor import cpu_key

AUTO = "auto"
"""The backend that stands for a choice among the others."""
NATIVE = "native"
COMPARE = "`edge-spec doctor --compare`"
TYPICAL_ACCEPTANCE = 0.8
"""Share of the draft's tokens that stand, over tasks of many kinds (docs/performance.md)."""
TYPICAL_LOOKUP = 0.2
"""The same of tokens that are copied from the text so far, at no cost, where little of it repeats."""
_FREE_S = 1e-9
LONGEST_DRAFT, MAX_ROWS = 7, 16
_LEAST_GAIN = 0.03
"""Another backend than one that comes before it has to be faster by this share."""


@dataclass(frozen=True, slots=True)
class BackendTimes:
    """Passes of one model on one backend: seconds by rows as they come, the library and its version, its threads.

    `row_alignment` is what passes of a target are padded to, None where nothing is padded.
    """

    engine: str
    threads: int
    row_alignment: int | None
    seconds: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Choice:
    """What to load on which backend, and what the user should know of how that came about. `has_draft`: whether the
    times of a draft had a part in it.

    `threads` and `tokens_per_s`, which is expected at TYPICAL_ACCEPTANCE, are None where nothing was timed.
    """

    backend: str
    draft_backend: str
    threads: int | None = None
    tokens_per_s: float | None = None
    notes: tuple[str, ...] = ()
    has_draft: bool = False


class BackendProfile:
    """The times that were taken on this machine, by weights."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache = CacheFile(cache_dir / "backends.json")

    def get(self, weights: str) -> dict[str, BackendTimes]:
        """Times by backend, of the libraries that are installed as they were then."""
        kept = self._cache.get(f"{cpu_key()} | {weights}")
        found = {name: _read(times) for name, times in kept.items()} if isinstance(kept, dict) else {}
        return {name: times for name, times in found.items() if times and times.engine == _engine(name)}

    def put(self, weights: str, times: Mapping[str, BackendTimes]) -> None:
        """Keep the times of one comparison, in place of an earlier one's."""
        self._cache.put(f"{cpu_key()} | {weights}", {name: asdict(taken) for name, taken in times.items()})


def weights_key(sha256: str, recipe: Recipe | None) -> str:
    """What a model is in the profile: its file, and the recipe that it is exported with (None: the default one)."""
    return f"{sha256} {recipe.name if recipe else 'default'}"


def able_backends(
    running: Collection[str], *, recipe: Recipe | None, kv: str | None, pad_rows: bool = True
) -> tuple[str, ...]:
    """The installed ones of the backends `running` a target that can do what is asked; UsageError if none can."""
    found = [name for name in running if name in installed_backends()]
    if recipe is not None or not pad_rows:
        found = [name for name in found if name != "llama"]
    able = tuple(name for name in found if kv is None or kv in KV_TYPES[name])
    if not able:
        raise UsageError(f"kv={kv!r}: none of {', '.join(found) or 'the installed backends'} stores keys and values so")
    return able


def choose_backends(
    able: Collection[str],
    target: Mapping[str, BackendTimes],
    draft: Mapping[str, BackendTimes] | None,
    draft_backend: str | None = None,
    *,
    plain: bool = False,
) -> Choice:
    """The fastest of the `able` backends for a target of these times, and for its draft.

    `draft` is None without a draft model; `draft_backend` is where the user wants it; `plain`: nothing drafts. Where no
    times of native are known it is taken if it has kernels for this processor; where none of any are, the first of the
    able backends.
    """
    timed = {name: target[name] for name in BACKENDS if name in able and name in target}
    missing = [name for name in able if name not in target]
    if NATIVE in missing and has_kernels():
        note = f"backend {AUTO}: {NATIVE} is taken, which was not compared with the others yet; {COMPARE} does"
        return Choice(NATIVE, chosen_draft_backend(draft_backend, NATIVE), notes=(note,) if timed else ())
    if not timed:
        first = next(name for name in BACKENDS if name in able)
        note = f"backend {AUTO}: nothing was compared on this machine yet, so {first} is taken; {COMPARE} compares"
        return Choice(first, chosen_draft_backend(draft_backend, first), notes=(note,))
    drafting = {name: times for name, times in (draft or {}).items() if draft_backend in (None, name)}
    best = None
    for name, times in timed.items():
        beside = chosen_draft_backend(draft_backend, name)
        for other in sorted(drafting, key=lambda other: (other != beside, BACKENDS.index(other))) or [beside]:
            rate = expected_tokens_per_s(times, drafting.get(other), plain=plain)
            if best is None or rate > (1 + _LEAST_GAIN) * (best.tokens_per_s or 0):
                best = Choice(name, other, times.threads, rate)
    assert best is not None
    notes = (f"backend {AUTO}: {' and '.join(missing)} not compared yet; {COMPARE} does",) if missing else ()
    return replace(best, notes=notes, has_draft=bool(drafting))


def has_kernels() -> bool:
    """Whether this processor has instructions that the native kernels are written for."""
    return bool(processor_features() & {"avx2", "asimddp"})


def expected_tokens_per_s(target: BackendTimes, draft: BackendTimes | None, *, plain: bool = False) -> float:
    """What the planner would expect of these costs at the best length of drafts: the model's, else copied ones."""
    alignment = target.row_alignment or 1
    costs = Costs(max_rows=MAX_ROWS, alignment=alignment)
    widths = {str(n): s for n, s in target.seconds.items() if n <= MAX_ROWS and n % alignment == 0}
    costs.restore({"target": widths, "draft_s": draft.seconds[1] if draft else _FREE_S})
    chance = 0.0 if plain else TYPICAL_ACCEPTANCE if draft else TYPICAL_LOOKUP
    return costs.best_fixed(chance, LONGEST_DRAFT)[0]


def _engine(backend: str) -> str | None:
    try:
        return engine_key(backend)
    except (KeyError, PackageNotFoundError, BackendUnavailableError):
        return None


def _read(kept: Any) -> BackendTimes | None:
    """Times as they were kept; None for what an older or damaged file has."""
    try:
        seconds = {int(rows): float(value) for rows, value in kept["seconds"].items()}
        alignment = kept["row_alignment"]
        times = BackendTimes(str(kept["engine"]), int(kept["threads"]), alignment and int(alignment), seconds)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return times if {1, 2, 4} <= seconds.keys() and min(seconds.values()) > 0 and times.threads > 0 else None
