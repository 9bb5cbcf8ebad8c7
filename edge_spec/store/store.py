"""The models on this machine: finding, pulling, listing and removing them."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from edge_spec.errors import DownloadError, IntegrityError, ModelNotFoundError, StorageError, UsageError
from edge_spec.store.hashing import cached_sha256
from edge_spec.store.hub import parse_reference
from edge_spec.store.manifest import Catalogue, Pair, Weights, load_catalogue, manifest_folder
from edge_spec.store.partial import SourceError, sha256_of
from edge_spec.store.pull import Note, exclusive, fetch
from edge_spec.store.record import Record, has_size, tree_bytes
from edge_spec.types import Progress

DEFAULT_PAIR = "qwen2.5-coder"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a model that is made here may be called."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model file that is here. `licence` is None where nobody told it."""

    name: str
    path: Path
    sha256: str
    licence: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """What is known of a model and what of it is on the disk; sizes in bytes."""

    name: str
    known: bool
    """It has a manifest; else it is a hub reference that was pulled."""
    present: bool
    size_bytes: int
    licence: str | None
    architecture: str | None
    partial_bytes: int
    """What an unfinished pull left."""
    exports_bytes: int
    path: Path | None


class Store:
    """Model files, their exports and caches, below two folders that are made when they are first written to."""

    def __init__(
        self, data_dir: Path | None = None, cache_dir: Path | None = None, *, manifests: Path | None = None
    ) -> None:
        """Use the platform's folders, or `EDGE_SPEC_HOME`, or the ones given (`cache_dir` defaults to one inside).

        `manifests` replaces the folder of the manifests that come with the package.
        """
        home = os.environ.get("EDGE_SPEC_HOME")
        if data_dir is None and home:
            data_dir = Path(home).expanduser().absolute()
        if data_dir is None:
            import platformdirs

            data_dir = platformdirs.user_data_path("edge-spec", appauthor=False)
            cache_dir = cache_dir or platformdirs.user_cache_path("edge-spec", appauthor=False)
        self.data_dir = data_dir
        self.cache_dir = cache_dir or data_dir / "cache"
        self.exports_dir = data_dir / "exports"
        self.history_dir = data_dir / "history"
        self._manifests = manifests or manifest_folder()

    @cached_property
    def _catalogue(self) -> Catalogue:
        return load_catalogue(self._manifests)

    def resolve(self, ref: str | Path) -> LocalModel:
        """The file of a model by manifest name, by a hub reference that was pulled, or by its path.

        Raises ModelNotFoundError with the command that helps if it is unknown or not here, IntegrityError if its file
        is not whole any more.
        """
        if isinstance(ref, str):
            weights = self._catalogue.weights.get(ref)
            if not self.is_path(ref):
                found = self._present(ref)
                if found is not None:
                    return found
                if weights is not None or not Path(ref).is_file():
                    raise ModelNotFoundError(f"{ref} is not on this machine; fetch it with `edge-spec pull {ref}`")
        try:
            path = Path(ref).expanduser()
            if ref != "" and path.is_file():
                return LocalModel(path.stem, path.absolute(), cached_sha256(path, self.cache_dir), None)
            raise self._unknown(ref)
        except (OSError, RuntimeError) as exc:  # a name that is too long, a folder that is closed, no such user's home
            reason = exc.strerror if isinstance(exc, OSError) else exc
            raise ModelNotFoundError(f"{ref} cannot be read: {reason}") from exc

    def has(self, name: str) -> bool:
        """Whether a model that the catalogue knows, or that was pulled, is here and whole."""
        return self._present(name) is not None

    def pair(self, name: str) -> Pair:
        """The pair of this name; ModelNotFoundError, naming those there are, if there is none."""
        pairs = self._catalogue.pairs
        if name in self._catalogue.weights:
            raise ModelNotFoundError(f"{name} is a model, not a pair; give it as the target (--target, target=)")
        if name not in pairs:
            raise ModelNotFoundError(f"no pair is called {name!r}; there are: {', '.join(sorted(pairs))}")
        return pairs[name]

    def pairs(self) -> list[Pair]:
        """Every pair that is known."""
        return list(self._catalogue.pairs.values())

    def weights(self, name: str) -> Weights | None:
        """What the manifest of this name says, None if there is none."""
        return self._catalogue.weights.get(name)

    def expand(self, name: str) -> list[str]:
        """The models that a name stands for: both of a pair, else the name itself."""
        pair = self._catalogue.pairs.get(name)
        return [name] if pair is None else [pair.target, pair.draft]

    def pull(
        self, ref: str, *, progress: Progress | None = None, note: Note | None = None, verify: bool = False
    ) -> LocalModel:
        """Bring a model here by manifest name or hub reference (`owner/repo:file.gguf`); a path is only looked up.

        Returns at once if it is here already; with `verify` its bytes are hashed again first, and fetched again if
        they are not right. `progress` gets (bytes done, bytes in all); if it returns False the pull stops, and the
        next one goes on from there. `note` gets lines for the user. Raises ModelNotFoundError for an unknown name,
        DownloadError or IntegrityError if no source delivers, StorageError if the disk is full or cannot be written.
        """
        note = note or _say_nothing
        weights = self._catalogue.weights.get(ref)
        if self.is_path(ref):
            local = self.resolve(ref)
            note(f"{ref} is a file of yours: there is nothing to pull")
            return local
        if not verify and (found := self._intact(ref)):
            note(f"{ref} is already here: {found.path}")  # without the lock: the store may be read-only
            return found
        try:
            with exclusive(self._lock(ref), note, ref):
                found = self._intact(ref)
                if found is not None and not (verify and self._damaged(found, note)):
                    note(f"{ref} is already here: {found.path}")
                    return found
                folder = self._folder(ref)
                weights = weights or _weights_of_hub(ref)
                path = folder / weights.file
                # A crash between the rename and the record leaves a whole file without one.
                if not (has_size(path, weights.n_bytes) and sha256_of(path) == weights.sha256):
                    path = fetch(weights, folder, progress=progress, note=note)
                _record_of(weights).write(folder)
                return LocalModel(ref, path, weights.sha256, weights.licence)
        except OSError as exc:
            raise StorageError(f"cannot write below {self.data_dir}: {exc}") from exc

    def make(
        self, name: str, make: Callable[[Path], None], *, made_from: str, source: LocalModel, note: Note | None = None
    ) -> LocalModel:
        """The model of this name, made now by `make(path)` unless it is here and was made from the same.

        `made_from` says of what and how. `make` writes the new file, and leaves nothing if it fails. Licence and
        architecture are the source's. Raises UsageError for a name that is a manifest's or not a plain word, and what
        `make` raises.
        """
        if name in self._catalogue.weights or name in self._catalogue.pairs or _NAME.fullmatch(name) is None:
            raise UsageError(f"{name!r} cannot be the new model's name: letters, digits, . _ - and no known model's")
        try:
            with exclusive(self._lock(name), note or _say_nothing, name):
                folder = self._folder(name)
                record = Record.read(folder)
                if record is not None and record.made_from == made_from and (found := self._intact(name)):
                    return found
                path = folder / f"{name}.gguf"
                if folder.exists():
                    self._remove_tree(folder)
                folder.mkdir(parents=True)
                try:
                    make(path)
                    sha256 = sha256_of(path)
                    known = Record.read(source.path.parent)
                    architecture = known.architecture if known else None
                    n_bytes = path.stat().st_size
                    Record(name, path.name, n_bytes, sha256, source.licence, architecture, made_from).write(folder)
                except BaseException:
                    self._remove_tree(folder)
                    raise
                return LocalModel(name, path, sha256, source.licence)
        except OSError as exc:
            raise StorageError(f"cannot write below {self.data_dir}: {exc}") from exc

    def models(self) -> list[ModelStatus]:
        """Every known model, then those that were pulled by reference or made here, with what each has on the disk."""
        catalogue = self._catalogue.weights
        pulled = sorted({record.name for record in self._records()} - catalogue.keys())
        return [self._status(name) for name in [*sorted(catalogue), *pulled]]

    def other_exports_bytes(self) -> int:
        """Bytes of exports that belong to none of `models()`: of local files, or of models that have changed since."""
        known = {self._sha256(status.name) for status in self.models()}
        folders = self.exports_dir.iterdir() if self.exports_dir.is_dir() else ()
        return sum(tree_bytes(folder) for folder in folders if folder.name not in known)

    def remove(self, name: str) -> int:
        """Remove a model's file, what an unfinished pull left, and its exports; returns the bytes that were freed.

        For a path outside the store only its exports are removed: the file is the user's. Raises ModelNotFoundError
        if there is nothing to remove, DownloadError if another process is pulling the model, StorageError if the disk
        cannot be written.
        """
        try:
            unfinished = _NAME.fullmatch(name) is not None and self._folder(name).is_dir()
            if self.is_path(name) and not unfinished:
                own = self.exports_dir / self.resolve(name).sha256
                if not own.exists():
                    raise ModelNotFoundError(f"there are no exports of {name}; the file itself is yours to remove")
                return self._remove_tree(own)
            with exclusive(self._lock(name), None, name):
                folder, sha256 = self._folder(name), self._sha256(name)
                exports = self.exports_dir / sha256 if sha256 else None
                if not folder.exists() and not (exports and exports.exists()):
                    raise ModelNotFoundError(f"{name} is not on this machine")
                shared = any(r.sha256 == sha256 for r in self._records() if r.name != name)
                freed = 0 if exports is None or shared else self._remove_tree(exports)
                return freed + self._remove_tree(folder)
        except OSError as exc:
            raise StorageError(f"cannot remove {name}: {exc}") from exc

    def is_path(self, ref: str) -> bool:
        """Whether `ref` can only be a path: neither in a manifest, nor a hub reference, nor a model made here."""
        return ref not in self._catalogue.weights and parse_reference(ref) is None and not self._is_made(ref)

    def _is_made(self, name: str) -> bool:
        return _NAME.fullmatch(name) is not None and Record.read(self._folder(name)) is not None

    def _folder(self, ref: str) -> Path:
        # Quoted, a reference is one safe path segment, and two references never share one.
        return self.data_dir / "models" / quote(ref, safe="")

    def _lock(self, ref: str) -> Path:
        return self.data_dir / "locks" / f"{quote(ref, safe='')}.lock"

    def _sha256(self, name: str) -> str | None:
        weights = self._catalogue.weights.get(name)
        record = Record.read(self._folder(name))
        return weights.sha256 if weights else record.sha256 if record else None

    def _present(self, ref: str) -> LocalModel | None:
        """The verified file of a name or reference, None if there is none, IntegrityError if it was cut since."""
        record = Record.read(self._folder(ref))
        weights = self._catalogue.weights.get(ref)
        if record is None or (weights is not None and record.sha256 != weights.sha256):
            return None
        path = self._folder(ref) / record.file
        if not has_size(path, record.n_bytes):
            again = f"repeat `edge-spec pull {ref}`" if record.made_from is None else "export it again"
            raise IntegrityError(f"{path} has not its {record.n_bytes} bytes any more; {again}")
        return LocalModel(ref, path, record.sha256, record.licence)

    def _intact(self, ref: str) -> LocalModel | None:
        """What `_present` finds; None where that is cut."""
        try:
            return self._present(ref)
        except IntegrityError:
            return None

    def _damaged(self, found: LocalModel, note: Note) -> bool:
        """Whether a file has other bytes than it had when it was pulled; it is then removed."""
        if sha256_of(found.path) == found.sha256:
            return False
        note(f"{found.name}: its bytes are damaged; fetching it again")
        found.path.unlink()
        return True

    def _records(self) -> Iterator[Record]:
        return Record.read_all(self.data_dir / "models")

    def _status(self, name: str) -> ModelStatus:
        weights = self._catalogue.weights.get(name)
        folder, record, sha256 = self._folder(name), Record.read(self._folder(name)), self._sha256(name)
        known = weights or record
        assert known is not None
        path = folder / known.file
        present = record is not None and record.sha256 == sha256 and has_size(path, known.n_bytes)
        return ModelStatus(
            name=name,
            known=weights is not None,
            present=present,
            size_bytes=known.n_bytes,
            licence=known.licence,
            architecture=known.architecture,
            partial_bytes=tree_bytes(folder) if not present else 0,
            exports_bytes=tree_bytes(self.exports_dir / sha256) if sha256 else 0,
            path=path if present else None,
        )

    def _unknown(self, ref: str | Path) -> ModelNotFoundError:
        catalogue = self._catalogue
        if str(ref) in catalogue.pairs:
            pair = catalogue.pairs[str(ref)]
            return ModelNotFoundError(f"{ref} is a pair, not a model; its models are {pair.target} and {pair.draft}")
        if ref != "" and Path(ref).is_dir():
            return ModelNotFoundError(f"{ref} is a folder; name the .gguf file in it")
        if Path(ref).suffix.lower() == ".gguf":
            return ModelNotFoundError(f"there is no {'regular ' if Path(ref).exists() else ''}file {ref}")
        names = sorted(catalogue.weights)
        near = difflib.get_close_matches(str(ref).lower(), names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
        return ModelNotFoundError(
            f"no model, file or hub reference (owner/repo:file.gguf) is called {str(ref)!r}; {hint}"
        )

    def _remove_tree(self, folder: Path) -> int:
        freed = tree_bytes(folder)
        if folder.exists():
            shutil.rmtree(folder)
        return freed


def _say_nothing(_: str) -> None:
    """The note of a caller who gave none."""


def _record_of(weights: Weights) -> Record:
    """What is kept of a manifest once its file is here."""
    return Record(weights.name, weights.file, weights.n_bytes, weights.sha256, weights.licence, weights.architecture)


def _weights_of_hub(ref: str) -> Weights:
    """What `owner/repo:file.gguf` is now, pinned by the hash that the hub gives."""
    source = parse_reference(ref)
    assert source is not None
    try:
        found = source.lookup()
    except SourceError as exc:
        raise DownloadError(
            f"{ref}: the hub does not deliver it ({exc}); check the name and the network, or fetch the file another "
            f"way and give its path"
        ) from exc
    if found.sha256 is None or not found.n_bytes:
        raise DownloadError(f"{ref}: the hub gives no sha256 and size for this file, so it could not be verified")
    file = source.file.rsplit("/", 1)[-1]
    return Weights(
        name=ref,
        title=ref,
        file=file,
        n_bytes=found.n_bytes,
        sha256=found.sha256,
        licence=None,
        architecture=None,
        sources=(type(source)(repo=source.repo, file=source.file, revision=found.commit),),
    )
