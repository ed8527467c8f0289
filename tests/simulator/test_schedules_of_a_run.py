"""Whole runs under the schedules that run ahead or leave rows for later, against arithmetic done by hand."""

import pytest

from profiling.reader import Run
from simulator import load_experiment, simulate
from tppo.schedule import from_description
from tppo.schedule.log import decide_again

LENGTHS = [3, 9, 4, 6, 5, 8, 2, 7]


def experiment(tmp_path, schedule, *, steps=4, lengths=LENGTHS, rows=2, engines=1, trainer=None, **cost):
    """Rows of prompt 0, one token a second whatever the batch; lengths in the order given."""
    table = tmp_path / "lengths.csv"
    table.write_text("n\n" + "\n".join(map(str, lengths)))
    cluster = {"engines": engines, **(trainer or {"trainer": "separate", "trainer_gpus": 2})}
    return load_experiment(
        {
            "workload": {
                "steps": steps, "prompts_per_step": rows, "max_response_tokens": 1000,
                "response_tokens": {"kind": "empirical", "file": str(table), "column": "n"},
            },
            "schedule": schedule, "cluster": cluster, "cost": {"decode_base_s": 1.0, **cost},
        }
    )  # fmt: skip


def records(result):
    return [record for log in result.run.log.steps.values() for record in log.records()]


def phases(result, name):
    return [(step, start, end) for kind, step, start, end in result.run.log.phases if kind == name]


def checked(result, tmp_path):
    """The run directory reads back, its decisions can be made again, its ledger sums to GPUs x wall time."""
    result.write(tmp_path / "run")
    run = Run(tmp_path / "run")
    assert all(fresh == logged for logged, fresh in decide_again(from_description(run.header["schedule"]), run.trace))
    summary = result.summary()
    assert sum(summary["ledger"].values()) == pytest.approx(summary["gpu_seconds"], rel=1e-9)
    assert summary["rows_in"] == summary["rows_finished"] + summary["rows_carried"]
    return summary


def test_one_step_off_overlaps_rollout_with_training(tmp_path):
    # Rollouts of 9, 6, 8, 7 s (the longer of two rows); training 5 s a step; sync 1 s.
    # 0-9 rollout 1. 9: nothing newer to take; training 1 from 9 to 14 beside rollout 2 from 9 to 15.
    # 15-16 sync to version 1; training 2 16-21, rollout 3 16-24. 24-25 sync; training 3 25-30, rollout 4 25-32.
    # 32-33 sync; training 4 33-38.
    result = simulate(experiment(tmp_path, {"kind": "asynchronous"}, policy_update_base_s=5.0, weight_sync_s=1.0))
    assert [(s, e) for _, s, e in phases(result, "rollout")] == [(0, 9), (9, 15), (16, 24), (25, 32)]
    assert [(s, e) for _, s, e in phases(result, "update_policy")] == [(9, 14), (16, 21), (25, 30), (33, 38)]
    assert [(s, e) for _, s, e in phases(result, "weight_sync")] == [(15, 16), (24, 25), (32, 33)]
    summary = checked(result, tmp_path)
    assert summary["wall_seconds"] == 38
    assert [record.policy_version for record in records(result)] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert (summary["staleness_max"], summary["generation_busy_seconds"]) == (1, 30)
    assert summary["staleness_mean"] == pytest.approx((10 + 13 + 9) / 44)  # step 1's 12 tokens are fresh
    assert summary["rollout_seconds"] == 9 + 1 + 3 + 2  # what training does not hide
    ledger = summary["ledger"]  # one engine GPU, two of the trainer
    assert ledger["weight_sync"] == 3 * 3
    assert ledger["update_policy"] == 2 * 20
    assert ledger["wait_train"] == 5  # the engine, while step 4 trains
    assert ledger["wait_rollout"] == 2 * (9 + 1 + 3 + 2)
    assert ledger["decode_useful"] + ledger["decode_underfilled"] == 30


def test_more_staleness_hides_training_that_varies_with_the_rollouts(tmp_path):
    # Training 12 s a step against rollouts of 9, 6, 8, 7 s. With two steps ahead, rollout k + 2 waits for training
    # k - 1 only: rollouts 0-9, 9-15, 15-23, then rollout 4 for training 1 (9-21): at 23. Training 21-33, 33-45, 45-57.
    result = simulate(experiment(tmp_path, {"kind": "asynchronous", "max_staleness": 2}, policy_update_base_s=12.0))
    assert [(s, e) for _, s, e in phases(result, "rollout")] == [(0, 9), (9, 15), (15, 23), (23, 30)]
    assert [(s, e) for _, s, e in phases(result, "update_policy")] == [(9, 21), (21, 33), (33, 45), (45, 57)]
    assert [record.policy_version for record in records(result)] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert checked(result, tmp_path)["staleness_max"] == 2
    assert Run(tmp_path / "run").kind == "simulated only"  # our trainer runs one step ahead


