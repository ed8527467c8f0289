"""Distributions of lengths against their formulas, and what rows share."""

import numpy as np
import pytest
from scipy.stats import kstest, spearmanr

from profiling.errors import ConfigError
from simulator import load_experiment
from simulator.workload import RowSource

N = 200_000


def source(lengths, **workload):
    values = {
        "workload": {
            "steps": 1, "prompts_per_step": 10, "max_response_tokens": 10**9, "response_tokens": lengths, **workload,
        },
        "schedule": {"kind": "synchronous"},
    }  # fmt: skip
    return RowSource(load_experiment(values).workload)


def drawn(lengths, **workload):
    return source(lengths, **workload).rows(0, N).response_tokens


@pytest.mark.parametrize(
    ("lengths", "law"),
    [
        ({"kind": "gamma", "mean": 3000.0, "shape": 2.0}, ("gamma", (2.0, 0, 1500.0))),
        ({"kind": "gamma", "mean": 3000.0, "shape": 1.0}, ("expon", (0, 3000.0))),
        ({"kind": "pareto", "minimum": 500.0, "alpha": 1.5}, ("pareto", (1.5, 0, 500.0))),
        ({"kind": "lognormal", "mean": 3000.0, "sigma": 0.5}, ("lognorm", (0.5, 0, 3000.0 * np.exp(-0.125)))),
    ],
)
def test_lengths_follow_their_law(lengths, law):
    name, arguments = law
    values = drawn(lengths)[:20_000] - 0.5  # rounded up
    assert kstest(values, name, arguments).statistic < 1.95 / np.sqrt(20_000) + 0.002  # 0.1 % level, and the rounding


def test_a_mixture_has_its_parts_in_proportion():
    parts = [
        {"weight": 3.0, "lengths": {"kind": "fixed", "value": 100}},
        {"weight": 1.0, "lengths": {"kind": "gamma", "mean": 5000.0, "shape": 400.0}},
    ]
    values = drawn({"kind": "mixture", "parts": parts})
    assert (values == 100).mean() == pytest.approx(0.75, abs=0.005)
    long = values[values != 100]
    assert long.mean() == pytest.approx(5000.5, rel=0.002)
    assert long.std() == pytest.approx(5000 / 20, rel=0.02)  # 400 ** -0.5 = 1 / 20


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_responses_to_one_prompt_correlate_and_keep_their_law(correlation):
    sigma = 0.7
    rows = source(
        {"kind": "lognormal", "mean": 1e6, "sigma": sigma}, samples_per_prompt=4, group_correlation=correlation
    ).rows(0, N)
    scores = (np.log(rows.response_tokens) - np.log(1e6) + sigma**2 / 2) / sigma
    groups = scores.reshape(-1, 4)
    assert np.corrcoef(groups[:, 0], groups[:, 1])[0, 1] == pytest.approx(correlation, abs=0.01)
    assert np.corrcoef(groups[:-1, 0], groups[1:, 0])[0, 1] == pytest.approx(0, abs=0.02)
    assert kstest(groups[:, 2], "norm").statistic < 1.95 / np.sqrt(len(groups)) + 0.002


def test_lengths_drift_with_the_rows_of_each_step():
    # Ten rows a step, 50 % longer each: 100, 150, 225 tokens; rounded up.
    rows = source({"kind": "fixed", "value": 100}, length_growth_per_step=0.5).rows(0, 30).response_tokens
    assert rows.tolist() == [100] * 10 + [150] * 10 + [225] * 10
    later = source({"kind": "fixed", "value": 100}, length_growth_per_step=0.5).rows(20, 3).response_tokens
    assert later.tolist() == [225] * 3  # whatever was drawn before


def test_prompts_have_lengths_of_their_own_shared_by_their_samples(tmp_path):
    table = tmp_path / "lengths.csv"
    table.write_text("prompt,response\n5,50\n7,70\n9,90\n")
    own = {"kind": "empirical", "file": str(table), "column": "prompt"}
    rows = source(
        {"kind": "empirical", "file": str(table), "column": "response"}, samples_per_prompt=2, prompt_lengths=own
    ).rows(0, 7)
    assert rows.prompt_tokens.tolist() == [5, 5, 7, 7, 9, 9, 5]
    assert rows.response_tokens.tolist() == [50, 70, 90, 50, 70, 90, 50]
    law = {"kind": "lognormal", "mean": 300.0, "sigma": 0.4}
    drawn = source(law, samples_per_prompt=2, prompt_lengths=law).rows(0, N)
    assert (drawn.prompt_tokens[::2] == drawn.prompt_tokens[1::2]).all()
    assert drawn.prompt_tokens.mean() == pytest.approx(300.5, rel=0.01)
    assert abs(np.corrcoef(drawn.prompt_tokens[::2], drawn.response_tokens[::2])[0, 1]) < 0.01


def test_swapping_the_law_keeps_the_order_of_the_rows():
    gamma = drawn({"kind": "gamma", "mean": 3e6, "shape": 2.0})
    lognormal = drawn({"kind": "lognormal", "mean": 3e6, "sigma": 0.5})
    assert spearmanr(gamma, lognormal).statistic > 1 - 1e-9


@pytest.mark.parametrize(
    ("lengths", "workload", "message"),
    [
        ({"kind": "mixture", "parts": []}, {}, "workload.response_tokens.parts"),
        ({"kind": "mixture", "parts": [{"weight": 0, "lengths": {"kind": "fixed", "value": 1}}]}, {}, "weight = 0"),
        ({"kind": "pareto", "minimum": 1, "alpha": -1}, {}, "alpha = -1"),
        ({"kind": "gamma", "mean": 5.0}, {}, "missing key 'workload.response_tokens.shape'"),
        ({"kind": "fixed", "value": 5}, {"group_correlation": 0.5}, "lengths of kind 'fixed' are not drawn"),
        ({"kind": "fixed", "value": 5}, {"length_growth_per_step": -1}, "length_growth_per_step = -1"),
        ({"kind": "fixed", "value": 5}, {"group_correlation": 1.5}, "group_correlation = 1.5"),
    ],
)
def test_lengths_that_cannot_be_are_one_line(lengths, workload, message):
    with pytest.raises(ConfigError) as error:
        source(lengths, **workload)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
