"""What the planner goes by: costs, chances, the lengths of answers, and what may be lost."""

from __future__ import annotations

import pytest

from edge_spec.drafting import Costs, Growth, fit_growth
from edge_spec.drafting.acceptance import Acceptance
from edge_spec.drafting.lengths import AnswerLengths
from edge_spec.drafting.purse import Purse

# ---- costs


def test_the_first_pass_sets_the_scale_and_later_ones_correct_each_width() -> None:
    costs = Costs(max_rows=8)
    costs.observe_target(4, 0.040)
    assert costs.target_s(4) == pytest.approx(0.040)
    assert 0.020 < costs.target_s(1) < 0.040 < costs.target_s(8)
    for _ in range(60):
        costs.observe_target(1, 0.030)
        costs.observe_target(4, 0.033)
    assert costs.target_s(1) == pytest.approx(0.030, rel=0.05)
    assert costs.target_s(4) == pytest.approx(0.033, rel=0.05)


def test_padded_rows_cost_what_their_padding_costs() -> None:
    costs = Costs(max_rows=8, alignment=2)
    costs.observe_target(3, 0.05)
    assert costs.target_s(3) == costs.target_s(4) > costs.target_s(2) == costs.target_s(1)


def test_a_machine_that_slows_down_makes_every_pass_look_slower() -> None:
    costs = Costs(max_rows=4)
    costs.observe_target(1, 0.03)
    before = costs.target_s(4)
    for _ in range(20):
        costs.observe_target(1, 0.06)
    assert costs.target_s(1) > 0.055
    assert costs.target_s(4) > 1.3 * before


def test_a_machine_that_recovers_makes_drafts_look_cheaper_though_none_is_made() -> None:
    costs = Costs(max_rows=4)
    costs.observe_target(1, 0.3)
    costs.observe_draft(1, 0.1)
    for _ in range(60):
        costs.observe_target(1, 0.03)
    assert costs.draft_s < 0.05


def test_one_interrupted_pass_does_not_change_the_picture() -> None:
    costs = Costs(max_rows=4)
    costs.observe_target(2, 0.03)
    costs.observe_target(2, 3.0)
    assert costs.target_s(2) < 0.04


def test_until_wide_passes_are_seen_rows_cost_what_tokens_of_a_prompt_do() -> None:
    costs = Costs(max_rows=8)
    costs.observe_prompt(200, 5.0)
    costs.observe_target(1, 0.050)
    assert costs.target_s(8) == pytest.approx(0.050 + 7 * 0.025)
    costs.observe_target(4, 0.080)
    assert costs.target_s(8) == pytest.approx(0.120, rel=0.1), "what passes took counts more"


def test_a_prompt_too_short_to_tell_of_rows_does_not() -> None:
    costs, told = Costs(max_rows=8), Costs(max_rows=8)
    told.observe_prompt(3, 0.15)
    for each in (costs, told):
        each.observe_target(1, 0.050)
    assert told.target_s(8) == costs.target_s(8)


def test_a_prompt_that_was_slow_to_read_makes_no_pass_cheaper_than_nothing() -> None:
    costs = Costs(max_rows=8)
    costs.observe_prompt(200, 200 * 0.5)
    costs.observe_target(1, 0.050)
    assert costs.target_s(8) == pytest.approx(8 * 0.050)


def test_where_rows_are_dear_the_draft_is_taken_to_read_dearly_too() -> None:
    shares = []
    for row_s in (0.002, 0.030):
        costs = Costs(max_rows=8)
        costs.observe_prompt(200, 200 * row_s)
        costs.observe_target(1, 0.050)
        shares.append(costs.read_s / costs.draft_s)
    assert shares == pytest.approx([0.2, 0.6])


def test_the_quickest_prompt_tells_what_rows_cost() -> None:
    """The first one of a process may have waited for the disk."""
    costs = Costs(max_rows=8)
    for seconds in (20.0, 2.0, 4.0):
        costs.observe_prompt(200, seconds)
    costs.observe_target(1, 0.050)
    assert costs.target_s(8) == pytest.approx(0.050 + 7 * 0.010)


@pytest.mark.parametrize("wide", [0.060, 0.150, 0.400], ids=["flat", "through nothing", "steeper than that"])
def test_reading_is_taken_to_cost_a_draft_no_more_than_drafting(wide: float) -> None:
    costs = Costs(max_rows=8)
    costs.observe_prompt(200, 5.0)
    costs.observe_target(2, 0.050)
    costs.observe_target(4, wide)
    assert 0.2 * costs.draft_s < costs.read_s <= costs.draft_s


def test_reading_and_drafting_are_told_apart() -> None:
    costs = Costs(max_rows=4)
    costs.observe_draft(1, 0.010)
    costs.observe_draft(101, 0.210)
    assert costs.draft_s == pytest.approx(0.010)
    assert costs.read_s == pytest.approx(0.002)


def test_costs_survive_a_restart_and_nonsense_does_not() -> None:
    costs = Costs(max_rows=4, alignment=2)
    assert costs.to_json() == {}
    costs.observe_target(2, 0.03)
    costs.observe_draft(1, 0.01)
    again = Costs(max_rows=4, alignment=2)
    again.restore(costs.to_json())
    assert (again.target_s(3), again.draft_s) == (costs.target_s(3), costs.draft_s)
    for nonsense in ({}, {"target": 3}, {"target": {"2": "x", "4": 1.0}}, {"target": {"1": 1.0}}):
        fresh = Costs(max_rows=4, alignment=2)
        fresh.restore(nonsense)
        assert fresh.target_s(2) == Costs(max_rows=4, alignment=2).target_s(2)


