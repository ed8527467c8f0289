import json
import math
import random

import pytest

from profiling.reader import Run
from tppo.guards import GUARDS, GuardsConfig, check, guard_metrics
from tppo.start import train

CALM = {
    "critic/rewards/mean": 0.5, "critic/score/min": 0.0, "critic/score/max": 1.0, "response_length/mean": 100.0,
    "actor/entropy": 0.3, "critic/vf_explained_var": 0.2, "critic/values/min": 0.0, "critic/values/max": 1.0,
    "actor/approx_kl": 0.001, "actor/ratio_max": 2.0, "rollout_corr/kl": 0.001,
}  # fmt: skip
CONFIG = GuardsConfig()


def warnings_of(curves, config=CONFIG, steps=None, memory=None, startup_steps=0, first=1):
    """(step, name, raised) of every change; curves: metric -> values by step, the others are calm."""
    memory, found = memory or {}, []
    steps = steps or len(next(iter(curves.values())))
    for step in range(first, first + steps):
        row = {"step": step, **CALM, **{name: curve[step - first] for name, curve in curves.items()}}
        memory, changes = check(row, memory, config, startup_steps=startup_steps)
        memory = json.loads(json.dumps(memory))  # as a checkpoint keeps it
        found += [(step, change.name, change.raised) for change in changes]
    return found


def names_of(curves, **options):
    return {name for _, name, raised in warnings_of(curves, **options) if raised}


def noisy(mean, sigma, steps, seed=0):
    rng = random.Random(seed)
    return [rng.gauss(mean, sigma) for _ in range(steps)]


def test_a_calm_run_warns_of_nothing():
    assert warnings_of({}, steps=200) == []


def test_a_threshold_is_crossed_for_three_steps_once_and_over_after_three_good_ones():
    # threshold 0.5; 0.45 lies in the margin (0.4 to 0.5): neither bad nor good
    kl = [0.1, 0.6, 0.6, 0.1, 0.6, 0.6, 0.6, 0.6, 0.45, 0.6, 0.1, 0.1, 0.45, 0.1, 0.1, 0.1, 0.6, 0.6, 0.6]
    assert warnings_of({"actor/approx_kl": kl}) == [
        (7, "kl_blow_up", True), (16, "kl_blow_up", False), (19, "kl_blow_up", True)
    ]  # fmt: skip


def test_a_warning_is_one_line_with_step_name_what_was_seen_and_a_remedy():
    memory = {}
    for step in (1, 2, 3):
        memory, changes = check({"step": step, "actor/entropy": 0.004}, memory, CONFIG)
    assert [change.text for change in changes] == [
        "step 3: entropy_collapse: entropy 0.004 nats, threshold 0.005, for 3 steps; raise algorithm.entropy_coef, or "
        "go on from an earlier checkpoint with a lower learning rate"
    ]


@pytest.mark.parametrize(
    ("curves", "name"),
    [
        ({"actor/entropy": [0.3 * 0.8**t for t in range(40)]}, "entropy_collapse"),
        ({"critic/vf_explained_var": [0.2] * 5 + [-5.0] * 5}, "value_divergence"),
        ({"critic/values/max": [1.0] * 5 + [30.0] * 5}, "value_divergence"),
        ({"critic/values/min": [0.0] * 5 + [-30.0] * 5}, "value_divergence"),
        ({"actor/approx_kl": [0.01 * 1.5**t for t in range(20)]}, "kl_blow_up"),
        ({"actor/ratio_max": [3.0] * 5 + [1e6] * 3}, "ratio_explosion"),
        ({"rollout_corr/kl": [0.0] * 5 + [-0.3] * 3}, "engine_mismatch"),  # an estimate may be negative
        ({"response_length/mean": [100.0] * 20 + [5.0] * 20}, "length_collapse"),
        ({"response_length/mean": [100.0 * 1.1**t for t in range(40)]}, "length_explosion"),
        ({"critic/rewards/mean": [min(0.8, 0.02 * t) for t in range(60)] + [0.1] * 20}, "reward_collapse"),
        ({"critic/rewards/mean": [0.7] * 30 + [0.05] * 20}, "reward_collapse"),
        ({"critic/rewards/mean": [-1.0 + 0.05 * t for t in range(30)] + [-1.0] * 20}, "reward_collapse"),
    ],
)
def test_each_guard_sees_its_own_curve_and_no_other_does(curves, name):
    assert names_of(curves) == {name}


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_collapse(seed):
    curves = {
        "critic/rewards/mean": noisy(0.5, 0.1, 500, seed),
        "response_length/mean": [max(1.0, x) for x in noisy(100, 30, 500, seed)],
        "actor/entropy": [abs(x) for x in noisy(0.3, 0.05, 500, seed)],
        "critic/vf_explained_var": noisy(0.0, 0.3, 500, seed),
        "actor/ratio_max": [math.exp(x) for x in noisy(1, 1, 500, seed)],
    }
    assert warnings_of(curves) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_noisy_rise_and_single_bad_steps_are_no_collapse(seed):
    rise = [0.8 * (1 - math.exp(-t / 60)) + x for t, x in enumerate(noisy(0, 0.08, 300, seed))]
    rise[100] = rise[200] = 0.0  # two steps with nothing right
    entropy = [0.001 if t % 5 == 0 else 0.3 for t in range(300)]
    assert warnings_of({"critic/rewards/mean": rise, "actor/entropy": entropy}) == []


