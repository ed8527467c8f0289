import json
import math

import numpy as np
import pytest

from profiling.errors import ConfigError
from profiling.schema import CAUSES
from simulator import load_experiment, simulate
from simulator.hardware import Gpu, load_gpu
from simulator.models import load_model
from simulator.plan import Question, answer
from simulator.plan.answer import Draws
from simulator.plan.estimate import estimate
from simulator.plan.money import hours, paid_gpus, watts
from simulator.plan.options import fewest_gpus_of_an_engine, options_of, share_of
from tppo.cli import main
from tppo.commands.plan import print_answer

pytestmark = pytest.mark.usefixtures("one_process")
SMALL = {
    "model": "Qwen2.5-0.5B", "gpu": "H100-SXM", "gpus": (8, 16), "steps": 100, "prompts_per_step": 32,
    "samples_per_prompt": 4, "max_response_tokens": 3000, "mean_tokens": 900.0, "draws": 500,
}  # fmt: skip
UNSAID = {key: value for key, value in SMALL.items() if key != "mean_tokens"}
WORDS = [
    "plan", "--model", "Qwen2.5-0.5B", "--gpu", "H100-SXM", "--gpus", "8,16", "--prompts-per-step", "32",
    "--samples-per-prompt", "4", "--max-response-tokens", "3000", "--mean-tokens", "900", "--draws", "500",
]  # fmt: skip


def test_hours_by_hand():
    # 100 steps of 36 s; every 10th an evaluation of 60 s, every 20th a checkpoint of 40 s: 36 + 6 + 2 = 44 s.
    assert hours(np.array([36.0]), 100)[0] == pytest.approx(1.0)
    often = {"evaluation_every": 10, "evaluation_s": 60.0, "checkpoint_every": 20, "checkpoint_s": 40.0}
    assert hours(np.array([36.0]), 100, **often)[0] == pytest.approx(4400 / 3600)
    # Five stretches of 880 s; one failure in half an hour on average, restart 120 s.
    expected = 5 * (1800 + 120) * (math.exp(880 / 1800) - 1) / 3600
    assert hours(np.array([36.0]), 100, **often, mtbf_hours=0.5, restart_s=120.0)[0] == pytest.approx(expected)
    # Without checkpoints the whole run has to pass.
    whole = (1800 + 120) * (math.exp(3600 / 1800) - 1) / 3600
    assert hours(np.array([36.0]), 100, mtbf_hours=0.5, restart_s=120.0)[0] == pytest.approx(whole)


def test_expected_hours_are_what_simulated_failures_take():
    values = {
        "workload": {"steps": 3000, "prompts_per_step": 2, "max_response_tokens": 9,
                     "response_tokens": {"kind": "fixed", "value": 9}},
        "schedule": {"kind": "synchronous"},
        "cost": {"decode_base_s": 1.0, "checkpoint_s": 3.0, "checkpoint_every": 3, "mtbf_hours": 40 / 3600,
                 "restart_s": 7.0},
    }  # fmt: skip
    simulated = simulate(load_experiment(values)).run.wall_s / 3600
    own = hours(np.array([9.0]), 3000, checkpoint_every=3, checkpoint_s=3.0, mtbf_hours=40 / 3600, restart_s=7.0)
    assert simulated == pytest.approx(own[0], rel=0.05)


def test_energy_and_whole_nodes_by_hand():
    gpu = Gpu(name="toy", family="hopper", bf16_flops=1e15, memory_bytes=8e10, memory_bytes_per_s=2e12,
              tdp_watts=700, idle_watts=100)  # fmt: skip
    # A quarter training (0.85), half decoding (0.5), a quarter waiting (0): 100 + (0.2125 + 0.25) x 600.
    spent = dict.fromkeys(CAUSES, 0.0) | {"update_policy": 10.0, "decode_useful": 20.0, "wait_tail": 10.0}
    assert watts(gpu, spent) == pytest.approx(100 + 0.4625 * 600)
    assert watts(gpu.model_copy(update={"idle_watts": None}), spent) is None
    assert (paid_gpus(12, gpu, whole_nodes=True), paid_gpus(12, gpu, whole_nodes=False)) == (16, 12)


