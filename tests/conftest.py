"""Where the marked tests find their models: an environment variable each, else the user's store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_spec.errors import ModelNotFoundError
from edge_spec.store import Store


def _model(name: str, variable: str) -> Path:
    if variable in os.environ:
        return Path(os.environ[variable])
    try:
        return Store().resolve(name).path
    except ModelNotFoundError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return _model("smollm2-135m", "EDGE_SPEC_TEST_SMOLLM2")


@pytest.fixture(scope="session")
def target_path() -> Path:
    return _model("qwen2.5-coder-1.5b", "EDGE_SPEC_TEST_TARGET")


@pytest.fixture(scope="session")
def draft_path() -> Path:
    return _model("qwen2.5-coder-0.5b", "EDGE_SPEC_TEST_DRAFT")