def test_a_short_run_has_no_early_mean_to_be_compared_with():
    assert warnings_of({"response_length/mean": [100.0] + [1.0] * 8, "critic/rewards/mean": [1.0] + [0.0] * 8}) == []


def test_lengths_before_the_longest_response_can_have_finished_are_no_measure():
    lengths = [10.0] * 12 + [100.0] * 40  # the first windows hold short responses only
    assert names_of({"response_length/mean": lengths}) == {"length_explosion"}
    assert warnings_of({"response_length/mean": lengths}, startup_steps=12) == []


def test_values_are_compared_with_rewards_only_once_there_was_one():
    rewards = {"critic/score/min": [0.0] * 20, "critic/score/max": [0.0] * 20}
    assert warnings_of({**rewards, "critic/values/max": [0.3] * 20}) == []
    # all rewards alike: there is no variance to explain
    assert warnings_of({**rewards, "critic/vf_explained_var": [-40.0] * 20}) == []


def test_steps_that_tell_nothing_neither_raise_nor_end_a_warning():
    kl = [0.6, None, 0.6, float("nan"), 0.6, None, 0.1, None, 0.1, 0.1]
    assert warnings_of({"actor/approx_kl": kl}) == [(5, "kl_blow_up", True), (10, "kl_blow_up", False)]


def test_a_run_that_is_resumed_warns_as_one_that_is_not():
    rewards = [0.7] * 30 + [0.05] * 20
    whole, memory, parted = warnings_of({"critic/rewards/mean": rewards}), {}, []
    for step, reward in enumerate(rewards, start=1):
        memory, changes = check({"step": step, **CALM, "critic/rewards/mean": reward}, memory, CONFIG)
        parted += [(step, change.name, change.raised) for change in changes]
        memory = json.loads(json.dumps(memory))
    assert parted == whole
    assert len(whole) == 1


def test_what_was_remembered_before_is_not_changed():
    before, _ = check({"step": 1, **CALM}, {}, CONFIG)
    copy = json.loads(json.dumps(before))
    check({"step": 2, **CALM, "critic/rewards/mean": 9.0}, before, CONFIG)
    assert before == copy


def test_a_guard_can_be_switched_off_and_unmeasured_is_null():
    config = GuardsConfig(off=("kl_blow_up",))
    memory, changes = check({"step": 1, "actor/approx_kl": 9.0, "actor/entropy": 0.3}, {}, config)
    assert guard_metrics(memory) == {
        **dict.fromkeys([f"guards/{name}" for name in GUARDS]), "guards/entropy_collapse": 0
    }  # fmt: skip
    assert changes == []


def test_a_run_warns_on_stderr_in_its_trace_and_in_its_metrics_also_after_a_stop(make_config, capsys):
    thresholds = {"entropy_floor": 100.0, "patience": 3}
    train(make_config("whole", train={"steps": 5}, guards=thresholds), show_progress=False)
    shown = [line for line in capsys.readouterr().err.splitlines() if "entropy_collapse" in line]
    assert len(shown) == 1
    assert shown[0].startswith("tppo: warning: step 3: entropy_collapse: entropy ")
    whole = Run(make_config("whole").output)
    assert whole.metrics["guards/entropy_collapse"].tolist()[1:] == [0, 0, 1, 1, 1]
    (note,) = [record for record in whole.trace if record.get("guard") == "entropy_collapse"]
    assert (note["type"], note["step"], note["raised"]) == ("note", 3, True)

    train(make_config("parted", train={"steps": 2}, guards=thresholds), show_progress=False)
    assert "entropy_collapse" not in capsys.readouterr().err
    train(make_config("parted", train={"steps": 5}, guards=thresholds), show_progress=False, resume=True)
    assert [line for line in capsys.readouterr().err.splitlines() if "entropy_collapse" in line] == shown
    parted = Run(make_config("parted").output)
    names = [name for name in whole.metrics if name.startswith("guards/")]
    assert parted.metrics[names].equals(whole.metrics[names])
