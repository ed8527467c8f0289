import numpy as np
import pandas as pd
import pytest

from profiling.ledger import Cluster, build_ledger
from profiling.schema import ENGINE, ROLLOUTS
from profiling.summary import summarise
from tests.profiling.test_energy_alarms_watch import samples_of

PHASE_COLUMNS = ["name", "step", "t_start", "t_end", "depth"]


def phases_of(*rows):
    return pd.DataFrame(rows, columns=PHASE_COLUMNS)


def span(step, engine, kind, start, end, **values):
    row = dict.fromkeys(ENGINE.names, 0) | {
        "step": step,
        "engine": engine,
        "kind": kind,
        "t_start": start,
        "t_end": end,
    }
    return row | {"steps": 1, "batch": 1} | values


def spans_of(*rows):
    return pd.DataFrame(list(rows), columns=ENGINE.names)


def rollouts_of(*rows):
    return pd.DataFrame(
        [dict.fromkeys(ROLLOUTS.names, 0) | {"reward": None} | row for row in rows], columns=ROLLOUTS.names
    )


NO_ROWS = rollouts_of()
ONE = Cluster(engines=1, gpus_per_engine=1)


def test_the_summary_of_a_small_truncated_run():
    # Step 1: rows 0 (6 tokens, done) and 1 (4 of 10, carried). Step 2: row 1 (6 more, done) and row 2 (4, carried).
    # Prompt 5. Rollouts 0-4 and 6-9, updates 4-6 and 9-10; an evaluation 10-12. The last token of a
    # truncated row does not train.
    phases = phases_of(
        ("rollout", 1, 0, 4, 0), ("update_policy", 1, 4, 6, 0),
        ("rollout", 2, 6, 9, 0), ("update_policy", 2, 9, 10, 0), ("evaluation", 2, 10, 12, 0),
    )  # fmt: skip
    engine = spans_of(span(1, 0, "decode", 0, 4, batch=2, slots=2), span(2, 0, "decode", 6, 8, batch=1, slots=2))
    rows = rollouts_of(
        {"step": 1, "row": 0, "prompt_tokens": 5, "context_before": 5, "tokens": 6, "trained_tokens": 6,
         "finished": True, "t_end": 4.0},
        {"step": 1, "row": 1, "prompt_tokens": 5, "context_before": 5, "tokens": 4, "trained_tokens": 3,
         "finished": False, "t_end": 3.0},
        {"step": 2, "row": 1, "policy_version": 1, "prompt_tokens": 5, "context_before": 9, "tokens": 6,
         "trained_tokens": 6, "finished": True, "t_end": 8.0},
        {"step": 2, "row": 2, "policy_version": 1, "prompt_tokens": 5, "context_before": 5, "tokens": 4,
         "trained_tokens": 3, "finished": False, "t_end": 7.5},
    )  # fmt: skip
    ledger = build_ledger(cluster=ONE, phases=phases, engine=engine, rollouts=rows, wall_s=12)
    got = summarise(cluster=ONE, phases=phases, engine=engine, rollouts=rows, ledger=ledger, wall_s=12,
                    startup_steps=1)  # fmt: skip
    assert got["wall_seconds"] == got["gpu_seconds"] == 12
    assert got["rollout_seconds"] == 7
    assert got["tail_seconds"] == 0  # ceil(0.9 x 2) = 2: the last of two
    assert (got["rows_in"], got["rows_finished"], got["rows_carried"]) == (3, 2, 1)
    assert got["generated_tokens"] == 20
    assert got["processed_tokens"] == 5 + 6 + 5 + 4 + 9 + 6 + 5 + 4
    assert got["trained_tokens"] == 6 + 3 + 6 + 3
    assert got["engine_idle_fraction"] == pytest.approx(1 / 7)
    assert got["mean_running_rows"] == pytest.approx((2 * 4 + 1 * 2) / 7)
    assert (got["staleness_mean"], got["staleness_max"]) == (0, 0)
    assert got["length_bias"] is None  # row 2 is still growing: what was drawn is not known
    assert got["startup_steps"] == 1
    assert got["seconds_per_step"] == 4  # step 2 without its evaluation
    assert got["seconds_per_finished_row"] == 4
    assert got["seconds_per_trained_token"] == pytest.approx(4 / 9)


