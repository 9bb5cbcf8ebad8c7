"""The fake model that other laws are tested on obeys the laws of a real one."""

from __future__ import annotations

import pytest

from tests.contract import CausalLMContract, EqualRowsContract, MakeModel
from tests.fakes import FakeLM


class TestFake(EqualRowsContract):
    misuse = AssertionError  # only our own tests use it

    @pytest.fixture
    def make_model(self) -> MakeModel:
        return lambda n_ctx: FakeLM(n_ctx=n_ctx, order=None)


class TestFakeWithoutAlignment(CausalLMContract):
    misuse = AssertionError

    @pytest.fixture
    def make_model(self) -> MakeModel:
        return lambda n_ctx: FakeLM(n_ctx=n_ctx, order=None, max_rows=16, row_alignment=None)
