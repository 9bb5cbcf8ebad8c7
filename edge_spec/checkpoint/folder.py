"""What a checkpoint's folder holds, read without trust: config, weights, tokenizer, chat template."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_spec.errors import ModelFormatError
from edge_spec.formats.safetensors import SafetensorsFile
from edge_spec.store.hashing import cached_sha256

CONFIG, INDEX, TOKENIZER = "config.json", "model.safetensors.index.json", "tokenizer.json"
_OPTIONAL = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja", "chat_template.json")

MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose parts are there. `config` is its config.json, `weights` its safetensors files."""

    path: Path
    config: Mapping[str, Any]
    weights: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return str(self.config["model_type"])

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.weights)

    def get_int(self, *names: str) -> int:
        """The first of these counts that the config has; ModelFormatError if it has none, or it is not positive."""
        for name in names:
            value = self.config.get(name)
            if value is not None:
                if type(value) is not int or value <= 0:
                    raise ModelFormatError(f"{self.path / CONFIG}: {name} is {value!r}, not a count")
                return value
        raise ModelFormatError(f"{self.path / CONFIG}: it has no {names[0]}")

    def read_text(self, name: str) -> str:
        """A text file of the folder; empty where there is none."""
        path = self.path / name
        if not path.is_file():
            return ""
        return _read_text(path)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; empty where there is no such file."""
        path = self.path / name
        return _read_json(path) if path.is_file() else {}

    def sha256(self, cache_dir: Path) -> str:
        """What names the checkpoint: the hash of the hashes of all files that decide what an export is."""
        names = [CONFIG, TOKENIZER, *_OPTIONAL]
        files = [self.path / name for name in names if (self.path / name).is_file()]
        hashes = {file.name: cached_sha256(file, cache_dir) for file in [*files, *self.weights]}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def open_weights(self) -> Iterator[dict[str, SafetensorsFile]]:
        """The open file of every tensor, by the tensor's name.

        ModelFormatError where files are damaged, disagree with the index, or hold a tensor twice.
        """
        with ExitStack() as stack:
            found: dict[str, SafetensorsFile] = {}
            for path in self.weights:
                file = stack.enter_context(SafetensorsFile(path))
                for name in file.tensors:
                    if name in found:
                        raise ModelFormatError(f"{path}: the tensor {name} is in {found[name].path.name} too")
                    found[name] = file
            index = self.read_json(INDEX).get("weight_map") or {}
            for name, file_name in index.items():
                if name not in found or found[name].path.name != file_name:
                    raise ModelFormatError(f"{self.path}: the tensor {name} is missing from {file_name}")
            yield found


def positive(value: Any, name: str, where: str, default: float | None = None) -> float:
    """A number out of a config, `default` where it is None; ModelFormatError if it is not positive, or no number."""
    value = default if value is None else value
    if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
        raise ModelFormatError(f"{where}: {name} is {value!r}, not a positive number")
    return float(value)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder that looks like a checkpoint; what cannot be looked into is none."""
    try:
        return (path / CONFIG).is_file()
    except OSError:
        return False


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's config and find its parts.

    ModelFormatError names what is missing or not what it claims to be, and what to do about it.
    """
    config = _read_json(path / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise ModelFormatError(f"{path / CONFIG}: it names no model_type, so it is not a model's config")
    weights = _weight_files(path)
    if not (path / TOKENIZER).is_file():
        raise ModelFormatError(
            f"{path} has no {TOKENIZER}; load its tokenizer with transformers' AutoTokenizer and save it there"
        )
    return Checkpoint(path, config, weights)


def _weight_files(path: Path) -> tuple[Path, ...]:
    if (path / INDEX).is_file():
        listed = _read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ModelFormatError(f"{path / INDEX}: it has no weight_map")
        names = sorted(set(listed.values()))
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise ModelFormatError(f"{path}: the weight file {name} is missing, and {INDEX} names it")
        return tuple(path / name for name in names)
    files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        pickled = " (.bin files can run code when they are read, and are not)" if any(path.glob("*.bin")) else ""
        raise ModelFormatError(
            f"{path} has no .safetensors file{pickled}; save the model with transformers' save_pretrained"
        )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as exc:
        raise ModelFormatError(f"{path}: it is not JSON ({exc})") from exc
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: it holds no JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFormatError(f"{path}: it is larger than {MAX_JSON_BYTES} bytes")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ModelFormatError(f"{path}: it cannot be read ({exc})") from exc