def test_a_longer_context_makes_passes_dearer_by_as_much_for_each_token() -> None:
    costs = Costs(max_rows=8, growth=Growth(0.0004, 0.0001), draft_growth=Growth(0.001))
    costs.observe_target(1, 0.030)
    costs.observe_target(4, 0.060)
    costs.observe_draft(1, 0.010)
    costs.move(1000)
    assert costs.target_s(1) == pytest.approx(0.030 * 1.5)
    assert costs.target_s(4) == pytest.approx(0.060 + 0.030 * 0.8)
    assert costs.draft_s == pytest.approx(0.020)


def test_what_is_seen_behind_a_long_context_tells_of_short_ones() -> None:
    costs = Costs(max_rows=8, growth=Growth(0.0005), draft_growth=Growth(0.001))
    costs.move(1000)
    costs.observe_target(1, 0.045)
    costs.observe_draft(1, 0.020)
    costs.move(0)
    assert (costs.target_s(1), costs.draft_s) == pytest.approx((0.030, 0.010))
    costs.move(1000)
    for _ in range(60):
        costs.observe_target(1, 0.090)  # another program runs
    costs.move(0)
    assert costs.target_s(1) == pytest.approx(0.060, rel=0.05)


def test_a_measured_growth_survives_a_restart_and_nonsense_does_not() -> None:
    kept = {"target": {"1": 0.03}, "draft_s": 0.01, "growth": [0.001, 0.0], "draft_growth": [0.002, 0.0]}
    costs = Costs(max_rows=4)
    costs.restore(kept)
    again = Costs(max_rows=4)
    again.restore(costs.to_json())
    again.move(500)
    assert (again.target_s(1), again.draft_s) == pytest.approx((0.045, 0.020))
    for nonsense in (None, 3, [1], [0.1, -1.0], ["a", 0.1], [2.0, 0.0]):
        costs = Costs(max_rows=4)
        costs.restore(kept | {"growth": nonsense})
        costs.move(500)
        assert costs.target_s(1) == pytest.approx(0.03)


def test_noise_makes_a_growth_neither_none_nor_enormous() -> None:
    guess = Growth(0.0003, 0.00003)
    for slower in (0.5, 1.0, 3.0, 100.0):
        growth, bases = fit_growth({1: 0.03, 2: 0.04}, {1: 0.03 * slower, 2: 0.04 * slower}, (256, 768), guess)
        assert guess.fixed / 2 <= growth.fixed <= guess.fixed * 2
        assert growth.per_row / growth.fixed == pytest.approx(0.1)
        assert 0.02 < bases[1] < 0.03 < bases[2] < 0.04
    one_is_wild = {1: 0.1, 2: 0.04 + 0.03 * guess.passes(2, 512), 4: 0.06 + 0.03 * guess.passes(4, 512)}
    growth, _ = fit_growth({1: 0.03, 2: 0.04, 4: 0.06}, one_is_wild, (256, 768), guess)
    assert growth.fixed == pytest.approx(guess.fixed, rel=0.15)


# ---- acceptance


def test_chances_start_at_the_scale_and_move_to_what_happens() -> None:
    acceptance = Acceptance(((0.0, 0.2), (0.5, 0.9)))
    assert acceptance.chances([0.1, 0.7, 0.5]) == pytest.approx([0.2, 0.9, 0.9])
    for _ in range(200):
        acceptance.observe(0.7, accepted=False)
    assert acceptance.chance(0.7) < 0.05
    assert acceptance.chance(0.1) == pytest.approx(0.2)


def test_a_draft_teaches_up_to_its_first_rejection() -> None:
    acceptance = Acceptance(((0, 0.5), (1, 0.5), (2, 0.5), (3, 0.5)))
    acceptance.observe_draft([0, 1, 2, 3], 2)
    chances = acceptance.chances([0, 1, 2, 3])
    assert min(chances[:2]) > 0.5 > chances[2]
    assert chances[3] == 0.5, "what came after the rejection was never judged"


# ---- how long answers get


def test_before_any_answer_is_known_one_is_taken_to_last_by_a_share_of_its_length() -> None:
    lengths = AnswerLengths()
    assert lengths.left(0) == 0
    assert 0 < lengths.left(10) < 20
    assert lengths.left(200) == pytest.approx(20 * lengths.left(10))


def test_answers_are_taken_to_last_as_long_as_the_latest_did() -> None:
    lengths = AnswerLengths()
    for _ in range(16):
        lengths.add(100)
    assert lengths.left(1) == 99
    assert lengths.left(90) == pytest.approx(10, abs=5)
    for _ in range(16):
        lengths.add(20)
    assert lengths.left(1) == 19
    assert lengths.left(90) == pytest.approx(AnswerLengths().left(90)), "no answer got so long"


def test_of_short_and_long_answers_alike_neither_is_relied_on() -> None:
    lengths = AnswerLengths()
    for _ in range(8):
        lengths.add(20)
        lengths.add(200)
    assert lengths.left(5) <= 15
    assert lengths.left(21) > 100, "it is none of the short ones"


# ---- what may be lost


def test_a_purse_pays_what_was_won_and_little_more() -> None:
    purse = Purse()
    assert purse.pays(0)
    assert not purse.pays(1)
    purse.settle(4, 2.5)
    assert purse.pays(1.5)
    purse.settle(1, 3.0)
    assert not purse.pays(0.5)
    for _ in range(20):
        purse.settle(1, 1.0)
    assert purse.pays(0.5), "a share of the time is always to spend"
