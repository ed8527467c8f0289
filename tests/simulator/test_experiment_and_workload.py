import json

import numpy as np
import pytest

from profiling.errors import ConfigError, DataError
from profiling.reader import Run
from simulator import load_experiment, simulate
from simulator.costs import EngineCosts
from simulator.workload import RowSource, uniforms
from tppo.schedule import from_description
from tppo.schedule.log import decide_again


def base(**sections):
    values = {
        "workload": {
            "steps": 3, "prompts_per_step": 6, "samples_per_prompt": 2, "prompt_tokens": 7, "max_response_tokens": 60,
            "seed": 5, "response_tokens": {"kind": "lognormal", "mean": 25.0, "sigma": 0.8},
        },
        "schedule": {"kind": "truncated", "window": 20},
        "cluster": {"engines": 2, "gpus_per_engine": 2, "max_rows_per_engine": 4},
        "cost": {"decode_base_s": 0.01, "decode_per_row_s": 1e-4, "prefill_per_token_s": 1e-4,
                 "policy_update_per_token_s": 1e-3, "weight_sync_s": 0.25, "reward_per_row_s": 0.01,
                 "evaluation_s": 2.0, "evaluation_every": 2, "switch_s": 0.125, "step_other_s": 0.0625},
    }  # fmt: skip
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    return values


def test_three_decode_steps_cost_what_single_steps_cost():
    # t = 1 + B/2 + C/4; B = 2; C = 8, 10, 12  ->  4 + 4.5 + 5 = 13.5 s
    costs = EngineCosts(decode_base_s=1.0, decode_per_row_s=0.5, decode_per_context_token_s=0.25)
    assert costs.decode_s(batch=2, context_tokens=8, steps=3) == 13.5


def test_a_timeline_worked_by_hand():
    # One engine, two slots, rows of 2, 4 and 1 tokens; a decode step 1 s + 1/2 s a row; prefill 1 s each time.
    # 0-1 prefill rows 0, 1; 1-5 two steps of 2 rows (2 s each); row 0 ends at 5. 5-6 prefill row 2; 6-8 one step;
    # row 2 ends at 8. One step of row 1 alone: 1.5 s; it ends at 9.5. Reward 3 rows x 1 s -> 12.5.
    result = simulate(
        load_experiment(
            {
                "workload": {"steps": 1, "prompts_per_step": 3, "max_response_tokens": 4,
                             "response_tokens": {"kind": "fixed", "value": 4}},
                "schedule": {"kind": "synchronous"},
                "cluster": {"max_rows_per_engine": 2},
                "cost": {"decode_base_s": 1, "decode_per_row_s": 0.5, "prefill_base_s": 1, "reward_per_row_s": 1},
            }
        )
    )  # fmt: skip
    # rows of 4: 0-1 prefill, 1-9 four steps of 2 rows; 9-10 prefill of row 2, 10-16 four steps of 1; reward 16-19
    assert result.rollouts.t_end.to_list() == [9, 9, 16]
    assert result.run.wall_s == 19
    summary = result.summary()
    assert summary["ledger"]["prefill"] == 2
    assert summary["ledger"]["decode_useful"] == 8 + 3
    assert summary["ledger"]["decode_underfilled"] == 3
    assert summary["ledger"]["reward"] == 3
    assert summary["tail_seconds"] == 0  # ceil(0.9 x 3) = 3: the last one itself


def test_the_phases_come_in_the_order_of_the_training_loop():
    result = simulate(load_experiment(base(workload={"steps": 2})))
    names = result.phases[result.phases.step == 2].name.to_list()
    assert names == ["rollout", "switch", "reward", "update_policy", "weight_sync", "switch", "evaluation"]
    assert result.summary()["ledger"]["weight_sync"] == 4 * 2 * 0.25  # 4 GPUs, 2 steps


def test_every_row_and_token_is_accounted_for():
    for schedule in ({"kind": "synchronous"}, {"kind": "truncated", "window": 20}):
        experiment = load_experiment({**base(workload={"steps": 6}), "schedule": schedule})
        summary = simulate(experiment).summary()
        assert summary["rows_in"] == summary["rows_finished"] + summary["rows_carried"]
        assert sum(summary["ledger"].values()) == pytest.approx(summary["gpu_seconds"], rel=1e-9)


