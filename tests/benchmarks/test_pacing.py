import pytest

from benchmarks.pacing import main
from benchmarks.pacing.cells import AGAIN, CHOSEN, PLANS, STREAM, Cell, Outcome, geometric_mean
from benchmarks.shared.fleet_load import Written, WrittenTexts


def test_chosen_plans_are_held_against_the_best_fixed_one_and_against_the_edge_by_itself() -> None:
    cell = Cell(1, "Q4_0", 50, 1, {plan: Outcome(paces=[5.0, 5.0, 5.0]) for plan in PLANS})
    cell.outcomes[CHOSEN] = Outcome(paces=[9.0, 9.0, 40.0])  # the best of all, but not a fixed plan
    cell.outcomes["8"] = Outcome(paces=[10.0, 10.0, 50.0])
    assert cell.best == "8"
    assert cell.against_best == pytest.approx(0.9)
    assert cell.against_stream == pytest.approx(1.8)


def test_a_round_that_the_machine_disturbed_is_compared_with_itself() -> None:
    cell = Cell(8, "Q4_1", 0, 4, {STREAM: Outcome(paces=[10.0, 2.0, 10.0]), CHOSEN: Outcome(paces=[10.0, 2.0, 2.0])})
    assert cell.against_stream == pytest.approx(1.0)


def test_what_was_measured_twice_tells_by_how_much_a_ratio_may_be_wrong() -> None:
    cell = Cell(1, "Q4_0", 20, 1, {STREAM: Outcome([10.0, 20.0], learning=10.0), CHOSEN: Outcome([9.0, 22.0], 7.0)})
    assert cell.again is None
    cell.outcomes[AGAIN] = Outcome(paces=[12.0, 26.0])
    assert cell.again == pytest.approx(1.25)
    assert cell.best == STREAM  # not the same again, however much quicker that was
    assert cell.stream_error == pytest.approx(0.1)
    assert cell.learning == pytest.approx(0.7)


def test_plans_without_the_two_that_are_compared_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--plans", "4", "auto"])
    assert "must name stream and auto" in capsys.readouterr().err


def test_ratios_are_averaged_geometrically() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)


def test_a_devices_pace_leaves_its_prompt_out_and_the_fleets_counts_it() -> None:
    quick = Written(100.0, [(101.0, 2), (102.0, 3), (103.5, 4)])
    slow = Written(100.5, [(104.0, 1), (106.0, 2)])
    texts = WrittenTexts((quick, slow), seconds=6.0)
    assert texts.tokens == 12
    assert texts.pace == pytest.approx((7 + 2) / (2.5 + 2.0))
    assert texts.tokens_per_s == pytest.approx(2.0)
    assert texts.first_token_s == pytest.approx((1.0 + 3.5) / 2)


def test_a_text_that_came_at_one_stroke_is_not_taken_for_a_quick_one() -> None:
    steady = Written(0.0, [(1.0, 1), (11.0, 100)])
    late = Written(0.0, [(9.0, 40), (9.0001, 8)])  # the line had held it up
    assert WrittenTexts((steady, late), seconds=11.0).pace == pytest.approx(10.8, abs=0.01)


def test_the_time_between_tokens_counts_each_token_of_a_piece() -> None:
    texts = WrittenTexts((Written(0.0, [(1.0, 1), (2.0, 4), (2.5, 1)]),), seconds=2.5)
    # Gaps of 1 s, three of nothing within the piece, and half a second.
    assert texts.gap_s(1.0) == pytest.approx(1.0)
    assert texts.gap_s(0.5) == pytest.approx(0.0)
