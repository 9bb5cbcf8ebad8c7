from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from edge_spec.errors import ModelNotFoundError
from edge_spec.store import DEFAULT_PAIR, Store, hashing
from edge_spec.store.partial import sha256_of
from tests.store_fixtures import CONTENT, Scripted, rest, store_with

SHA = hashlib.sha256(CONTENT).hexdigest()


def export_of(store: Store, sha256: str, n_bytes: int = 100) -> Path:
    path = store.exports_dir / sha256 / "int4-key" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(n_bytes))
    return path


def test_edge_spec_home_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path))
    store = Store()
    assert store.exports_dir.is_relative_to(tmp_path)
    assert store.cache_dir.is_relative_to(tmp_path)


def test_without_it_the_platforms_folders_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_SPEC_HOME", raising=False)
    store = Store()
    assert "edge-spec" in str(store.exports_dir)
    assert store.cache_dir != store.data_dir


def test_asking_writes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    store.models()
    store.pair(DEFAULT_PAIR)
    with pytest.raises(ModelNotFoundError):
        store.resolve("smollm2-135m")
    assert list(tmp_path.iterdir()) == []


def test_a_known_model_that_is_not_here_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="`edge-spec pull smollm2-135m`"):
        Store(tmp_path).resolve("smollm2-135m")


@pytest.mark.parametrize(
    ("ref", "hint"),
    [
        ("smollm2-136m", "did you mean smollm2-135m"),
        ("Qwen2.5-Coder-0.5B", "did you mean qwen2.5-coder-0.5b"),
        ("xyzzy", "known are"),
        (DEFAULT_PAIR, "is a pair"),
        ("owner/repo:file.gguf", "edge-spec pull owner/repo:file.gguf"),
        (Path("nowhere.gguf"), "nowhere.gguf"),
        (".", "is a folder"),
        ("", "is called ''"),
        ("nowhere.gguf", "there is no file"),
        ("x" * 300, "too long"),
        ("~nobody-of-this-name/x.gguf", "cannot be read"),
    ],
)
def test_an_unknown_reference_gets_a_hint(tmp_path: Path, ref: str | Path, hint: str) -> None:
    with pytest.raises(ModelNotFoundError, match=hint):
        Store(tmp_path).resolve(ref)


def test_a_model_in_the_place_of_a_pair_is_told_its_place(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="--target"):
        Store(tmp_path).pair("smollm2-135m")


def test_an_unknown_pair_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=DEFAULT_PAIR):
        Store(tmp_path).pair("nobody")


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_local_path_works_wherever_a_name_does(tmp_path: Path, as_type: type) -> None:
    path = tmp_path / "my.model.gguf"
    path.write_bytes(CONTENT)
    store = Store(tmp_path / "data")
    model = store.resolve(as_type(path))
    assert (model.name, model.path, model.sha256, model.licence) == ("my.model", path, SHA, None)
    assert store.pull(str(path)) == model


def test_a_local_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(CONTENT)
    hashed: list[Path] = []

    def count(file: Path) -> str:
        hashed.append(file)
        return sha256_of(file)

    monkeypatch.setattr(hashing, "sha256_of", count)
    store = Store(tmp_path / "data")
    assert store.resolve(path).sha256 == store.resolve(path).sha256 == SHA
    assert len(hashed) == 1
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(1, 1))
    assert store.resolve(path).sha256 == hashlib.sha256(CONTENT[::-1]).hexdigest()
    assert len(hashed) == 2


@pytest.mark.parametrize("junk", ["", "{}", "[1]", "null", '{"identity": 1'])
def test_a_damaged_hash_cache_is_only_a_miss(tmp_path: Path, junk: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(CONTENT)
    store = Store(tmp_path / "data")
    store.resolve(path)
    (entry,) = (store.cache_dir / "sha256").iterdir()
    entry.write_text(junk)
    assert store.resolve(path).sha256 == SHA


def test_a_manifest_that_moved_on_makes_the_old_file_absent(tmp_path: Path) -> None:
    store_with(tmp_path, Scripted(rest)).pull("tiny")
    record = tmp_path / "models" / "tiny" / "model.json"
    record.write_text(record.read_text().replace(SHA, "0" * 64))
    store = store_with(tmp_path, Scripted(rest))
    with pytest.raises(ModelNotFoundError):
        store.resolve("tiny")
    assert not store.models()[0].present


def test_models_tells_presence_size_licence_and_exports(tmp_path: Path) -> None:
    store = store_with(tmp_path, Scripted(rest))
    (before,) = store.models()
    assert (before.known, before.present, before.size_bytes, before.licence) == (True, False, len(CONTENT), "MIT")
    assert before.path is None
    path = store.pull("tiny").path
    export_of(store, SHA)
    export_of(store, "f" * 64, 7)
    (after,) = store.models()
    assert (after.present, after.path, after.exports_bytes, after.partial_bytes) == (True, path, 100, 0)
    assert store.other_exports_bytes() == 7


def test_an_unfinished_pull_is_listed_and_removable(tmp_path: Path) -> None:
    store = store_with(tmp_path)
    partial = tmp_path / "models" / "tiny" / "tiny.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(10))
    assert store.models()[0].partial_bytes == 10
    assert store.remove("tiny") == 10


def test_remove_frees_the_file_and_its_exports_and_tells_how_much(tmp_path: Path) -> None:
    store = store_with(tmp_path, Scripted(rest))
    path = store.pull("tiny").path
    export, other = export_of(store, SHA), export_of(store, "f" * 64)
    freed = store.remove("tiny")
    assert freed >= len(CONTENT) + 100
    assert not path.exists()
    assert not export.exists()
    assert other.exists()
    with pytest.raises(ModelNotFoundError, match="not on this machine"):
        store.remove("tiny")


def test_removing_a_users_own_file_removes_only_its_exports(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    path = tmp_path / "own.gguf"
    path.write_bytes(CONTENT)
    export = export_of(store, SHA)
    assert store.remove(str(path)) == 100
    assert path.exists()
    assert not export.exists()
    with pytest.raises(ModelNotFoundError, match="no exports"):
        store.remove(str(path))


def test_exports_stay_while_another_model_has_the_same_bytes(tmp_path: Path) -> None:
    store = store_with(tmp_path, Scripted(rest))
    store.pull("tiny")
    twin = tmp_path / "models" / "a%2Fb%3Atiny.gguf"
    twin.mkdir()
    record = (tmp_path / "models" / "tiny" / "model.json").read_text()
    (twin / "model.json").write_text(record.replace('"name": "tiny"', '"name": "a/b:tiny.gguf"'))
    export = export_of(store, SHA)
    assert store.other_exports_bytes() == 0
    store.remove("tiny")
    assert export.exists()


def test_a_pairs_name_stands_for_both_models(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.expand(DEFAULT_PAIR) == ["qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"]
    assert store.expand("anything") == ["anything"]
