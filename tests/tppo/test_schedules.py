import numpy as np
import pytest

from tppo.schedule import (
    Admission,
    Asynchronous,
    CarriedRow,
    Decision,
    Demand,
    Oversample,
    RowEnd,
    StepState,
    Synchronous,
    TailBatching,
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
    for schedule in (
        Synchronous(),
        Truncated(window=7),
        Oversample(factor=1.25),
        Asynchronous(max_staleness=2),
        TailBatching(9),
    ):
        assert from_description(describe(schedule)) == schedule
    with pytest.raises(
        ValueError, match="'fifo' is not one of synchronous, truncated, oversample, asynchronous, tail_batching"
    ):
        from_description({"kind": "fifo"})


def test_oversampling_starts_more_rows_and_wants_as_many_as_ever():
    # f = 1.5, N = 4: six rows, the carried one among them, each to the maximum of 10.
    plan = Oversample(1.5).plan_step([CarriedRow(3, 4)], Demand(2, 4, 9, 10))
    assert [a.row for a in plan.admissions] == [3, 9, 10, 11, 12, 13]
    assert [a.budget_tokens for a in plan.admissions] == [6, 10, 10, 10, 10, 10]
    assert plan.rows_wanted == 4
    assert Oversample(1.1).rows_started(10) == 11
    assert Oversample(1.01).rows_started(10) == 11  # rounded up


def play(schedule, plan, reasons):
    """Decisions after each row's end, by row: reasons is a list of (row, reason)."""
    state, made = StepState.of(plan), []
    for row, reason in reasons:
        decisions = schedule.on_row_end(state, RowEnd(row, 1, 1, reason))
        made.append([decision.action for decision in decisions])
        state = state.after(decisions)
    return made, state


def test_oversampling_ends_the_step_with_the_last_row_wanted_and_carries_the_rest():
    schedule = Oversample(2.0)
    plan = schedule.plan_step([], Demand(1, 2, 0, 10))
    reasons = [(0, "stop"), (1, "failed"), (2, "length"), (3, "aborted")]
    made, state = play(schedule, plan, reasons)
    assert made == [["finish"], ["carry"], ["finish", "end_step", "update_weights"], ["carry"]]
    assert (state.running, state.finished, state.ended) == (0, 2, True)


def test_a_row_that_stops_in_the_instant_in_which_the_step_ends_still_finishes():
    schedule = Oversample(2.0)
    made, _ = play(schedule, schedule.plan_step([], Demand(1, 1, 0, 10)), [(0, "stop"), (1, "stop")])
    assert made == [["finish", "end_step", "update_weights"], ["finish"]]


def test_a_step_whose_rows_all_fail_ends():
    for schedule in (Synchronous(), Truncated(window=4), Oversample(1.5), Asynchronous(), TailBatching(3)):
        plan = schedule.plan_step([], Demand(1, 2, 0, 10))
        made, _ = play(schedule, plan, [(a.row, "failed") for a in plan.admissions])
        assert made[-1] == ["carry", "end_step", "update_weights"]
        assert all(actions == ["carry"] for actions in made[:-1])


def test_rows_in_flight_are_bounded_and_a_step_wants_what_is_not_there_yet():
    # N = 4, eta = 2. Step 1: (1 + 2) x 4 rows may have been started. Step 3: 20 of them, 14 were; 3 still run, so 11
    # have finished, of which 8 have trained: 12 - 11 = 1 more makes the step's.
    schedule = Asynchronous(max_staleness=2, in_flight_update=True)
    first = schedule.plan_step([], Demand(1, 4, 0, 10))
    assert (len(first.admissions), first.rows_wanted) == (12, 4)
    third = schedule.plan_step([CarriedRow(row, 5) for row in (4, 9, 13)], Demand(3, 4, 14, 10))
    assert [admission.row for admission in third.admissions] == [4, 9, 13, *range(14, 20)]
    assert third.rows_wanted == 1
    # Enough have finished already: the step has its rows at once, and nothing ends it a second time.
    full = schedule.plan_step([CarriedRow(9, 5)], Demand(3, 4, 14, 10))
    assert full.rows_wanted == 0
    state = StepState.of(full)
    assert state.ended
    assert schedule.on_row_end(state, RowEnd(9, 2, 7, "stop")) == (Decision("finish", 9),)
    assert (schedule.in_flight, schedule.steps_ahead, schedule.simulated_only) == (True, 0, True)
    assert not Asynchronous().in_flight


def test_only_the_asynchronous_schedule_runs_ahead():
    schedules = (Synchronous(), Truncated(4), Oversample(2.0), Asynchronous(1), Asynchronous(3))
    assert [s.steps_ahead for s in schedules] == [0, 0, 0, 1, 3]
    assert [s.simulated_only for s in schedules] == [False, False, False, False, True]


@pytest.mark.parametrize("factor", [0.9, 0, -1, float("inf"), float("nan")])
def test_a_factor_below_one_is_refused(factor):
    with pytest.raises(ValueError, match="at least 1"):
        Oversample(factor)


def test_a_staleness_of_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1; 0 is synchronous"):
        Asynchronous(0)


@pytest.mark.parametrize("factor", [1.25, 2.0])
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_after_the_start_up_steps_oversampling_trains_on_lengths_as_they_are_drawn(factor, sigma):
    """All rows that run get a token an iteration; lognormal lengths, 400 rows a step."""
    schedule, rng = Oversample(factor), np.random.default_rng(0)
    wanted, longest = 400, 100_000
    lengths, carried, next_row, trained = {}, [], 0, []
    for step in range(1, 41):
        plan = schedule.plan_step(
            [CarriedRow(row, done) for row, done in carried], Demand(step, wanted, next_row, longest)
        )
        for admission in plan.admissions:
            if admission.row >= next_row:
                lengths[admission.row] = int(rng.lognormal(5, sigma)) + 1
        next_row = max(next_row, 1 + max(a.row for a in plan.admissions))
        left = np.array([lengths[a.row] - a.response_tokens for a in plan.admissions])
        end = np.sort(left)[wanted - 1]
        trained.append([lengths[a.row] for a, n in zip(plan.admissions, left, strict=True) if n <= end])
        carried = [(a.row, a.response_tokens + end) for a, n in zip(plan.admissions, left, strict=True) if n > end]
    drawn = np.exp(5 + sigma**2 / 2)
    before = np.mean(trained[0]) / drawn
    late = np.mean(np.concatenate(trained[schedule.startup_steps(longest) :])) / drawn
    assert before < 0.9
    assert late == pytest.approx(1, abs=0.05)