def test_draws_hold_the_stated_intervals():
    draws = Draws.of(Question(**SMALL | {"draws": 50_000, "steps_ratio": (1.0, 1.4)}), load_gpu("H100-SXM"))
    for factor, uncertainty in ((draws.rollout, 0.2), (draws.training, 0.25), (draws.lengths, 0.15)):
        assert np.mean((factor > 1 / (1 + uncertainty)) & (factor < 1 + uncertainty)) == pytest.approx(0.9, abs=0.01)
    assert draws.ratio.min() >= 1.0
    assert draws.ratio.max() <= 1.4
    assert draws.ratio.mean() == pytest.approx(1.2, abs=0.01)


def test_a_pilots_lengths_narrow_the_interval(tmp_path):
    path = tmp_path / "pilot.csv"
    path.write_text("tokens\n" + "\n".join(str(500 + i % 700) for i in range(4000)))
    own = Draws.of(Question(**UNSAID | {"lengths": path}), load_gpu("H100-SXM"))
    assert own.lengths.std() < 0.01


def test_a_pilot_run_is_taken_with_its_lengths(tmp_path):
    (option, *_) = options_of(Question(**SMALL | {"windows": (800,)}))
    simulate(option.experiment).write(tmp_path / "pilot")
    own = answer(Question(**UNSAID | {"gpus": (8,), "windows": (800,), "lengths": tmp_path / "pilot"}))
    plain = answer(Question(**SMALL | {"gpus": (8,), "windows": (800,)}))
    assert own.rows[0]["hours"]["p50"] == pytest.approx(plain.rows[0]["hours"]["p50"], rel=0.05)
    assert not any("response lengths" in text for text in own.assumptions)


def test_utilisation_in_both_conventions(found):
    """The policy update runs at the factors' share of the peak, of which a fourth is recomputation."""
    for row in found.rows:
        mfu = row["policy_update_mfu"]
        assert 0.02 < mfu["causal"] < 0.75 * 0.45
        assert mfu["verl"] > mfu["causal"]


def test_skipping_start_up_gives_the_same_steps():
    (_, option, *_) = options_of(Question(**SMALL | {"windows": (800,)}))
    startup = option.experiment.make_schedule().startup_steps(3000)
    whole = simulate(option.experiment)
    skipped = simulate(option.experiment, skipped_steps=startup)
    first, second = (
        result.rollouts[result.rollouts.step > startup].reset_index(drop=True) for result in (whole, skipped)
    )
    names = ["step", "row", "engine", "context_before", "tokens", "trained_tokens", "finished", "policy_version"]
    assert first[names].equals(second[names])
    begin = whole.rollouts[whole.rollouts.step <= startup].t_end.max()
    assert begin > 0
    assert np.ptp(first.t_end - second.t_end) < 1e-6 * begin
    ready = whole.phases[whole.phases.step > startup].t_start.min()
    assert whole.run.wall_s - ready == pytest.approx(skipped.run.wall_s, rel=1e-9)
    with pytest.raises(ValueError, match="'oversample': its steps depend on time"):
        simulate(load_experiment(option.experiment.model_dump(mode="json") | {"schedule": {"kind": "oversample"}}),
                 skipped_steps=1)  # fmt: skip


def test_a_window_at_the_maximum_is_the_synchronous_run_and_is_not_listed_twice():
    own = options_of(Question(**SMALL | {"gpus": (8, 8), "windows": (800, 3000, 800, 9000)}))
    assert [option.label for option in own] == ["synchronous", "truncated 800"]
    plain = estimate(own[0])
    assert (plain.finished_rows, plain.visits) == (128, 1)


def test_rows_in_flight_train_as_many_tokens_as_finish():
    """The last steps train on rows that finished in them or before: no end effect."""
    own = {"schedules": ("in_flight",), "gpus": (8,)}
    flight = estimate(options_of(Question(**SMALL | own))[1])
    assert flight.finished_rows == 128
    assert flight.trained_tokens == pytest.approx(128 * 900, rel=0.1)


