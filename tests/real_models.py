"""Where tests that are marked `real` find their model."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_spec.errors import ModelNotFoundError
from edge_spec.store import Store


def smollm2_path() -> Path:
    """The GGUF of smollm2-135m in the user's store; skips the test, with the remedy, if it was not pulled."""
    try:
        return Store().resolve("smollm2-135m").path
    except ModelNotFoundError as exc:
        pytest.skip(str(exc))
