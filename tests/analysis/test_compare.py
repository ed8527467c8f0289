import json
import math

import numpy as np
import pandas as pd
import pytest

from analysis.compare import causes_per_step, changed, compare, flattened, left_out, steps_of
from analysis.noise import Comparison, Steps, block_length, compare_seeds, compare_steps
from profiling import schema
from profiling.errors import DataError, InputError
from profiling.phases import plain_header
from profiling.reader import Run
from profiling.writer import RunWriter
from tests.analysis.made_runs import RISING, make_run, simulated_run
from tppo.cli import main


def correlated(rng, steps, correlation=0.6, spread=0.1):
    """Seconds of an AR(1) process around 1 s."""
    values = [rng.normal()]
    for noise in rng.normal(size=steps - 1) * math.sqrt(1 - correlation**2):
        values.append(correlation * values[-1] + noise)
    return np.exp(spread * np.array(values))


def ones(seconds):
    return Steps(np.asarray(seconds, float), np.ones(len(seconds)))


@pytest.mark.parametrize(("steps", "correlation"), [(40, 0.5), (120, 0.7)])
def test_runs_that_do_not_differ_are_said_to_differ_in_about_five_per_cent(steps, correlation):
    rng = np.random.default_rng(3)
    pairs = 200
    wrong = sum(
        compare_steps(ones(correlated(rng, steps, correlation)), ones(correlated(rng, steps, correlation)),
                      seed=pair).exceeds_noise
        for pair in range(pairs)
    )  # fmt: skip
    assert 0.005 <= wrong / pairs <= 0.08


def test_runs_that_differ_by_a_fifth_are_told_apart():
    rng = np.random.default_rng(4)
    found = [compare_steps(ones(correlated(rng, 100)), ones(1.2 * correlated(rng, 100))) for _ in range(20)]
    assert sum(each.exceeds_noise for each in found) >= 19
    assert np.mean([each.low <= 1.2 <= each.high for each in found]) >= 0.85


def test_blocks_are_longer_where_steps_resemble_their_neighbours():
    # r = 0 exactly for a period of four: +a, +a, -a, -a has products +, -, +, -; the bias correction adds 1 / n
    # n = 400: r = 1 / 400 or so, b = (2.449 x 0.0025 / 1) ** (2 / 3) x 7.37 = 0.25 -> 1
    assert block_length(ones([1.1, 1.1, 0.9, 0.9] * 100)) == 1
    slow = 1 + 0.1 * np.sin(np.arange(400) / 10)
    assert block_length(ones(slow)) > 20
    assert block_length(ones(np.ones(12))) <= 3  # a quarter


def test_a_ratio_is_of_sums_not_a_mean_of_ratios():
    # (1 + 3) s / (1 + 3) rows = 1;  (2 + 2) s / (1 + 1) rows = 2
    a = Steps(np.array([1.0, 3.0]), np.array([1.0, 3.0]))
    b = Steps(np.array([2.0, 2.0]), np.array([1.0, 1.0]))
    found = compare_steps(a, b)
    assert (found.a, found.b, found.ratio) == (1.0, 2.0, 2.0)
    assert found.exceeds_noise is None
    assert compare_steps(a, Steps(np.array([1.0]), np.array([0.0]))) is None


def test_the_verdict_is_in_words():
    assert (
        Comparison(1, 1.12, 1.12, 1.08, 1.16, (1, 1)).words() == "slower by 12.0% (8.0% to 16.0%), more than the noise"
    )
    assert Comparison(1, 0.8, 0.8, 0.7, 0.9, (1, 1)).words() == "faster by 20.0% (10.0% to 30.0%), more than the noise"
    assert Comparison(1, 1, 1.01, 0.97, 1.05, (1, 1)).words() == "no difference beyond the noise (-3.0% to +5.0%)"
    assert Comparison(1, 2, 2.0, None, None, None).words() == (
        "slower by 100.0%; too few steps to say whether that is noise"
    )


def test_seeds_are_paired_where_both_arms_have_them():
    # ratios 2, 2, 2 exactly, though the seeds differ tenfold: no noise. Unpaired, the same values are all noise.
    a, b = {0: 1.0, 1: 3.0, 2: 10.0}, {0: 2.0, 1: 6.0, 2: 20.0}
    paired = compare_seeds(a, b)
    assert (paired.ratio, paired.low, paired.high, paired.pairs) == pytest.approx((2.0, 2.0, 2.0, 3))
    assert not compare_seeds(a, {7: 2.0, 8: 6.0, 9: 20.0}).exceeds_noise
    assert compare_seeds({0: 1.0}, {0: 2.0}).low is None


