import json

import numpy as np
import pandas as pd
import pytest

from profiling.errors import ConfigError, DataError
from profiling.phases import plain_header
from profiling.reader import Run
from profiling.schema import ENGINE
from profiling.writer import RunWriter
from simulator import load_experiment, simulate
from simulator.calibrate import Calibration, Observations, calibrate, constant_observations, fit, fit_prefill
from simulator.costs import resolve

COSTS = {
    "decode_base_s": 0.011, "decode_per_row_s": 2.3e-4, "decode_per_context_token_s": 1.7e-6,
    "prefill_base_s": 0.02, "prefill_per_token_s": 3e-5, "prefill_per_token_context_s": 4e-7,
    "value_forward_base_s": 0.1, "value_forward_per_token_s": 1e-4,
    "value_update_base_s": 0.2, "value_update_per_token_s": 2e-4,
    "policy_update_base_s": 0.3, "policy_update_per_token_s": 3e-4,
    "reward_base_s": 0.05, "reward_per_row_s": 0.01, "weight_sync_s": 0.5,
    "rollout_other_s": 0.007, "step_other_s": 0.013,
}  # fmt: skip


def experiment(costs, window=30, steps=12):
    return load_experiment(
        {
            "workload": {"steps": steps, "prompts_per_step": 24, "prompt_tokens": 9, "max_response_tokens": 100,
                         "response_tokens": {"kind": "lognormal", "mean": 30.0, "sigma": 0.9}},
            "schedule": {"kind": "truncated", "window": window},
            "cluster": {"max_rows_per_engine": 10},
            "cost": costs,
        }
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    simulate(experiment(COSTS)).write(tmp_path / "run")
    return Run(tmp_path / "run")


def test_costs_are_recovered_from_a_run_that_follows_them(run):
    calibration = calibrate([run])
    for name, value in COSTS.items():
        assert calibration.costs[name] == pytest.approx(value, rel=1e-6), name
    decode = calibration.fits["decode"]
    assert decode.r2 == pytest.approx(1)
    assert decode.total_fitted_s == pytest.approx(decode.total_measured_s)
    low, high = decode.interval["decode_base_s"]
    assert low == pytest.approx(0.011, rel=1e-6)
    assert high == pytest.approx(0.011, rel=1e-6)
    assert calibration.fits["logprob_forward"] is None
    assert calibration.runs == ("run",)
    assert calibration.probe_seconds is None


def test_a_calibrated_simulation_of_another_window_equals_one_with_the_true_costs(run, tmp_path):
    calibrate([run]).save(tmp_path / "c.json")
    calibrated = simulate(experiment({"kind": "calibrated", "file": str(tmp_path / "c.json")}, window=100))
    assert calibrated.run.wall_s == pytest.approx(simulate(experiment(COSTS, window=100)).run.wall_s, rel=1e-6)


def run_of(tmp_path, **changes):
    values = experiment(COSTS).model_dump(mode="json")
    for name, value in changes.items():
        values[name] = value if name == "schedule" else {**values[name], **value}
    simulate(load_experiment(values)).write(tmp_path / "other")
    return Run(tmp_path / "other")


def test_where_whole_responses_train_the_costs_are_those_of_finished_rows(tmp_path):
    run = run_of(tmp_path, schedule={"kind": "oversample", "factor": 1.5})
    assert (~run.rollouts.finished & ~run.rollouts.discarded).any()
    calibration = calibrate([run])
    for name in ("policy_update_base_s", "policy_update_per_token_s", "value_forward_per_token_s"):
        assert calibration.costs[name] == pytest.approx(COSTS[name], rel=1e-6), name


@pytest.mark.parametrize("engine", [{"prefill": "chunked", "chunk_tokens": 16}, {}])
def test_prefill_costs_are_those_of_the_tokens_that_were_computed(tmp_path, engine):
    run = run_of(tmp_path, cluster=engine)
    spans = run.engine[run.engine.kind == "prefill"]
    assert (spans.context_tokens == spans.fresh_tokens + spans.resumed_tokens + spans.recomputed_tokens).all()
    assert calibrate([run]).costs["prefill_per_token_s"] == pytest.approx(COSTS["prefill_per_token_s"], rel=1e-6)


def test_a_saved_calibration_reads_back_and_scales(run, tmp_path):
    calibration = calibrate([run])
    calibration.save(tmp_path / "c.json")
    again = Calibration.load(tmp_path / "c.json")
    assert again.costs == calibration.costs
    assert again.scaled(2.0).costs["weight_sync_s"] == pytest.approx(1.0)


def test_totals_are_kept_when_a_few_spans_are_slowed_down():
    """Heavy one-sided outliers, as on shared machines: their time stays in the fitted total."""
    rng = np.random.default_rng(1)
    work = np.column_stack([np.ones(400), rng.integers(1, 30, 400), rng.integers(100, 5000, 400)]).astype(float)
    seconds = work @ np.array([1e-3, 2e-5, 3e-7]) * (1 + 0.05 * rng.standard_normal(400))
    seconds[rng.integers(0, 400, 20)] *= 8
    observed = Observations(("a", "b", "c"), work, seconds, np.ones(400), np.arange(400) // 10)
    found = fit(observed)
    assert found.total_fitted_s == pytest.approx(seconds.sum())
    assert all(value >= 0 for value in found.coefficients.values())
    for name, value in found.coefficients.items():
        low, high = found.interval[name]
        assert low <= value * 1.0001 and value <= high * 1.0001


def test_pairs_that_cannot_be_told_from_tokens_are_left_out():
    rng = np.random.default_rng(2)
    tokens = rng.normal(1000, 20, 100)  # prompts of one length: pairs are a multiple of the tokens, nearly
    work = np.column_stack([np.ones(100), tokens, 15.0 * tokens + rng.normal(0, 20, 100)])
    seconds = 1e-5 * tokens + rng.normal(0, 1e-3, 100)
    observed = Observations(("base", "tokens", "pairs"), work, seconds, np.ones(100), np.arange(100))
    found = fit_prefill(observed)
    assert set(found.coefficients) == {"base", "tokens"}
    longer = found.coefficients["base"] + found.coefficients["tokens"] * 4000
    assert longer == pytest.approx(0.04, rel=0.5)


def test_nothing_to_fit_is_null():
    nothing = Observations(("a",), np.zeros((0, 1)), np.zeros(0), np.zeros(0), np.zeros(0))
    assert fit(nothing) is None


def test_a_run_without_engine_records_is_refused_by_name(tmp_path):
    writer = RunWriter(tmp_path / "bare", header=plain_header(), config_toml="")
    writer.close(t=1.0, status="finished")
    with pytest.raises(DataError, match="bare: has no engine records of training steps"):
        calibrate([Run(tmp_path / "bare")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a calibration of schema 1"),
        ('{"schema": 1, "costs": {"decode_base_s": -1}}', "numbers of at least 0"),
        ('{"schema": 1, "costs": {"decode_base_s": NaN}}', "NaN is not a number"),
        ('{"schema": 1, "costs": {}, "fits": 3}', "not as tppo calibrate writes it"),
        ('{"schema": 1, "costs": {}, "fits": {"a": {"x": 1}}}', "not as tppo calibrate writes it"),
    ],
)
def test_broken_calibration_files_are_named(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        simulate(experiment({"kind": "calibrated", "file": str(tmp_path / "c.json")}))


def test_step_numbers_of_two_runs_do_not_mix(run):
    pooled = calibrate([run, run])
    assert pooled.fits["decode"].observations == 2 * calibrate([run]).fits["decode"].observations
    assert isinstance(run.engine, pd.DataFrame)


def test_an_unknown_cost_in_a_calibration_names_the_nearest(tmp_path):
    path = tmp_path / "c.json"
    nothing = {"fits": {}, "runs": [], "probe_seconds": None, "evaluation_s": None}
    path.write_text(json.dumps({"schema": 1, "costs": {"decode_bse_s": 1.0}, **nothing}))
    with pytest.raises(ConfigError, match="unknown key 'decode_bse_s'; did you mean 'decode_base_s'"):
        resolve(
            load_experiment(
                {
                    "workload": {"steps": 1, "prompts_per_step": 1, "max_response_tokens": 4,
                                 "response_tokens": {"kind": "fixed", "value": 4}},
                    "schedule": {"kind": "synchronous"},
                    "cost": {"kind": "calibrated", "file": str(path)},
                }
            )
        )  # fmt: skip


def test_waiting_for_the_busiest_engine_is_no_overhead_of_a_rollout(tmp_path):
    # A rollout of 3 s: engine 0 decodes 2.5 s of it, engine 1 one second and waits. Its own overhead is 0.5 s.
    header = {**plain_header(), "engines": 2, "gpus": 2}
    writer = RunWriter(tmp_path / "run", header=header, config_toml="")
    writer.trace({"type": "phase", "name": "rollout", "step": 1, "t_start": 0.0, "t_end": 3.0, "depth": 0})
    spans = [dict.fromkeys(ENGINE.names, 0) | {"step": 1, "engine": engine, "kind": "decode", "t_start": 0.0,
             "t_end": end, "steps": 1, "batch": 1} for engine, end in ((0, 2.5), (1, 1.0))]  # fmt: skip
    writer.table("engine", 1, {name: [span[name] for span in spans] for name in ENGINE.names})
    writer.close(t=3.0, status="finished")
    assert constant_observations(Run(writer.path), "rollout_other").seconds.tolist() == [0.5]