def test_two_schedules_see_the_same_rows():
    first = simulate(load_experiment(base())).rollouts
    second = simulate(load_experiment({**base(), "schedule": {"kind": "synchronous"}})).rollouts
    whole = second.set_index("row").tokens
    done = first[first.finished].set_index("row")
    lengths = done.context_before + done.tokens - done.prompt_tokens
    assert (lengths == whole[lengths.index]).all()


def test_a_window_at_the_maximum_is_synchronous_in_time_and_decision():
    synchronous = simulate(load_experiment({**base(), "schedule": {"kind": "synchronous"}}))
    for window in (60, 1000):
        truncated = simulate(load_experiment(base(schedule={"window": window})))
        assert truncated.rollouts.equals(synchronous.rollouts)
        for step, log in truncated.run.log.steps.items():
            other = list(synchronous.run.log.steps[step].decisions(synchronous.run.schedule))
            assert list(log.decisions(truncated.run.schedule)) == other
        assert truncated.run.wall_s == synchronous.run.wall_s


def test_one_seed_gives_one_run_directory_byte_for_byte(tmp_path):
    for name in ("a", "b"):
        simulate(load_experiment(base())).write(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 6
    for file in files:
        first, second = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        if file.name == "summary.json":
            first, second = (
                {k: v for k, v in json.loads(text).items() if k != "simulator_seconds"} for text in (first, second)
            )
        assert first == second, file


def test_a_fresh_schedule_makes_every_decision_of_a_simulated_run_again(tmp_path):
    simulate(load_experiment(base())).write(tmp_path / "run")
    run = Run(tmp_path / "run")
    schedule = from_description(run.header["schedule"])
    pairs = decide_again(schedule, run.trace)
    assert all(fresh == logged for logged, fresh in pairs)
    assert sum(logged["type"] == "row_end" for logged, _ in pairs) == 3 * 12
    assert run.simulated


def test_a_summary_is_stable_when_read_back(tmp_path):
    result = simulate(load_experiment(base()))
    result.write(tmp_path / "run")
    assert Run(tmp_path / "run").summary == result.summary()


def test_uniforms_are_uniform_and_independent_of_the_range_asked_for():
    u = uniforms(3, np.arange(200_000))
    assert abs(u.mean() - 0.5) < 0.003
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
    assert (uniforms(3, np.arange(100, 110)) == u[100:110]).all()
    assert not (uniforms(4, np.arange(10)) == u[:10]).any()


def workload(**lengths):
    return load_experiment(base(workload={"response_tokens": lengths, "max_response_tokens": 24576})).workload


def test_lognormal_means_before_and_after_the_cap():
    before = RowSource(workload(kind="lognormal", mean=8192.0, sigma=0.8)).rows(0, 200_000).response_tokens
    # E[min(X, c)] = e^(mu + s^2/2) Phi((ln c - mu)/s - s) + c (1 - Phi((ln c - mu)/s)) = 7,742
    assert before.mean() == pytest.approx(7742, rel=0.01)
    assert before.max() == 24576
    assert before.min() >= 1
    after = RowSource(workload(kind="lognormal", mean_capped=7000.0, sigma=0.8)).rows(0, 200_000).response_tokens
    assert after.mean() == pytest.approx(7000, rel=0.01)


def test_empirical_lengths_repeat_or_are_sampled(tmp_path):
    table = tmp_path / "lengths.csv"
    table.write_text("n\n3\n9.5\n700\n")
    given = RowSource(workload(kind="empirical", file=str(table), column="n"))
    assert given.rows(1, 4).response_tokens.tolist() == [10, 700, 3, 10]  # rounded up
    sampled = RowSource(workload(kind="empirical", file=str(table), column="n", order="sampled"))
    assert set(sampled.rows(0, 100).response_tokens.tolist()) == {3, 10, 700}


def test_lengths_of_a_run_come_back_row_by_row(tmp_path):
    result = simulate(load_experiment(base(workload={"steps": 5})))
    result.write(tmp_path / "run")
    again = RowSource(workload(kind="run", path=str(tmp_path / "run"))).rows(0, 12)
    own = result.run.source.rows(0, 12)
    finished = result.rollouts[result.rollouts.finished].row
    known = [row for row in range(12) if row in set(finished)]
    assert again.response_tokens[known].tolist() == own.response_tokens[known].tolist()
    assert again.prompt_tokens.tolist() == [7] * 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": {"kind": "tail_batching", "threshold": 0}}, "schedule.threshold = 0"),
        ({"schedule": {"kind": "oversample", "factor": 0.5}}, "schedule.factor = 0.5"),
        ({"schedule": {"kind": "asynchronous"}}, "overlap only on GPUs of their own; set cluster.trainer"),
        ({"schedule": {"kind": "asynchronous", "max_staleness": 2}, "cluster": {"trainer": "none"},
          "cost": {"kind": "affine", "evaluation_s": 1.0, "evaluation_every": 2}}, "set cost.evaluation_every = 0"),
        ({"cost": {"kind": "analytic"}}, "missing key 'cost.model'; add it"),
        ({"cluster": {"prefill": "chunky"}}, "cluster.prefill = 'chunky'"),
        ({"cluster": {"prefill": "chunked", "chunk_tokens": 0}}, "cluster.chunk_tokens = 0"),
        ({"cluster": {"trainer": "separate"}}, "trainer = 'separate' needs trainer_gpus"),
        ({"cluster": {"kv_tokens_per_engine": 64}}, "cannot hold one row of 67 tokens"),
        ({"cluster": {"engines": 0}}, "cluster.engines = 0: input should be greater than 0"),
        ({"workload": {"response_tokens": {"kind": "lognormal", "sigma": 1}}}, "give either mean"),
        ({"workload": {"response_tokens": {"kind": "zipf"}}}, "workload.response_tokens: input tag 'zipf'"),
        ({"workload": {"steps": -1}}, "workload.steps = -1"),
        ({"cost": {"kind": "calibrated", "file": "/no/such.json"}}, "no such calibration file"),
        ({"cost": {"decode_base_s": float("nan")}}, "cost.decode_base_s = nan"),
    ],
)  # fmt: skip
def test_bad_experiments_are_one_clear_line(change, message):
    values = base()
    for section, changes in change.items():
        values[section] = changes if "kind" in changes else {**values[section], **changes}
    with pytest.raises(ConfigError) as error:
        simulate(load_experiment(values))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n\n3\n-1\n", "row 2: not a positive number"),
        ("n\nx\n", "row 1"),
        ("m\n1\n", "no column 'n'"),
        ("n\n", "empty"),
    ],
)
def test_bad_length_tables_name_the_row(tmp_path, text, message):
    table = tmp_path / "lengths.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=message):
        RowSource(workload(kind="empirical", file=str(table), column="n"))


