"""What a loaded export holds, over the bytes of its weights and its cache.

    python tools/loaded_memory.py qwen2.5-coder-1.5b qwen2.5-coder-1.5b@int4-accurate
    python tools/loaded_memory.py small.gguf@draft --ctx 512 --json

Each model runs in a process of its own: ONNX Runtime is imported, then the export loaded and its cache filled to the
last token. Counted is what is resident then beyond what was before the load: anonymous memory and the mapped pages of
the model's files. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from memory_bench.proc import resident_by_kind

from edge_spec.backends._onnx_session import import_library
from edge_spec.backends.onnx import OnnxModel
from edge_spec.cores import check_threads
from edge_spec.errors import EdgeSpecError, UsageError
from edge_spec.export import find_recipe, open_export
from edge_spec.export.exporter import ensure_export
from edge_spec.export.source import default_recipe_of
from edge_spec.loading import find_source
from edge_spec.store import Store

CHUNK = 128
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of one loaded model: what it holds, and what it would if it were weights and cache alone."""

    anonymous: int
    mapped: int
    weights: int
    cache: int

    @property
    def ratio(self) -> float:
        """What is held over weights and cache."""
        return (self.anonymous + self.mapped) / (self.weights + self.cache)


def hold(export: Path, n_ctx: int, threads: int) -> Held:
    """Load an export in this process, fill its cache, and look. UsageError for a length that it was not made for."""
    import_library()
    opened = open_export(export)
    if not 1 <= n_ctx <= opened.config.n_ctx_train:
        raise UsageError(f"--ctx {n_ctx}: the model was trained on 1 to {opened.config.n_ctx_train} tokens")
    before = resident_by_kind(os.getpid())
    model = OnnxModel(opened, name=export.name, n_ctx=n_ctx, threads=threads)
    for start in range(0, n_ctx, CHUNK):
        model.decode([token % 256 for token in range(start, min(start + CHUNK, n_ctx))])
    after = resident_by_kind(os.getpid())
    spec = model.spec
    model.close()
    return Held(
        anonymous=after["anonymous"] - before["anonymous"],
        mapped=after["model"] - before["model"],
        weights=spec.weight_bytes,
        cache=n_ctx * spec.kv_bytes_per_token,
    )


def hold_apart(export: Path, n_ctx: int, threads: int) -> Held:
    """`hold` in a process of its own. EdgeSpecError if that fails."""
    command = [sys.executable, __file__, "--export", str(export), "--ctx", str(n_ctx), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EdgeSpecError(f"{export}: {said[-1].removeprefix('loaded_memory: ')}")
    return Held(**json.loads(done.stdout))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all were measured, 1 if something failed, 2 for bad usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.models and not options.export:
        parser.error("name a model")
    if sys.platform != "linux":
        parser.error("what a process holds is read from Linux's smaps")
    try:
        threads = check_threads(options.threads)
        if options.export:
            print(json.dumps(asdict(hold(options.export, options.ctx, threads))))
            return 0
        held = {text: hold_apart(export_of(text, threads), options.ctx, threads) for text in options.models}
    except UsageError as exc:
        print(f"loaded_memory: {exc}", file=sys.stderr)
        return 2
    except EdgeSpecError as exc:
        print(f"loaded_memory: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps({name: asdict(one) | {"ratio": one.ratio} for name, one in held.items()}, indent=1))
    else:
        print(as_text(held))
    return 0


def as_text(held: dict[str, Held]) -> str:
    """A table in Markdown; MiB."""
    lines = ["| loaded | anonymous | mapped | weights | cache | held, over both |", "|---|---|---|---|---|---|"]
    for name, one in held.items():
        sizes = (f"{size / MIB:.1f}" for size in (one.anonymous, one.mapped, one.weights, one.cache))
        lines.append(f"| {name} | {' | '.join(sizes)} | {one.ratio:.3f} |")
    return "\n".join(lines)


def export_of(text: str, threads: int) -> Path:
    """The export of `MODEL` or `MODEL@RECIPE`, made if there is none."""
    model, at, name = text.rpartition("@") if "@" in text else (text, "", "")
    if not model or (at and not name):
        raise UsageError(f"{text!r} is no model: write MODEL or MODEL@RECIPE")
    store = Store()
    source = find_source(store, model)
    recipe = find_recipe(name) if name else default_recipe_of(source.gguf)
    return ensure_export(source.gguf, source.sha256, recipe, store.exports_dir, threads=threads).path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL[@RECIPE]", help="a name or a GGUF; the default recipe else")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens of the cache")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="one object, bytes")
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)  # what the processes apart are asked for
    return parser


if __name__ == "__main__":
    sys.exit(main())
