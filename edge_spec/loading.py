"""From a name to a model that is ready to decode: find the file, export it if need be, load it on a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from edge_spec.backends.alignment import AlignableLM
from edge_spec.backends.base import CausalLM
from edge_spec.backends.kv_scales import KvScales
from edge_spec.cache_file import CacheFile
from edge_spec.chat_template import ChatTemplate
from edge_spec.checkpoint import is_checkpoint, open_checkpoint
from edge_spec.checkpoint.exporter import GraphExport, open_graph_export
from edge_spec.errors import (
    BackendUnavailableError,
    ModelFormatError,
    ModelNotFoundError,
    UnsupportedArchitectureError,
    UsageError,
)
from edge_spec.export.exporter import ensure_export
from edge_spec.export.finished import Export, open_export
from edge_spec.export.folder import is_export, is_graph_export, read_description
from edge_spec.export.recipe import RECIPES, Recipe, find_recipe
from edge_spec.export.source import default_recipe_of, open_source, refusal_of
from edge_spec.formats.gguf import GGUFFile
from edge_spec.kernels.build import source_key
from edge_spec.processor import cpu_key
from edge_spec.store import Store
from edge_spec.tokenizer import Tokenizer

DEFAULT_N_CTX = 4096

BACKENDS = ("onnx", "native", "openvino", "llama")

KV_TYPES = {
    "onnx": ("f32", "q8"),
    "native": ("f16", "f32"),
    "openvino": ("f16", "f32", "u8"),
    "llama": ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
}
"""What keys and values can be stored as, by backend; the first is what they are unless told otherwise."""

_DISTRIBUTIONS = {"onnx": "onnxruntime", "openvino": "openvino", "llama": "llama-cpp-python"}
"""Whose version a backend's speed and kernels depend on."""
_MODULES = {"onnx": "onnxruntime", "openvino": "openvino", "llama": "llama_cpp"}

