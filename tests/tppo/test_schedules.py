import pytest

from tppo.schedule import (
    Admission,
    CarriedRow,
    Decision,
    Demand,
    RowEnd,
    StepState,
    Synchronous,
    Truncated,
    describe,
    from_description,
)


def test_synchronous_runs_every_row_to_the_maximum():
    plan = Synchronous().plan_step([], Demand(step=1, rows=2, next_row=5, max_response_tokens=10))
    assert plan.admissions == (Admission(5, 0, 10), Admission(6, 0, 10))


def test_truncated_runs_carried_rows_first_and_fills_with_fresh_ones():
    # L = 10, l = 4. Row 7 has 8 tokens: 2 are left. Row 3 has 4: a whole window. Fresh rows from 9.
    plan = Truncated(window=4).plan_step([CarriedRow(7, 8), CarriedRow(3, 4)], Demand(2, 3, 9, 10))
    assert plan.admissions == (Admission(3, 4, 4), Admission(7, 8, 2), Admission(9, 0, 4))


def test_no_carried_row_is_dropped_when_there_are_more_than_the_step_asks_for():
    carried = [CarriedRow(row, 1) for row in range(5)]
    plan = Truncated(window=4).plan_step(carried, Demand(2, 3, 9, 10))
    assert [admission.row for admission in plan.admissions] == [0, 1, 2, 3, 4]


def test_a_row_that_stopped_by_itself_or_by_length_finishes_and_one_out_of_budget_carries():
    schedule, state = Truncated(window=4), StepState(step=1, running=3, rows_wanted=3)
    assert schedule.on_row_end(state, RowEnd(1, 4, 4, "stop")) == (Decision("finish", 1),)
    assert schedule.on_row_end(state, RowEnd(1, 2, 10, "length")) == (Decision("finish", 1),)
    assert schedule.on_row_end(state, RowEnd(1, 4, 4, "budget")) == (Decision("carry", 1),)


def test_the_last_row_ends_the_step_and_updates_the_weights():
    decisions = Synchronous().on_row_end(StepState(step=1, running=1, rows_wanted=1), RowEnd(1, 4, 4, "stop"))
    assert [decision.action for decision in decisions] == ["finish", "end_step", "update_weights"]
    assert StepState(step=1, running=1, rows_wanted=1).after(decisions).running == 0


def test_a_window_at_or_above_the_maximum_is_synchronous():
    demand = Demand(3, 64, 100, 10)
    for window in (10, 11, 1000):
        assert Truncated(window).plan_step([], demand) == Synchronous().plan_step([], demand)
        assert Truncated(window).startup_steps(10) == 0


def test_startup_steps_are_twice_the_most_visits():
    assert Truncated(window=4).startup_steps(10) == 6  # 2 ceil(10 / 4)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_below_one_is_refused(window):
    with pytest.raises(ValueError, match="at least 1 new token"):
        Truncated(window)


def test_a_description_makes_the_same_schedule():
    for schedule in (Synchronous(), Truncated(window=7)):
        assert from_description(describe(schedule)) == schedule
    with pytest.raises(ValueError, match="'fifo' is not one of synchronous, truncated"):
        from_description({"kind": "fifo"})
