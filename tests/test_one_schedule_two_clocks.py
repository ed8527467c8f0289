"""The promise: a schedule that drove a real run makes the same run again on a virtual clock. Given the rows' lengths,
which rows run in which step, for how many tokens, and which of them finish is equal, not merely close."""

import pandas as pd
import pytest

from profiling.reader import Run
from simulator import load_experiment, simulate
from tppo.start import train

COLUMNS = ["step", "row", "context_before", "tokens", "trained_tokens", "finished", "policy_version"]


@pytest.mark.parametrize(
    ("algorithm", "rollout", "schedule", "slots"),
    [
        ("tppo", {"window": 10}, {"kind": "truncated", "window": 10, "trailing_tokens": 2}, None),
        ("ppo", {}, {"kind": "synchronous"}, None),
        ("ppo", {"max_rows_per_engine": 3}, {"kind": "synchronous"}, 3),
        ("ppo", {"schedule": "oversample"}, {"kind": "oversample", "factor": 1.5}, None),
        ("vapo", {"schedule": "oversample", "oversample_factor": 2.0, "max_rows_per_engine": 5},
         {"kind": "oversample", "factor": 2.0}, 5),
        ("ppo", {"schedule": "asynchronous"}, {"kind": "asynchronous"}, None),
    ],
)  # fmt: skip
def test_the_simulator_runs_the_rows_that_the_trainer_ran(make_config, algorithm, rollout, schedule, slots):
    config = make_config("run", algorithm={"name": algorithm}, rollout=rollout, train={"steps": 8},
                         value={"pretrain_rows": 0}, evaluation={"every": 0})  # fmt: skip
    train(config, show_progress=False)
    measured = Run(config.output)
    cluster = {"trainer": "none"} if slots is None else {"trainer": "none", "max_rows_per_engine": slots}
    simulated = simulate(
        load_experiment(
            {
                "workload": {
                    "steps": 8, "prompts_per_step": 8, "max_response_tokens": config.rollout.max_response_tokens,
                    "response_tokens": {"kind": "run", "path": str(measured.path)},
                },
                "schedule": schedule, "cluster": cluster,
                # Training takes time, so that a rollout that runs ahead meets the weights that it met.
                "cost": {"decode_base_s": 1.0, "prefill_base_s": 0.5, "reward_base_s": 0.25},
            }
        )
    )  # fmt: skip
    got, expected = (
        frame[COLUMNS].sort_values(["step", "row"], ignore_index=True).astype("int64")
        for frame in (simulated.rollouts, measured.rollouts)
    )
    pd.testing.assert_frame_equal(got, expected)
    summary = simulated.summary()
    for name in ("generated_tokens", "trained_tokens", "processed_tokens", "rows_in", "rows_finished", "rows_carried"):
        assert summary[name] == measured.summary[name], name
    for name in ("staleness_mean", "staleness_max"):
        assert summary[name] == pytest.approx(measured.summary[name]), name