@pytest.fixture(scope="module")
def found():
    """By as many processes as there are cores: made before `one_process` is."""
    every = ("synchronous", "truncated", "oversample", "asynchronous", "in_flight")
    question = Question(**SMALL | {"schedules": every, "windows": (700, 1500), "steps_ratio": (1.0, 1.2)})
    return answer(question)


def test_an_answer_adds_up(found):
    own = found
    assert len(own.rows) == 2 * 6
    assert sum(row["probability_cheapest"] for row in own.rows) == pytest.approx(1)
    for row in own.rows:
        assert row["hours"]["p10"] <= row["hours"]["p50"] <= row["hours"]["p90"]
        assert row["gpu_hours"]["p50"] == pytest.approx(row["hours"]["p50"] * row["gpus"])
        assert row["dollars"]["p50"] == pytest.approx(row["gpu_hours"]["p50"] * load_gpu("H100-SXM").price_per_hour)
        assert 0 <= row["idle_share"] < 1
        assert row["memory_headroom_gb"] > 0
        assert row["simulated_only"] == (row["schedule"] == "in flight")
    # The front by brute force.
    points = [(row["hours"]["p50"], row["dollars"]["p50"]) for row in own.rows]
    for row, (t, m) in zip(own.rows, points, strict=True):
        beaten = any(a <= t and b <= m and (a, b) != (t, m) for a, b in points)
        assert row["on_the_front"] != beaten


def test_speed_ups_are_ratios_to_the_synchronous_run_on_the_same_gpus(found):
    own = found
    for gpus in (8, 16):
        rows = {row["schedule"]: row for row in own.rows if row["gpus"] == gpus}
        plain = rows["synchronous"]
        assert plain["speedup_per_step"] == plain["speedup_per_finished_row"] == 1
        assert plain["speedup_at_equal_score"]["p50"] == 1
        cut = rows["truncated 700"]
        assert cut["speedup_per_step"] == pytest.approx(plain["seconds_per_step"] / cut["seconds_per_step"])
        # Some steps more, so less than per step, for every truncated option.
        assert cut["speedup_at_equal_score"]["p90"] < 1.05 * cut["speedup_per_step"]
        assert cut["speedup_per_finished_row"] < cut["speedup_per_step"]


def test_what_is_assumed_and_what_decides_is_said(found):
    own = found
    text = " ".join(own.assumptions)
    for word in ("response lengths: lognormal", "efficiency factors: hopper", "list price of", "failures: none"):
        assert word in text
    assert " alone it moves " in own.decides
    assert " GPUs" in own.best_window
    assert "last tenth" in own.tail


def test_no_speed_up_at_equal_score_without_a_stated_ratio():
    own = answer(Question(**SMALL | {"gpus": (8,), "windows": (700,)}))
    assert [row["speedup_at_equal_score"] is None for row in own.rows] == [False, True]


def test_a_deadline_rules_out_what_is_too_slow():
    plain = answer(Question(**SMALL | {"windows": (1500,)}))
    middle = sorted(row["hours"]["p50"] for row in plain.rows)[1]
    own = answer(Question(**SMALL | {"windows": (1500,), "deadline_hours": middle * 1.01}))
    for row in own.rows:
        assert row["meets_deadline"] == (row["hours"]["p50"] <= middle * 1.01)
        assert row["meets_deadline"] or row["probability_cheapest"] == 0


def test_finished_responses_as_a_horizon():
    own = answer(Question(**SMALL | {"steps": None, "finished_rows": 12_800, "gpus": (8,), "windows": (700,)}))
    plain, cut = own.rows
    assert plain["steps"] == pytest.approx(100)
    assert cut["steps"] > 100
    ratio = plain["hours"]["p50"] / cut["hours"]["p50"]
    assert ratio == pytest.approx(cut["speedup_per_finished_row"], rel=0.05)