def test_the_interval_of_paired_seeds_is_students():
    # log ratios 0 and 2: mean 1, standard error 1, t(0.975, 1) = 12.706
    found = compare_seeds({0: 1.0, 1: 1.0}, {0: 1.0, 1: math.exp(2)})
    assert found.ratio == pytest.approx(math.e)
    assert math.log(found.high) == pytest.approx(1 + 12.706, abs=0.001)


def test_steps_hold_their_seconds_rows_and_tokens_without_the_warm_up(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=[0.5] * 4, seconds_per_step=2.0, batch=2)
    steps = steps_of(run, [])
    assert steps.index.tolist() == [2, 3, 4]  # the first of a measured run is warm-up
    assert steps.seconds.to_list() == pytest.approx([2.0, 2.0, 2.0])
    assert steps.finished_row.tolist() == [2, 2, 2]
    assert steps.trained_token.tolist() == [20, 20, 20]


def test_start_up_steps_are_left_out(tmp_path):
    run = simulated_run(tmp_path / "t", {"schedule": {"kind": "truncated", "window": 1024}, "workload": {"steps": 9}})
    assert left_out(run) == 4  # twice the two visits that 2,048 tokens take
    assert steps_of(run, []).index.tolist() == [5, 6, 7, 8, 9]


def test_what_changed_is_named_by_its_field(tmp_path):
    runs = [make_run(tmp_path / name, accuracies=[0.5]) for name in ("a", "b")]
    (runs[0].path / "config.toml").write_text("output = 'a'\n[train]\nsteps = 3\nseed = 0\n[rollout]\nwindow = 8\n")
    (runs[1].path / "config.toml").write_text("output = 'b'\n[train]\nsteps = 3\nseed = 1\n")
    a, b = (Run(run.path) for run in runs)
    assert changed([a], [b]) == [
        {"field": "rollout.window", "a": 8, "b": None},
        {"field": "train.seed", "a": 0, "b": 1},
    ]
    assert {"field": "train.seed", "a": [0, 1], "b": 0} in changed([a, b], [a])
    assert flattened({"x": {"y": {"z": 1}}, "w": 2}) == {"x.y.z": 1, "w": 2}


def test_two_runs_are_compared_by_time_ledger_and_score(runs):
    found = compare(runs[0:1], runs[1:2])  # ppo-s0: 4 s and 2 rows a step; tppo-s0: 2 s and 4 rows
    per_step, per_row, per_token = found["quantities"]
    assert (per_step["a"], per_step["b"], per_step["ratio"]) == pytest.approx((4.0, 2.0, 0.5))
    assert (per_row["a"], per_row["b"], per_row["ratio"]) == pytest.approx((2.0, 0.5, 0.25))
    assert (per_token["a"], per_token["b"]) == pytest.approx((0.2, 0.05))
    ledger = {row["cause"]: row for row in found["ledger"]}
    assert ledger["wait_other"]["a_seconds_per_step"] == pytest.approx(2.2)  # 4 s less 1.8 s of phases
    assert ledger["wait_other"]["a_share"] == pytest.approx(0.55)
    assert ledger["decode_useful"]["b_share"] == pytest.approx(0.5)
    # equal time 12 s: ppo is after 3 of its steps, tppo after 6
    assert (found["score"]["equal_time"]["a"], found["score"]["equal_time"]["b"]) == (0.84, 0.9)
    assert found["score"]["equal_steps"]["difference"] == 0
    assert found["score"]["time_to_target_s"] == {"a": 20.0, "b": 10.0}


def test_the_noise_of_a_score_is_that_of_its_problems(tmp_path):
    runs = [make_run(tmp_path / name, accuracies=[0.5]) for name in ("a", "b")]
    right = [[True, True, False, False], [True, True, True, False]]
    for run, answers in zip(runs, right, strict=True):
        writer = RunWriter(tmp_path / f"{run.name}-more", header=plain_header(), config_toml="")
        writer.table("evaluations", 1, {"step": [1] * 4, "problem": [0, 1, 2, 3], "sample": [0] * 4, "tokens": [1] * 4,
                                        "finished": [True] * 4, "correct": answers, "answer": ["1"] * 4})  # fmt: skip
        (writer.path / "evaluations").rename(run.path / "evaluations")
    found = compare([Run(runs[0].path)], [Run(runs[1].path)])["score"]["equal_steps"]
    # differences 0, 0, 1, 0: standard deviation 1/2, standard error 1/4
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.25)
    assert found["exceeds_noise"] is False


def test_seeds_of_two_arms_are_the_units(runs):
    found = compare([runs[0], runs[2], runs[4]], [runs[1], runs[3], runs[5]])
    assert found["units"] == "seeds"
    per_step = found["quantities"][0]
    # 4, 5, 6 s against 2 s: the geometric mean of 1/2, 2/5, 1/3
    assert per_step["ratio"] == pytest.approx((1 / 2 * 2 / 5 * 1 / 3) ** (1 / 3))
    assert per_step["pairs"] == 3
    assert per_step["exceeds_noise"] is True


