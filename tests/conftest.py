"""The real models of the marked tests, from the user's store, and the folder of kernels that are compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_spec.errors import ModelNotFoundError
from edge_spec.store import Store


def _model(name: str) -> Path:
    """The GGUF of a model; a test that was selected and cannot run fails, and says what it needs."""
    try:
        return Store().resolve(name).path
    except ModelNotFoundError as exc:
        pytest.fail(str(exc), pytrace=False)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return _model("smollm2-135m")


@pytest.fixture(scope="session")
def target_path() -> Path:
    return _model("qwen2.5-coder-1.5b")


@pytest.fixture(scope="session")
def draft_path() -> Path:
    return _model("qwen2.5-coder-0.5b")


@pytest.fixture(scope="session")
def kernels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the native backend keeps its kernels."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session", autouse=True)
def _kernels_are_compiled_once(kernels_dir: Path) -> Iterator[None]:
    """Whatever home a test gives its engines, they find the kernels of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_spec.loading.kernels_dir", lambda _store: kernels_dir)
        yield
