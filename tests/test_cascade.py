"""The cascade: the draft model's own drafts, in fewer passes."""

from __future__ import annotations

import numpy as np
import pytest

from edge_spec.decoding.decoder import SpeculativeDecoder
from edge_spec.decoding.session import Session
from edge_spec.drafting import CascadeDrafter, ModelDrafter
from edge_spec.types import SamplingParams
from tests.fakes import FakeLM
from tests.test_drafting import request

GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.9, top_k=4, presence_penalty=0.3)


def fake(seed: int = 0) -> FakeLM:
    """Follows the last token alone, so that its greedy text soon repeats and can be looked up."""
    return FakeLM(n_vocab=8, n_ctx=200, order=1, seed=seed)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(4))
def test_a_cascade_drafts_what_the_model_alone_drafts(sampling: SamplingParams, seed: int) -> None:
    rng = np.random.default_rng(seed)
    context = [int(token) for token in rng.integers(0, 8, 30)]
    drafts = []
    for kind in (ModelDrafter, CascadeDrafter):
        drafter = kind(Session(fake(seed=seed)), draft_tokens=12)
        drafter.start(request(sampling, n_vocab=8, prompt_length=30))
        drafts.append([drafter.propose(context[:n], 12) for n in (20, 25, 30)])
    for alone, cascade in zip(*drafts, strict=True):
        assert cascade.tokens == alone.tokens
        assert (cascade.q is None) == (alone.q is None)
        for mine, theirs in zip(cascade.q or [], alone.q or [], strict=True):
            assert np.array_equal(mine.ids, theirs.ids)
            assert np.allclose(mine.probs, theirs.probs)


@pytest.mark.parametrize("seed", range(6))
def test_rows_behind_a_rejected_token_are_not_used(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cascade, alone = (
        kind(Session(FakeLM(n_vocab=4, n_ctx=300, order=3, seed=seed)), draft_tokens=5)
        for kind in (CascadeDrafter, ModelDrafter)
    )
    context = [int(token) for token in rng.integers(0, 4, 20)]
    for drafter in (cascade, alone):
        drafter.start(request(GREEDY, n_vocab=4, prompt_length=20))
    for _ in range(30):
        drafted = cascade.propose(context, 5).tokens
        assert drafted == alone.propose(context, 5).tokens
        kept = int(rng.integers(0, len(drafted) + 1))
        context = [*context, *drafted[:kept], int(rng.integers(0, 4))]


def test_where_text_repeats_a_cascade_takes_fewer_passes() -> None:
    passes = []
    for kind in (ModelDrafter, CascadeDrafter):
        model = fake()
        decoder = SpeculativeDecoder(Session(fake()), kind(Session(model), draft_tokens=6))
        list(decoder.generate([1, 2, 3], max_tokens=100))
        passes.append(len(model.calls))
    alone, cascade = passes
    assert cascade < alone / 1.5


def test_a_cascade_keeps_to_the_models_window_and_rows() -> None:
    model = FakeLM(n_vocab=8, n_ctx=40, max_rows=2, order=1)
    decoder = SpeculativeDecoder(Session(fake()), CascadeDrafter(Session(model), draft_tokens=6))
    list(decoder.generate([1, 2, 3], max_tokens=100))
    assert max(call.rows for call in model.calls) == 2
    assert max(call.start + len(call.tokens) for call in model.calls) <= 40