def test_a_run_of_one_step_gives_numbers_and_no_verdict(tmp_path):
    runs = [make_run(tmp_path / name, accuracies=[0.5]) for name in ("a", "b")]
    found = compare(runs[:1], runs[1:])
    assert found["quantities"][0]["words"] == "the same; too few steps to say whether that is noise"
    assert "a has 1 step, all of them start-up or warm-up; they are compared" in found["notes"]


def test_a_live_run_is_compared_so_far_and_lacks_a_ledger(tmp_path):
    live = make_run(tmp_path / "live", accuracies=RISING, finish=False)
    found = compare([live], [make_run(tmp_path / "done", accuracies=RISING)])
    assert found["a"]["steps_compared"] == [4]  # of six: the first warms up, the last may not be whole
    assert "live has not ended; its steps so far are compared, without the last one" in found["notes"]
    assert found["ledger"] == []
    assert any("has no ledger yet; the run has not ended" in note for note in found["notes"])


def test_a_run_without_records_is_compared_by_its_steps_alone(tmp_path):
    run = make_run(tmp_path / "done", accuracies=RISING)
    other = make_run(tmp_path / "bare", accuracies=RISING)
    for part in (other.path / "rollouts").iterdir():
        part.unlink()
    found = compare([run], [Run(other.path)])
    assert [row["name"] for row in found["quantities"]] == ["seconds per step"]
    assert any("bare has no rollout records" in note for note in found["notes"])


def test_what_a_run_cannot_tell_is_null_in_the_ledger(tmp_path):
    run = make_run(tmp_path / "run", accuracies=RISING)
    run.ledger = run.ledger.assign(cause=run.ledger.cause.replace({"decode_useful": "unresolved"}))
    own = causes_per_step(run)
    assert pd.isna(own["wait_tail"])
    assert pd.isna(own["unresolved"])
    assert own["update_policy"] == pytest.approx(0.6)


def test_a_run_without_evaluations_has_no_score_and_says_so(tmp_path, simulated):
    found = compare([simulated["synchronous"]], [simulated["truncated"]])
    assert found["score"] is None
    assert any("scores cannot be compared" in note and "has no evaluations" in note for note in found["notes"])
    assert "energy was not measured in both" in found["notes"]


def test_the_command_prints_words_or_json(runs, capsys):
    paths = [str(run.path) for run in runs[:2]]
    assert main(["compare", *paths]) == 0
    shown = capsys.readouterr().out
    assert "B, seconds per step: faster by 50.0%; too few steps to say whether that is noise." in shown
    assert "Score at equal time (12 s of training): A 84.0%, B 90.0%: +6.0 points" in shown
    assert main(["compare", *paths, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantities"][0]["ratio"] == pytest.approx(0.5)
    arms = [[str(run.path) for run in runs[first::2]] for first in (0, 1)]
    assert main(["compare", *arms[0], "--against", *arms[1]]) == 0
    assert "the seeds, which are the units" in capsys.readouterr().out


def error(capsys, *words):
    code = main(list(words))
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    paths = [str(run.path) for run in runs[:3]]
    assert error(capsys, "compare", paths[0]) == (
        2,
        "tppo: tppo compare: 1 RUN given, needs two; seeds of two arms: tppo compare A-s0 A-s1 --against B-s0 B-s1",
    )
    assert error(capsys, "compare", *paths)[1].startswith("tppo: tppo compare: 3 RUNs given, needs two")
    assert "no such run directory" in error(capsys, "compare", paths[0], str(tmp_path / "nowhere"))[1]
    assert "--block 0: must be at least 1" in error(capsys, "compare", *paths[:2], "--block", "0")[1]
    with pytest.raises(InputError, match="each side needs at least one run"):
        compare([], runs[:1])


def test_a_run_of_another_schema_is_refused_with_its_version(runs, tmp_path, capsys):
    trace = runs[0].path / "trace.jsonl"
    trace.write_text(trace.read_text().replace(f'"schema":{schema.SCHEMA_VERSION}', '"schema":1', 1))
    code, line = error(capsys, "compare", str(runs[0].path), str(runs[1].path))
    assert code == 2
    assert f"trace.jsonl: line 1: schema version 1 is not {schema.SCHEMA_VERSION}" in line


def test_a_run_without_training_steps_is_an_error(tmp_path):
    writer = RunWriter(tmp_path / "empty", header=plain_header(), config_toml="")
    writer.close(t=1.0, status="finished")
    with pytest.raises(DataError, match="has no phase of a training step; there is nothing to compare"):
        steps_of(Run(writer.path), [])