@pytest.mark.parametrize("eta", [1, 2, 3])
def test_staleness_never_exceeds_its_bound(tmp_path, eta):
    result = simulate(
        experiment(tmp_path, {"kind": "asynchronous", "max_staleness": eta}, steps=9, policy_update_base_s=20.0)
    )
    assert checked(result, tmp_path)["staleness_max"] == eta
    assert [step for step, _, _ in phases(result, "update_policy")] == list(range(1, 10))


IN_FLIGHT = {"kind": "asynchronous", "in_flight_update": True}


def test_rows_in_flight_take_new_weights_in_the_middle(tmp_path):
    # Two rows a step, four may be under way; training 2 s, sync 1 s. Rows of 3, 9, 4, 6, 5, 8, 2, 7, 3, 9.
    # 0: rows 0-3. Rows 0 and 2 end at 3 and 4: training 1 from 4 to 6, where row 3 ends too and row 1 has 6 of 9.
    # 6-7 sync. 7: rows 1, 4, 5; row 3 waits for its step, so row 1 at 10 is the last that it needs: training 10-12,
    # where row 4 ends. 12-13 sync. 13: rows 5 (5 of 8), 6, 7; row 6 at 15: training of 4 and 6, 15-17; row 5 ends at
    # 16. 17-18 sync. 18: rows 7 (4 of 7), 8, 9; rows 7 and 8 at 21: training of 5 and 7, 21-23. 23-24 sync.
    result = simulate(experiment(tmp_path, IN_FLIGHT, policy_update_base_s=2.0, weight_sync_s=1.0))
    assert [(s, e) for _, s, e in phases(result, "rollout")] == [(0, 6), (7, 12), (13, 17), (18, 23)]
    assert [(s, e) for _, s, e in phases(result, "update_policy")] == [(4, 6), (10, 12), (15, 17), (21, 23)]
    assert result.run.trained_at == {0: 1, 2: 1, 3: 2, 1: 2, 4: 3, 6: 3, 5: 4, 7: 4}
    ran = {(r.row, r.policy_version): r.tokens for r in records(result)}
    assert [ran[1, 0], ran[1, 1], ran[5, 1], ran[5, 2], ran[7, 2], ran[7, 3], ran[9, 3]] == [6, 3, 5, 3, 4, 3, 5]
    summary = checked(result, tmp_path)
    # Step 2 trains 6 + 6 tokens of version 0; step 3, 5 of version 1; step 4, 5 of version 1 and 3 + 4 of version 2.
    assert summary["staleness_mean"] == pytest.approx((6 + 6 + 5 + 5 * 2 + 3 + 4) / 44)
    assert summary["staleness_max"] == 2  # row 5 outlives two updates: eta bounds the rows under way, not their age
    assert summary["processed_tokens"] == summary["trained_tokens"] == 44
    assert (summary["rows_in"], summary["rows_finished"], summary["rows_carried"]) == (10, 9, 1)
    assert (summary["ledger"]["update_policy"], summary["ledger"]["weight_sync"]) == (2 * 8, 3 * 4)
    assert Run(tmp_path / "run").kind == "simulated only"


def test_engines_in_flight_wait_for_a_trainer_that_is_slow(tmp_path):
    # Training 20 s. 0-9: rows 0-3; training 1 from 4 to 24. Rows 1 and 3 wait for their step: 24: training 2 until 44,
    # beside rows 4 and 5 until 32.
    result = simulate(experiment(tmp_path, IN_FLIGHT, steps=2, policy_update_base_s=20.0))
    assert [(s, e) for _, s, e in phases(result, "rollout")] == [(0, 9), (24, 32)]
    assert [(s, e) for _, s, e in phases(result, "update_policy")] == [(4, 24), (24, 44)]
    assert checked(result, tmp_path)["ledger"]["wait_train"] == 15 + 12


@pytest.mark.parametrize("eta", [1, 3])
def test_start_up_in_flight_is_over_when_mean_lengths_are_those_drawn(eta):
    values = {
        "workload": {"steps": 12 * eta, "prompts_per_step": 400, "max_response_tokens": 24576,
                     "response_tokens": {"kind": "lognormal", "mean": 8192.0, "sigma": 0.8}},
        "schedule": IN_FLIGHT | {"max_staleness": eta},
        "cluster": {"engines": 4, "trainer": "separate", "trainer_gpus": 4},
        "cost": {"decode_base_s": 0.008, "decode_per_row_s": 2e-5, "decode_per_context_token_s": 5e-8,
                 "policy_update_per_token_s": 2e-5},
    }  # fmt: skip
    result = simulate(load_experiment(values))
    rows = result.rollouts[result.rollouts.trained_tokens > 0]
    step = rows.row.map(result.run.trained_at)
    startup = result.summary()["startup_steps"]
    assert startup == 3 * eta
    assert rows.trained_tokens[step == 1].mean() < 0.6 * 7742
    assert rows.trained_tokens[step > startup].mean() == pytest.approx(7742, rel=0.03)


