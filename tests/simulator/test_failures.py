import numpy as np
import pytest

from profiling.errors import ConfigError
from profiling.ledger import TOLERANCE
from profiling.reader import Run
from simulator import load_experiment, simulate


def experiment(steps=40, schedule=None, cluster=None, **cost):
    """Steps of 9 s of rollout and 1 s of update; a checkpoint of 2 s where one is due."""
    return load_experiment(
        {
            "workload": {"steps": steps, "prompts_per_step": 2, "max_response_tokens": 9, "seed": 3,
                         "response_tokens": {"kind": "fixed", "value": 9}},
            "schedule": schedule or {"kind": "synchronous"},
            "cluster": {"engines": 2, **(cluster or {})},
            "cost": {"decode_base_s": 1.0, "policy_update_base_s": 1.0, "checkpoint_s": 2.0, **cost},
        }
    )  # fmt: skip


FAILING = {"mtbf_hours": 60 / 3600, "restart_s": 5.0}


def test_a_run_with_failures_is_the_one_without_and_what_was_lost():
    plain = simulate(experiment(checkpoint_every=4))
    failing = simulate(experiment(checkpoint_every=4, **FAILING))
    lost = sum(outage.seconds for outage in failing.run.outages)
    summary, without = failing.summary(), plain.summary()
    assert summary["failures"] == sum(outage.failures for outage in failing.run.outages) > 4
    assert failing.run.wall_s == pytest.approx(plain.run.wall_s + lost)
    assert summary["ledger"].pop("down") == pytest.approx(2 * lost)
    assert without["ledger"].pop("down") == 0
    assert summary["ledger"] == pytest.approx(without["ledger"])
    assert summary["ledger"]["wait_other"] == 0, "rounding lies between phases"
    assert abs(2 * lost + sum(summary["ledger"].values()) - summary["gpu_seconds"]) <= TOLERANCE * failing.run.wall_s
    for name in ("seconds_per_step", "rollout_seconds", "tail_seconds", "generated_tokens"):
        assert summary[name] == pytest.approx(without[name]), name


def test_a_failure_costs_what_was_done_since_the_checkpoint():
    """Nothing overlaps, an outage begins where a checkpoint ended, and is over before the step that it delays."""
    failing = simulate(experiment(checkpoint_every=4, **FAILING))
    phases = failing.phases
    assert (phases.t_start.to_numpy()[1:] == phases.t_end.to_numpy()[:-1]).all()
    ends = phases[phases.name == "checkpoint"].t_end.to_numpy()
    for outage in phases[phases.name == "down"].itertuples():
        assert outage.t_start == 0 or np.abs(ends - outage.t_start).min() < 1e-9
        assert (outage.step - 1) % 4 == 0
        rows = failing.rollouts[failing.rollouts.step == outage.step]
        assert rows.t_start.min() == pytest.approx(outage.t_end)
        assert rows.t_end.max() == pytest.approx(outage.t_end + 9)
    for drawn in failing.run.outages:
        assert drawn.failures * 5 < drawn.seconds < drawn.failures * (5 + 42)  # four steps and a checkpoint at most


def test_failures_are_as_frequent_as_asked_for():
    # A stretch of d seconds fails exp(d / m) - 1 times on average before it succeeds: d = 12, m = 60: 0.2214.
    failing = simulate(experiment(steps=4000, checkpoint_every=1, **FAILING))
    failures = failing.summary()["failures"]
    expected = 4000 * (np.exp(12 / 60) - 1)
    assert failures == pytest.approx(expected, abs=4 * np.sqrt(expected * np.exp(12 / 60)))
    # Lost: (m - d / (exp(d / m) - 1)) a failure on average, beside the restart.
    per_failure = sum(outage.seconds for outage in failing.run.outages) / failures - 5
    assert per_failure == pytest.approx(60 - 12 / (np.exp(0.2) - 1), rel=0.1)


@pytest.mark.parametrize(
    "schedule",
    [{"kind": "truncated", "window": 4}, {"kind": "asynchronous"}, {"kind": "asynchronous", "in_flight_update": True}],
)
def test_every_schedule_can_fail(schedule, tmp_path):
    own = {"trainer": "separate", "trainer_gpus": 1}
    result = simulate(experiment(12, schedule, own, checkpoint_every=3, **FAILING))
    result.write(tmp_path / "run")
    summary = Run(tmp_path / "run").summary
    assert summary["failures"] > 0
    assert sum(summary["ledger"].values()) == pytest.approx(summary["gpu_seconds"], rel=1e-9)
    again = simulate(experiment(12, schedule, own, checkpoint_every=3, **FAILING))
    assert again.rollouts.equals(result.rollouts)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({"mtbf_hours": 0}, "cost.mtbf_hours = 0"),
        ({"restart_s": 5.0}, "cost.restart_s needs cost.mtbf_hours"),
        ({"mtbf_hours": 1 / 3600}, "take 0.111 h without a checkpoint, which fails more than 10000 times on average"),
    ],
)
def test_failures_that_cannot_be_are_one_line(cost, message):
    with pytest.raises(ConfigError) as error:
        simulate(experiment(**cost))
    assert message in str(error.value)


def test_a_checkpoint_that_takes_no_time_is_one_all_the_same():
    often, never = (
        simulate(experiment(checkpoint_s=0.0, checkpoint_every=every, **FAILING)).run.wall_s for every in (1, 0)
    )
    assert often < 0.2 * never
