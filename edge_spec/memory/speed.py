"""How fast plain decoding will be: measured on this machine before, or from what a token has to read of memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edge_spec.cache_file import CacheFile
from edge_spec.export.recipe import default_recipe
from edge_spec.memory.devices import Device
from edge_spec.memory.estimate import Estimate
from edge_spec.memory.parts import Owner
from edge_spec.memory.weights import onnx_weights, stored_matrices
from edge_spec.store import Store

REACHED_SHARE = 0.6
"""Of a memory's peak bandwidth, what the threads of a processor reach in practice when they read weights."""

_PROBE_BYTES = 32 << 20
_PROBES = 4


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second, one by one, without drafts; `source` says what it comes from."""

    tokens_per_s: float
    source: str


def predict_speed(counted: Estimate, store: Store, device: Device | None) -> Speed:
    """Speed on `device`, or (None) on this machine.

    For this machine a pass that the planner has timed counts first (`costs.json`), then the rate at which its threads
    read memory right now, for which 32 MiB are read a few times.
    """
    if device is not None:
        rate = device.bandwidth_bytes_per_s * REACHED_SHARE
        return Speed(rate / bytes_per_token(counted), f"{device.bandwidth_bytes_per_s / 1e9:.1f} GB/s of {device.name}")
    if (seconds := _timed_pass_s(counted, store)) is not None:
        return Speed(1 / seconds, "passes timed on this machine")
    rate = read_rate(counted.settings.threads)
    return Speed(rate / bytes_per_token(counted), f"{rate / 1e9:.1f} GB/s that memory is read with now")


def bytes_per_token(counted: Estimate) -> int:
    """What one pass of one token reads: the weights, with the experts that are chosen, and half of a full cache."""
    target, settings = counted.target, counted.settings
    parts = [part for part in counted.components if part.owner is Owner.TARGET]
    cache = sum(part.committed_bytes for part in parts if part.name in ("cache", "recurrent state"))
    if settings.backend == "llama":
        table = target.embedding.n_bytes if not target.tied else 0
        active = sum(
            tensor.n_bytes * target.n_expert_used // target.n_expert
            if "_exps" in tensor.name and target.n_expert
            else tensor.n_bytes
            for tensor in target.tensors.values()
        )
        return active - table + cache // 2
    return onnx_weights(stored_matrices(target, settings.recipe), settings.machine).anonymous + cache // 2


def _timed_pass_s(counted: Estimate, store: Store) -> float | None:
    """Seconds of the narrowest pass that was timed with these weights, backend and threads; None if none was."""
    from importlib.metadata import PackageNotFoundError

    from edge_spec.loading import machine_key

    target, settings = counted.target, counted.settings
    if target.sha256 is None:
        return None
    try:
        machine = machine_key(settings.backend, settings.threads)
    except PackageNotFoundError:
        return None
    recipe = "" if settings.backend == "llama" else (target.recipe or settings.recipe or default_recipe(target)).name
    prefix = f"{machine} | {target.sha256} {recipe}".rstrip() + " "
    timed = [costs for key, costs in CacheFile(store.cache_dir / "costs.json").items() if key.startswith(prefix)]
    seconds = [_narrowest(costs) for costs in timed]
    return min((value for value in seconds if value), default=None)


def _narrowest(costs: object) -> float | None:
    target = costs.get("target") if isinstance(costs, Mapping) else None
    if not isinstance(target, Mapping) or not target:
        return None
    value = target[min(target, key=int)]
    return value if isinstance(value, float) and value > 0 else None


def read_rate(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory together; the best of a few short tries."""
    words = np.ones(_PROBE_BYTES // 8, np.int64)
    parts = np.array_split(words, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PROBES):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - began)
    return _PROBE_BYTES / best