def test_rows_in_flight_stay_on_their_engine(tmp_path):
    for dispatch in ("round_robin", "shared_queue"):
        result = simulate(
            experiment(tmp_path, IN_FLIGHT, steps=8, rows=4, engines=3, policy_update_base_s=1.0,
                       trainer={"trainer": "separate", "trainer_gpus": 1, "dispatch": dispatch,
                                "max_rows_per_engine": 2})
        )  # fmt: skip
        engines = {}
        for record in records(result):
            if record.tokens:
                engines.setdefault(record.row, set()).add(record.engine)
        assert max(len(several) for several in engines.values()) == 1
        assert len({engine for several in engines.values() for engine in several}) == 3


def test_evaluations_and_checkpoints_stop_a_run_that_runs_ahead(tmp_path):
    """They take place between two rollouts, when the trainer is done with the step they belong to."""
    result = simulate(
        experiment(tmp_path, {"kind": "asynchronous"}, policy_update_base_s=5.0, evaluation_s=2.0, evaluation_every=2)
    )
    assert phases(result, "evaluation") == [(2, 23, 25)]  # rollout 3 ends at 23
    assert checked(result, tmp_path)["ledger"]["evaluation"] == 2 * 3


def test_oversampling_waits_for_no_tail_and_continues_what_is_left(tmp_path):
    # Two of four rows, one token a second. Step 1: lengths 3, 9, 4, 6: over at 4 with rows 0 and 2 (4 s).
    # Rows 1 and 3 have 4 tokens each. Step 2: rows 1 (5 left), 3 (2 left), 4 (5), 5 (8): row 3 after 2 s; rows 1 and 4
    # end together after 5 s, both finish. Step 3: row 5 has 5 of 8, fresh 6 (2), 7 (7), 0's length again (3).
    # Rows 6 after 2, 5 and 8 after 3: over after 3 s.
    schedule = {"kind": "oversample", "factor": 2.0}
    own = {"trainer": "colocated"}
    result = simulate(experiment(tmp_path, schedule, steps=3, trainer=own, policy_update_per_token_s=1.0))
    assert [round(end - start, 9) for _, start, end in phases(result, "rollout")] == [4, 5, 3]
    by_step = [[(r.row, r.tokens, r.finished) for r in result.run.log.steps[step].records()] for step in (1, 2, 3)]
    assert by_step[0] == [(0, 3, True), (2, 4, True), (1, 4, False), (3, 4, False)]
    assert by_step[1] == [(3, 2, True), (1, 5, True), (4, 5, True), (5, 5, False)]
    assert by_step[2] == [(6, 2, True), (5, 3, True), (8, 3, True), (7, 3, False)]
    # Only responses that finished are processed and trained, all their tokens: 3 + 4; 6 + 9 + 5; 2 + 8 + 3.
    assert [end - start for _, start, end in phases(result, "update_policy")] == [7, 20, 13]
    summary = checked(result, tmp_path)
    assert summary["processed_tokens"] == summary["trained_tokens"] == 40
    # One version behind: rows 3 and 1's first 4 tokens, trained in step 2; row 5's first 5, in step 3.
    assert summary["staleness_mean"] == pytest.approx((4 + 4 + 5) / 40)
    assert summary["staleness_max"] == 1


def test_other_engines_end_the_iteration_at_hand_when_the_step_is_over(tmp_path):
    """Engine 0 decodes rows of 2 and 9 at 1.5 s a token (a row costs half a second), engine 1 one row at 1 s. The step
    wants one row; row 0 ends at 1.5 + 1.5 = 3 s... engine 1 is just at a boundary at 3 s and stops there."""
    schedule = {"kind": "oversample", "factor": 3.0}
    result = simulate(
        experiment(tmp_path, schedule, steps=1, rows=1, engines=2, lengths=[2, 9, 9], decode_per_row_s=0.25,
                   trainer={"trainer": "none"})
    )  # fmt: skip
    # Round robin: rows 0 and 2 on engine 0 (1.5 s a step), row 1 on engine 1 (1.25 s). Over at 3; engine 1 stands at
    # 2.5 and ends its third step at 3.75.
    ends = {r.row: (r.engine, r.tokens, r.t_end) for r in records(result)}
    assert ends == {0: (0, 2, 3.0), 2: (0, 2, 3.0), 1: (1, 3, 3.75)}
    assert checked(result, tmp_path)["wall_seconds"] == 3.75