@pytest.mark.slow
def test_drift_rewards_and_failures_cost_time():
    own = {"gpus": (8,), "windows": (1500,)}
    plain = answer(Question(**SMALL | own)).rows[0]["hours"]["p50"]
    for change in (
        {"length_growth_per_step": 0.004}, {"reward_p50_s": 1.0, "reward_p90_s": 8.0}, {"mtbf_hours": 8.0},
        {"evaluation_every": 10, "evaluation_s": 60.0}, {"switch_s": 5.0}, {"weight_sync_s": 9.0},
    ):  # fmt: skip
        assert answer(Question(**SMALL | own | change)).rows[0]["hours"]["p50"] > 1.005 * plain, change


def test_reward_percentiles_are_a_lognormal_law():
    mean, last = Question(**SMALL | {"reward_p50_s": 1.0, "reward_p90_s": 4.0}).reward_s()
    sigma = math.log(4) / 1.2816
    assert (mean, last) == (pytest.approx(math.exp(sigma**2 / 2)), 4.0)


def test_the_command_prints_json_and_a_table(capsys, tmp_path):
    assert main([*WORDS, "--steps", "50", "--windows", "1000", "--json", "--output", str(tmp_path / "plan.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "plan.json").read_text())
    assert [row["schedule"] for row in printed["rows"]] == ["synchronous", "truncated 1000"] * 2
    assert main([*WORDS, "--finished-rows", "5000"]) == 0
    table = capsys.readouterr().out
    for word in ("What decides", "Best window", "Tail:", "Assumed:", "truncated 1000"):
        assert word in table


def test_a_model_that_does_not_fit_everywhere_says_where(capsys):
    words = ["plan", "--model", "Qwen2.5-32B", "--gpu", "H100-SXM", "--gpus", "8,64", "--steps", "10",
             "--prompts-per-step", "8", "--samples-per-prompt", "4", "--windows", "8192"]  # fmt: skip
    assert main(words) == 0
    assert "8 GPUs, synchronous: cannot run: training on H100-SXM" in capsys.readouterr().out


def test_an_engine_gets_what_training_leaves_on_its_gpus():
    """32 GPUs hold a 32nd of 16 bytes a number each, and one weight on its way in float32; two GPUs an engine would be
    too few then for eight of the longest rows. Apart, or offloaded, training leaves all."""
    own = {"model": "Qwen2.5-32B", "gpus": (32,), "max_response_tokens": 24576, "windows": (8192,)}
    gpu, model = load_gpu("H100-SXM"), load_model("Qwen2.5-32B")
    states = 16 * (model.parameters + model.backbone_parameters + model.hidden + 1) / 32
    way = 4 * model.vocabulary * model.hidden
    left = 0.95 - (states + way) / gpu.memory_bytes
    assert share_of(Question(**SMALL | own), gpu, 32) == pytest.approx(left)
    assert share_of(Question(**SMALL | own), gpu, 0) == 0.9
    assert share_of(Question(**SMALL | own | {"cpu_offload": True}), gpu, 32) == 0.9
    assert share_of(Question(**SMALL | own | {"memory_utilization": 0.5}), gpu, 32) == 0.5
    assert fewest_gpus_of_an_engine(Question(**SMALL | own), model, gpu, 32) == 4
    assert fewest_gpus_of_an_engine(Question(**SMALL | own | {"cpu_offload": True}), model, gpu, 32) == 2


@pytest.mark.parametrize(
    ("change", "part", "factor"),
    [
        ({"micro_batch_tokens": 7024}, "activations", 2),
        ({"micro_batch_tokens": 1000}, "activations", 1),  # the longest row is 3,512
        ({"logit_tokens": 2048}, "logits", 2),
        ({"cpu_offload": True}, "weights, gradients, moments", 0),
    ],
)
def test_settings_of_training_change_its_memory(change, part, factor):
    plain = {**SMALL, "gpus": (8,), "windows": (), "micro_batch_tokens": 3512, "logit_tokens": 1024}
    before, after = (options_of(Question(**own))[0].needs["training"] for own in (plain, plain | change))
    assert after[part] == pytest.approx(factor * before[part])
    assert {name: size for name, size in after.items() if name != part} == {
        name: size for name, size in before.items() if name != part
    }


def test_an_option_without_a_synchronous_run_to_compare_with_is_printed(capsys):
    question = Question(**SMALL | {"gpus": (8,), "windows": (700,)})
    found = answer(question)
    found.rows[1].update(speedup_per_step=None, speedup_per_finished_row=None)
    print_answer(question, found)
    assert "not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "10", "--engine", "torch", "--tensor-parallel", "2"], "--engine = torch: takes no"),
        (["--steps", "10", "--gpus", "8", "--memory-utilization", "0.94"], "rollout on H100-SXM: "),
        (["--steps", "10", "--finished-rows", "5"], "either --steps or --finished-rows"),
        ([], "either --steps or --finished-rows"),
        (["--steps", "10", "--gpus", "8,,16"], "--gpus: an empty value between commas"),
        (["--steps", "0"], "--steps = '0'"),
        (["--steps", "10", "--gpus", "0"], "--gpus = '0'"),
        (["--steps", "10", "--gpus", "1000000"], "--gpus = '1000000'"),
        (["--steps", "10", "--prompts-per-step", "90000"], "360000 responses a step"),
        (["--steps", "10", "--evaluation-s", "5"], "--evaluation-s: never happens without"),
        (["--steps", "10", "--restart-s", "5"], "never happens without"),
        (["--steps", "10", "--mtbf-hours", "0.000001"], "fail more than 10000 times on average"),
        (["--steps", "10", "--output", "/tmp"], "--output '/tmp': is not a file to write"),
        (["--steps", "10", "--gpus", "7", "--tensor-parallel", "7"], "over a divisor or a multiple of them"),
        (["--steps", "10", "--windows", "x"], "windows"),
        (["--steps", "10", "--schedules", "fifo"], "schedules"),
        (["--steps", "10", "--steps-ratio", "1.5,1.2"], "LOW,HIGH"),
        (["--steps", "10", "--mean-tokens", "5000"], "--mean-tokens = 5000 is not below --max-response-tokens = 3000"),
        (["--steps", "10", "--gpu", "B200"], "no efficiency factors of family 'blackwell'"),
        (["--steps", "10", "--max-response-tokens", "100000"], "rows of 100512 tokens, fitted up to 24576"),
        (["--steps", "10", "--model", "Qwen9"], "model 'Qwen9'"),
        (["--steps", "10", "--gpus", "3", "--tensor-parallel", "2"], "3 GPUs do not divide into engines of 2"),
        (["--steps", "10", "--tensor-parallel", "4"], "cost.tensor_parallel = 4: does not divide 14 attention heads"),
        (["--steps", "10", "--lengths", "/no/such.csv"], "/no/such.csv"),
        (["--steps", "10", "--reward-p50-s", "5", "--reward-p90-s", "1"], "= 1 is below --reward-p50-s = 5"),
        (["--steps", "10", "--length-growth-per-step", "9"], "--length-growth-per-step = '9'"),
    ],
)  # fmt: skip
def test_bad_questions_are_one_line(capsys, words, message):
    assert main([*WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--gpus", "8", "--windows", "1", "--prompts-per-step", "1", "--samples-per-prompt", "1"],
            "8 GPUs, truncated 1: cannot run: truncated 1: no row finished in",
        ),
        (["--gpus", "1", "--schedules", "asynchronous"], "cannot run: rollout and training need GPUs of their own"),
    ],
)
def test_an_option_that_cannot_run_does_not_stop_the_others(capsys, words, message):
    assert main([*WORDS, "--steps", "10", *words]) == 0
    assert message in capsys.readouterr().out


def test_borrowed_factors_are_named_and_wider():
    own = answer(Question(**SMALL | {"gpu": "A100-80", "gpus": (8,), "windows": (1500,), "extrapolate": True}))
    assert any("borrowed from hopper" in text for text in own.assumptions)
    with pytest.raises(ConfigError, match="--extrapolate"):
        answer(Question(**SMALL | {"gpu": "A100-80"}))