def test_staleness_counts_updates_between_sampling_and_training_token_by_token():
    # Row 0: 4 tokens under version 0 in step 1, 2 more under version 2 in step 3, where all six train: four are
    # 2 versions behind, two are not. Row 1: 6 tokens of version 1 train in step 3: 1 behind. (8 + 6) / 12.
    rows = rollouts_of(
        {"step": 1, "row": 0, "tokens": 4, "policy_version": 0, "finished": False},
        {"step": 3, "row": 0, "tokens": 2, "policy_version": 2, "trained_tokens": 6, "finished": True},
        {"step": 3, "row": 1, "tokens": 6, "policy_version": 1, "trained_tokens": 6, "finished": True},
    )
    phases = phases_of(("rollout", 1, 0, 4, 0))
    engine = spans_of(span(1, 0, "decode", 0, 4))
    ledger = build_ledger(cluster=ONE, phases=phases, engine=engine, rollouts=rows, wall_s=4)
    got = summarise(cluster=ONE, phases=phases, engine=engine, rollouts=rows, ledger=ledger, wall_s=4, startup_steps=0)
    assert got["staleness_mean"] == pytest.approx(14 / 12)
    assert got["staleness_max"] == 2


def test_what_a_run_without_records_cannot_know_is_null_not_zero():
    phases = phases_of(("rollout", 1, 0, 3, 0))
    ledger = build_ledger(cluster=ONE, phases=phases, engine=spans_of(), rollouts=NO_ROWS, wall_s=3)
    got = summarise(cluster=ONE, phases=phases, engine=spans_of(), rollouts=NO_ROWS, ledger=ledger, wall_s=3,
                    startup_steps=0)  # fmt: skip
    for name in ("rows_in", "generated_tokens", "engine_idle_fraction", "seconds_per_finished_row", "length_bias"):
        assert got[name] is None
    assert (got["steps"], got["seconds_per_step"], got["joules_per_step"]) == (1, 3.0, None)
    assert [got["ledger"][cause] for cause in ("wait_tail", "wait_rollout", "wait_train")] == [None] * 3
    assert got["ledger"]["unresolved"] == 3


def plain_summary(phases, wall_s, cluster=ONE, devices=None):
    """Of a program without records."""
    frames = {"phases": phases, "engine": spans_of(), "rollouts": NO_ROWS}
    ledger = build_ledger(cluster=cluster, wall_s=wall_s, **frames)
    return summarise(cluster=cluster, ledger=ledger, wall_s=wall_s, startup_steps=0, devices=devices, **frames)


def test_steps_are_counted_by_a_programs_own_phases():
    # Steps of 3 s under a name that the ledger does not know, an evaluation of 2 s after the second; 4 s of nothing.
    phases = phases_of(
        ("step", 1, 0, 3, 1), ("step", 2, 3, 6, 1), ("evaluation", 2, 6, 8, 1), ("step", 3, 8, 11, 1),
        ("command", 1, 0, 15, 0),
    )  # fmt: skip
    devices = samples_of(np.arange(0.05, 15.1, 0.5), 100 * np.arange(0.0, 15.05, 0.5))
    got = plain_summary(phases, 15, devices=devices)
    assert (got["steps"], got["seconds_per_step"]) == (3, 3.0)
    assert got["joules_per_step"] == pytest.approx(300)
    assert got["ledger"]["wait_other"] == 13


def test_a_step_ends_with_its_last_phase_whatever_its_name():
    # A step: 0.5 s of rollout, 0.5 s of update, 0.25 s of its own: 1.25 s, also the last one.
    phases = []
    for step in (1, 2, 3):
        start = 1.25 * (step - 1)
        for name, begin, end in (("rollout", 0.0, 0.5), ("update_policy", 0.5, 1.0), ("own", 1.0, 1.25)):
            phases.append((name, step, start + begin, start + end, 1))
    got = plain_summary(phases_of(*phases, ("command", 1, 0, 9, 0)), 9)
    assert got["seconds_per_step"] == 1.25


def test_a_programs_own_phase_within_an_evaluation_is_no_training():
    phases = phases_of(("step", 1, 0, 3, 1), ("evaluation", 1, 3, 6, 1), ("mine", 1, 4, 5, 2), ("step", 2, 6, 9, 1))
    assert plain_summary(phases, 9)["seconds_per_step"] == 3.0


def test_a_command_that_marks_nothing_has_no_steps():
    got = plain_summary(phases_of(("command", 1, 0, 9, 0)), 9)
    assert (got["steps"], got["seconds_per_step"]) == (None, None)