StageProgress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`; stages are `compile kernels`, `export NAME` (bytes), `load NAME` and
`check NAME` (whether rows depend on each other)."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model before it is loaded: its GGUF (or the folder of a checkpoint that reads like one), or an export that
    stands alone."""

    name: str
    gguf: Path
    sha256: str
    export: Export | GraphExport | None
    tokenizer: Tokenizer
    template: ChatTemplate
    n_ctx_train: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on a backend. `recipe` names how its weights are stored, `stored` says so to the last detail, as a key;
    `notes` what the user should know."""

    model: CausalLM
    backend: str
    recipe: str
    stored: str
    notes: tuple[str, ...]


def find_source(store: Store, ref: str | Path, *, share: Tokenizer | None = None) -> Source:
    """The model behind a name, a pulled hub reference, a GGUF's path or the folder of an export or a checkpoint, with
    its tokenizer.

    `share`: the target's tokenizer, which a draft of the same vocabulary takes over instead of building its own.
    """
    path = _expanded(ref)
    name = path.resolve().name
    if is_export(path):
        export = open_any_export(path)
        return _read(name, export.source_file, export.source_sha256, export, share)
    if is_checkpoint(path):
        refusal = refusal_of(path)
        if refusal is None:
            return _read(name, path, open_checkpoint(path).sha256(store.cache_dir), None, share)
        made = _export_of_checkpoint(store, path, refusal)
        return _read(name, made.source_file, made.source_sha256, made, share)
    local = store.resolve(ref)
    return _read(local.name, local.path, local.sha256, None, share)


def running_backends(source: Source) -> tuple[str, ...]:
    """The backends that run a model as its file is."""
    if isinstance(source.export, GraphExport):
        return ("onnx",)
    is_gguf = source.export is None and source.gguf.is_file()
    return tuple(name for name in BACKENDS if is_gguf or name != "llama")


def open_any_export(path: Path) -> Export | GraphExport:
    """The export in a folder, whichever exporter made it; ModelFormatError says what is wrong with it."""
    return open_graph_export(path) if is_graph_export(read_description(path)) else open_export(path)


def _export_of_checkpoint(store: Store, path: Path, refusal: UnsupportedArchitectureError) -> Export | GraphExport:
    """The store's export of a checkpoint that only optimum takes, that of the smallest recipe if there are several."""
    sha256 = open_checkpoint(path).sha256(store.cache_dir)
    for folder in sorted((store.exports_dir / sha256).glob("*-????????")):
        if is_export(folder):
            return open_any_export(folder)
    raise ModelNotFoundError(
        f"{path} is a checkpoint that takes optimum; export it first with `edge-spec export {path}` ({refusal})"
    )


def _expanded(ref: str | Path) -> Path:
    try:
        return Path(ref).expanduser()
    except RuntimeError:  # no such user; the store will say so
        return Path(ref)


def _read(name: str, path: Path, sha256: str, export: Export | GraphExport | None, share: Tokenizer | None) -> Source:
    with open_source(path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf, share=share)
        embedding = gguf.tensors.get("token_embd.weight")
        if embedding is not None and embedding.shape[0] < tokenizer.n_vocab:
            raise ModelFormatError(
                f"{path}: the tokenizer lists {tokenizer.n_vocab} tokens, and the model knows {embedding.shape[0]}"
            )
        return Source(
            name=name,
            gguf=path,
            sha256=sha256,
            export=export,
            tokenizer=tokenizer,
            template=ChatTemplate.from_gguf(gguf),
            n_ctx_train=gguf.hparam_int("context_length"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Loads sources. `backend` is one of BACKENDS, `kv` one of its KV_TYPES or None for its own; `recipe` None follows
    the source. `park_bytes`: what sequences that are set aside may hold."""

    store: Store
    backend: str
    threads: int
    kv: str | None = None
    park_bytes: int = 0
    progress: StageProgress | None = None

    def load(self, source: Source, *, n_ctx: int, recipe: Recipe | None, aligned: bool) -> LoadedModel:
        """Load a model with a cache of `n_ctx` tokens.

        `aligned`: pad its passes so that a row's logits do not depend on what else is in the pass. An architecture
        that the exporter does not know runs on llama.cpp, if that is installed, and says so.
        """
        if self.backend == "llama":
            return self._load_llama(source, n_ctx)
        self._require_library()  # now, and not after minutes of exporting
        try:
            export = source.export or self._export(source, recipe)
        except UnsupportedArchitectureError as unknown:
            check_kv_type(self.kv, "llama")  # there it would run
            try:
                loaded = self._load_llama(source, n_ctx)
            except BackendUnavailableError as missing:
                raise UnsupportedArchitectureError(
                    f"{unknown}. The llama backend may run it: {missing}. Or choose a model of a known architecture"
                ) from missing
            note = f"{source.name} runs on the llama backend: {unknown}"
            return replace(loaded, notes=(note, *loaded.notes))
        return self._load_export(source, export, n_ctx, aligned)

    def _require_library(self) -> None:
        """BackendUnavailableError where what the backend needs is not installed."""
        if self.backend == "openvino":
            from edge_spec.backends.openvino import import_library

            import_library()
        elif self.backend == "native":
            load_kernels(self.store, self.progress)

    def _export(self, source: Source, recipe: Recipe | None) -> Export:
        recipe = recipe or default_recipe_of(source.gguf)

        def report(done: int, total: int) -> None:
            self._report(f"export {source.name}", done, total)

        exports = self.store.exports_dir
        return ensure_export(source.gguf, source.sha256, recipe, exports, threads=self.threads, progress=report)

    def _load_export(self, source: Source, export: Export | GraphExport, n_ctx: int, aligned: bool) -> LoadedModel:
        from edge_spec.backends.alignment import align

        self._report(f"load {source.name}", 0, 1)
        model = self._open(source, export, n_ctx)
        self._report(f"load {source.name}", 1, 1)
        # Not the folder, which may have any name, nor the recipe's name, which may have meant something else once.
        kv = model.spec.kv_type
        stored = export.key + (f" kv {kv}" if kv != "f32" else "")
        notes = [*getattr(model, "notes", ())]
        if export.requantized:
            notes.append(f"{source.name}: {', '.join(export.requantized)} tensors have no exact form; 8 bits instead")
        if aligned:
            self._report(f"check {source.name}", 0, 1)
            cache = CacheFile(self.store.cache_dir / "row_alignment.json")
            align(model, cache, f"{machine_key(self.backend, self.threads)} | {stored} {source.sha256}")
            self._report(f"check {source.name}", 1, 1)
        return LoadedModel(model, self.backend, export.recipe.name, stored, tuple(notes))

    def _open(self, source: Source, export: Export | GraphExport, n_ctx: int) -> AlignableLM:
        if isinstance(export, GraphExport):
            from edge_spec.backends.past_present import PastPresentModel

            name = source.name
            if self.backend != "onnx":
                raise UsageError(f"{name} is an export that optimum built the graph of, which the onnx backend runs")
            if self.kv not in (None, "f32"):
                raise UsageError(
                    f"kv={self.kv!r}: {name} is an export that optimum built, with float32 keys and values"
                )
            return PastPresentModel(export, name=name, n_ctx=n_ctx, threads=self.threads)
        if self.backend == "openvino":
            from edge_spec.backends.openvino import OpenVinoModel

            kv = self.kv or KV_TYPES["openvino"][0]
            return OpenVinoModel(
                export, name=source.name, n_ctx=n_ctx, threads=self.threads, kv=kv, park_bytes=self.park_bytes
            )
        if self.backend == "native":
            from edge_spec.backends.native import NativeModel

            return NativeModel(
                export,
                name=source.name,
                n_ctx=n_ctx,
                threads=self.threads,
                kernels_dir=kernels_dir(self.store),
                kv=self.kv or KV_TYPES["native"][0],
            )
        from edge_spec.backends.onnx import OnnxModel

        scales = self._kv_scales(source, export) if self.kv == "q8" else None
        return OnnxModel(export, name=source.name, n_ctx=n_ctx, threads=self.threads, kv_scales=scales)

    def _kv_scales(self, source: Source, export: Export) -> KvScales:
        """The scales of an 8-bit cache: as they were kept, else measured now on a text of ours."""
        from edge_spec.backends import kv_scales
        from edge_spec.backends.onnx import OnnxModel

        path = self.store.cache_dir / "kv_scales" / f"{source.sha256[:16]}-{export.key}.npy"
        if (kept := kv_scales.read_scales(path, export.config)) is not None:
            return kept
        message = {"role": "user", "content": kv_scales.CALIBRATION_TEXT}
        tokens = source.template.render_ids([message], source.tokenizer)[: source.n_ctx_train]
        model = OnnxModel(export, name=source.name, n_ctx=len(tokens), threads=self.threads)
        try:
            scales = kv_scales.measure_scales(model, tokens)
        finally:
            model.close()
        kv_scales.write_scales(path, scales)
        return scales

    def _load_llama(self, source: Source, n_ctx: int) -> LoadedModel:
        from edge_spec.backends import llama

        if source.export is not None:
            raise UsageError(f"{source.name} is an export; the llama backend runs GGUF files")
        if source.gguf.is_dir():
            raise UsageError(
                f"{source.name} is a checkpoint, and the llama backend runs GGUF files: make one with llama.cpp's "
                f"convert_hf_to_gguf.py, or run it on the onnx backend"
            )
        self._report(f"load {source.name}", 0, 1)
        kv = self.kv or KV_TYPES["llama"][0]
        model = llama.load(source.gguf, name=source.name, n_ctx=n_ctx, threads=self.threads, kv=kv)
        self._report(f"load {source.name}", 1, 1)
        file_type = _file_type(source.gguf)
        stored = file_type + (f" kv {kv}" if kv != KV_TYPES["llama"][0] else "")
        return LoadedModel(model, "llama", file_type, stored, ())

    def _report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


def kernels_dir(store: Store) -> Path:
    """Where the native backend keeps what it compiled."""
    return store.cache_dir / "kernels"


def load_kernels(store: Store, progress: StageProgress | None) -> str:
    """Have the native backend's kernels ready; what they are called. BackendUnavailableError where they cannot be
    compiled."""
    from edge_spec.kernels.build import load_library

    def report() -> None:
        if progress is not None:
            progress("compile kernels", 0, 1)

    return str(load_library(kernels_dir(store), report).edge_spec_kernel().decode())


def chosen_recipe(name: str | None, backend: str, source: Source) -> Recipe | None:
    """The recipe that the user asked for; UsageError where it could not be honoured."""
    if name is None:
        return None
    recipe = find_recipe(name)
    if recipe.head_rows:
        raise UsageError(f"the recipe {name} leaves tokens out: it is for drafts, not for a target")
    if backend == "llama":
        raise UsageError("the llama backend runs a GGUF's weights as they are; drop the recipe")
    if source.export is not None and source.export.recipe != recipe:
        raise UsageError(f"{source.name} was exported with the recipe {source.export.recipe.name}, not {name}")
    return recipe


def check_kv_type(name: str | None, backend: str) -> None:
    """UsageError unless a backend can store keys and values as `name` (None: as it does of itself)."""
    if name is not None and name not in KV_TYPES[backend]:
        raise UsageError(f"kv={name!r}: the {backend} backend stores keys and values as {', '.join(KV_TYPES[backend])}")


def draft_recipe(source: Source) -> Recipe | None:
    """4 bits and a trimmed head: what a draft is never decides what is written, only how fast."""
    return None if source.export is not None else RECIPES["draft"]


def chosen_draft_backend(name: str | None, backend: str) -> str:
    """Where the draft runs: as asked for, else beside its target, but for OpenVINO. That makes passes over several
    rows cheap, and a draft goes row by row, which ONNX Runtime does at less cost."""
    return name or ("onnx" if backend == "openvino" else backend)


def choose_n_ctx(source: Source, n_ctx: int | None) -> int:
    """The window: what was asked for, else 4,096 or the model's own limit if that is smaller."""
    if n_ctx is None:
        return min(DEFAULT_N_CTX, source.n_ctx_train)
    if not 2 <= n_ctx <= source.n_ctx_train:
        raise UsageError(f"n_ctx={n_ctx}: {source.name} takes from 2 to {source.n_ctx_train} tokens")
    return n_ctx


def machine_key(backend: str, threads: int) -> str:
    """What measured figures depend on besides the model: processor, the backend's engine and version, threads."""
    return f"{processor_key(backend)} | {threads} threads"


def processor_key(backend: str) -> str:
    """The processor and the backend's engine and version."""
    return f"{cpu_key()} | {engine_key(backend)}"


def installed_backends() -> tuple[str, ...]:
    """Those of BACKENDS whose library is installed."""
    return tuple(backend for backend in BACKENDS if _is_installed(backend))


def engine_key(backend: str) -> str:
    """The library behind a backend, and its version. PackageNotFoundError or BackendUnavailableError without it."""
    if backend == "native":
        return f"kernels {source_key()}"
    return f"{_DISTRIBUTIONS[backend]} {metadata.version(_DISTRIBUTIONS[backend])}"


def _is_installed(backend: str) -> bool:
    if backend in _MODULES and not find_spec(_MODULES[backend]):
        return False
    try:
        return bool(engine_key(backend))
    except (metadata.PackageNotFoundError, BackendUnavailableError):
        return False


def _file_type(path: Path) -> str:
    """How a GGUF says that it is quantised, `Q4_K_M` for example; `gguf` where it does not say."""
    with GGUFFile(path) as gguf:
        number = gguf.get_int("general.file_type", -1)
    from gguf.constants import LlamaFileType

    try:
        return str(LlamaFileType(number).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "gguf"