def test_truncation_makes_steps_cheaper_but_rows_need_more_visits():
    """At these costs windows of L/3 are 1.59 times faster a step, but 1.07 times a finished row."""
    costs = {"decode_base_s": 0.00828, "decode_per_row_s": 2.13e-5, "decode_per_context_token_s": 5.0e-8}
    values = {
        "workload": {"steps": 14, "prompts_per_step": 64, "samples_per_prompt": 16, "prompt_tokens": 512,
                     "max_response_tokens": 24576,
                     "response_tokens": {"kind": "lognormal", "mean": 8192.0, "sigma": 0.8}},
        "cluster": {"engines": 1, "trainer": "none"},
        "cost": costs,
    }  # fmt: skip
    synchronous = simulate(load_experiment({**values, "schedule": {"kind": "synchronous"}})).summary()
    truncated = simulate(load_experiment({**values, "schedule": {"kind": "truncated", "window": 8192}})).summary()
    assert truncated["startup_steps"] == 6
    assert synchronous["seconds_per_step"] / truncated["seconds_per_step"] == pytest.approx(1.59, abs=0.08)
    ratio = synchronous["seconds_per_finished_row"] / truncated["seconds_per_finished_row"]
    assert ratio == pytest.approx(1.07, abs=0.06)


def test_a_length_beyond_every_integer_ends_at_the_cap():
    from simulator import load_experiment, simulate

    values = {
        "workload": {"steps": 1, "prompts_per_step": 2, "max_response_tokens": 10,
                     "response_tokens": {"kind": "fixed", "value": 1e30}},
        "schedule": {"kind": "synchronous"}, "cluster": {"engines": 1},
        "cost": {"kind": "affine", "decode_base_s": 1.0},
    }  # fmt: skip
    assert simulate(load_experiment(values)).summary()["generated_tokens"] == 20