def test_oversampling_by_nothing_is_synchronous(tmp_path):
    own = {"trainer": {"trainer": "colocated"}, "policy_update_base_s": 1.0}
    plain = simulate(experiment(tmp_path, {"kind": "synchronous"}, **own)).summary()
    over = simulate(experiment(tmp_path, {"kind": "oversample", "factor": 1.0}, **own)).summary()
    for summary in (plain, over):
        summary.pop("simulator_seconds")
    assert over == plain


def test_one_step_off_is_never_slower_than_in_turns_on_the_same_gpus(tmp_path):
    for update_s in (0.5, 6.0, 20.0):
        seconds = [
            simulate(experiment(tmp_path, {"kind": kind}, steps=8, policy_update_base_s=update_s)).run.wall_s
            for kind in ("synchronous", "asynchronous")
        ]
        assert seconds[1] <= seconds[0]


def test_tail_batching_defers_long_rows_to_rounds_of_their_own(tmp_path):
    # Two rows a step, threshold 5: lengths 3, 9, 4, 6, 5, 8, 2, 7. Short rounds: row 0 ends, row 1 is deferred at 5;
    # row 2 ends, row 3 is deferred. Then a long round of rows 1 and 3: 4 and 1 tokens left. Then rows 4 and 5: row 4
    # ends at the threshold, row 5 is deferred; rows 6 and 7: 6 ends, 7 is deferred; a long round of 5 (3) and 7 (2).
    own = {"trainer": "colocated"}
    result = simulate(experiment(tmp_path, {"kind": "tail_batching", "threshold": 5}, steps=6, trainer=own))
    by_step = [[(r.row, r.tokens, r.finished) for r in result.run.log.steps[step].records()] for step in range(1, 7)]
    assert by_step == [
        [(0, 3, True), (1, 5, False)], [(2, 4, True), (3, 5, False)], [(3, 1, True), (1, 4, True)],
        [(4, 5, True), (5, 5, False)], [(6, 2, True), (7, 5, False)], [(7, 2, True), (5, 3, True)],
    ]  # fmt: skip
    summary = checked(result, tmp_path)
    assert [end - start for _, start, end in phases(result, "rollout")] == [5, 5, 4, 5, 5, 3]
    assert summary["length_bias"] == 1.0
    # Row 1's first 5 tokens are two versions behind when step 3 trains them, row 3's one; the same for 5 and 7.
    assert summary["staleness_mean"] == pytest.approx((5 * 2 + 5 * 1) * 2 / 44)
    assert Run(tmp_path / "run").kind == "simulated only"


def test_a_threshold_at_the_maximum_is_synchronous(tmp_path):
    own = {"trainer": {"trainer": "colocated"}, "policy_update_base_s": 1.0}
    plain = simulate(experiment(tmp_path, {"kind": "synchronous"}, **own)).summary()
    tail = simulate(experiment(tmp_path, {"kind": "tail_batching", "threshold": 1000}, **own)).summary()
    for summary in (plain, tail):
        summary.pop("simulator_seconds")
    assert tail == plain


def test_rewards_that_overlap_the_rollout_leave_only_what_is_late(tmp_path):
    # One step of rows of 3, 9, 4, 6 tokens, one a second; a reward takes 2 s, one worker: 3-5, 5-7 (row 2, done at 4),
    # 7-9 (row 3, done at 6), 9-11. The rollout ends at 9: 2 s are left, and the base of 0.5 s. In turns: 8.5 s.
    def reward_of(**cluster):
        trainer = {"trainer": "none", **cluster}
        result = simulate(
            experiment(tmp_path, {"kind": "synchronous"}, steps=1, rows=4, trainer=trainer, reward_per_row_s=2.0,
                       reward_base_s=0.5)
        )  # fmt: skip
        return [(start, end) for _, start, end in phases(result, "reward")]

    assert reward_of() == [(9, 17.5)]
    assert reward_of(overlap_reward=True) == [(9, 11.5)]


def test_two_workers_grade_two_rows_at_a_time(tmp_path):
    # Rewards of 4 s for rows done at 3, 4, 6, 9 by two workers: 3-7, 4-8, 7-11 (waits for the first), 9-13.
    trainer = {"trainer": "none", "overlap_reward": True}
    result = simulate(
        experiment(tmp_path, {"kind": "synchronous"}, steps=1, rows=4, trainer=trainer, reward_per_row_s=4.0,
                   reward_workers=2)
    )  # fmt: skip
    assert [(start, end) for _, start, end in phases(result, "reward")] == [(9, 13)]
