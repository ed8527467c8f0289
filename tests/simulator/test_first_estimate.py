"""The first estimate of an option against the whole one."""

import pytest

from simulator.plan import Question
from simulator.plan.estimate import estimate
from simulator.plan.first import first_estimate
from simulator.plan.options import options_of

SCHEDULES = ("synchronous", "truncated", "oversample", "asynchronous", "in_flight")


@pytest.mark.parametrize("gpus", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_a_first_estimate_is_near_the_whole_one(gpus):
    question = Question(
        model="Qwen2.5-0.5B", gpu="H100-SXM", gpus=(gpus,), steps=10, schedules=SCHEDULES, windows=(4000,),
        prompts_per_step=256, max_response_tokens=12000, mean_tokens=4000,
    )  # fmt: skip
    for option in options_of(question):
        (first, _), whole = first_estimate(option), estimate(option)
        assert first.step_s == pytest.approx(whole.step_s, rel=0.1)
        assert first.training_s == pytest.approx(whole.training_s, rel=0.1)
        assert first.finished_rows == pytest.approx(whole.finished_rows, rel=0.1)
        assert first.trained_tokens == pytest.approx(whole.trained_tokens, rel=0.1)
        assert sum(first.gpu_seconds.values()) == pytest.approx(sum(whole.gpu_seconds.values()), rel=0.25)
        assert first.idle_share == pytest.approx(whole.idle_share, abs=0.1)
        assert first.processed_pairs == pytest.approx(whole.processed_pairs, rel=0.15)


def test_a_first_estimate_of_one_engine_is_of_all_of_its_rows():
    question = Question(
        model="Qwen2.5-0.5B", gpu="H100-SXM", gpus=(1,), steps=10, schedules=("synchronous",), prompts_per_step=8,
        samples_per_prompt=4, max_response_tokens=2000, mean_tokens=700,
    )  # fmt: skip
    (option,) = options_of(question)
    first, played = first_estimate(option)
    assert first.finished_rows == played.rollouts.finished.sum() == 32


def test_rewards_are_graded_as_fast_as_in_the_whole():
    # 128 x 16 rows, 64 workers: 32 rounds of 2 s; of half the rows by half the workers as many.
    question = Question(
        model="Qwen2.5-0.5B", gpu="H100-SXM", gpus=(8,), steps=10, schedules=("synchronous",), prompts_per_step=128,
        max_response_tokens=2000, mean_tokens=700, reward_p50_s=2.0, reward_p90_s=2.0,
    )  # fmt: skip
    (option,) = options_of(question)
    (first, _), whole = first_estimate(option), estimate(option)
    assert first.other_s == pytest.approx(whole.other_s, rel=1e-6)
