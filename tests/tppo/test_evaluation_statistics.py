"""avg@n, pass@k, maj@k and their intervals, against slow twins that list every subset."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiling.errors import InputError
from tppo.data.problem import Problem
from tppo.evaluation.graded import Graded, validation_metrics, validation_names
from tppo.evaluation.statistics import (
    SUBSETS,
    bootstrap,
    majority_at_k,
    pass_at_k,
    sizes,
    standard_error,
    subsets,
    summarise,
)
from tppo.evaluation.votes import votes
from tppo.rewards.final_answer import FinalAnswer
from tppo.rewards.protocol import AnswerReader


def passes_in_every_subset(correct, k):
    drawn = list(combinations(correct, k))
    return sum(any(subset) for subset in drawn) / len(drawn)


def vote_in_every_subset(correct, answers, k):
    """Mean over subsets of the mean correctness of the answers that got most votes."""
    total, drawn = 0.0, list(combinations(range(len(answers)), k))
    for subset in drawn:
        votes = {}
        for i in subset:
            if answers[i] is not None:
                votes[answers[i]] = votes.get(answers[i], 0) + 1
        tied = [answer for answer, count in votes.items() if count == max(votes.values())]
        worth = []
        for answer in tied:
            of_it = [correct[i] for i in range(len(answers)) if answers[i] == answer]
            worth.append(sum(of_it) / len(of_it))
        total += sum(worth) / len(worth) if worth else 0.0
    return total / len(drawn)


def test_pass_at_k_by_hand():
    # n = 4, c = 1: a pair holds the one correct response in 3 of 6 pairs; n = 4, c = 2: C(2,2) = 1 pair misses both
    # of 6, so 5/6; c = 3: no pair of one wrong response, so 1
    assert pass_at_k(np.array([0, 1, 2, 3, 4]), 4, 2).tolist() == pytest.approx([0, 1 / 2, 5 / 6, 1, 1])
    # k = 1 is the share of correct responses; k = n is whether there is any
    assert pass_at_k(np.array([0, 1, 2, 3, 4]), 4, 1).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert pass_at_k(np.array([0, 1, 4]), 4, 4).tolist() == [0, 1, 1]


def test_majority_by_hand():
    # votes 7: 2, 3: 1  ->  7 wins, and is right
    # 7 and 3 tie with one vote each  ->  half
    # the vote is wrong although one response is right
    # nobody has an answer  ->  0
    answers = [["7", "3", "7"], ["7", "3", None], ["3", "3", "7"], [None, None, None]]
    correct = np.array([[True, False, True], [True, False, False], [False, False, True], [False] * 3])
    assert majority_at_k(correct, answers, 3).tolist() == [1.0, 0.5, 0.0, 0.0]
    # k = 2 of 7, 3, 7: {7,3} and {3,7} tie, {7,7} wins  ->  (1/2 + 1/2 + 1) / 3
    # of 7, 3, none: {7,3} ties, {7,none} wins, {3,none} loses  ->  (1/2 + 1 + 0) / 3
    # of 3, 3, 7: {3,3} loses, twice a tie  ->  (0 + 1/2 + 1/2) / 3
    assert majority_at_k(correct, answers, 2).tolist() == pytest.approx([2 / 3, 1 / 2, 1 / 3, 0])


rows = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.lists(st.sampled_from(["1", "2", "3", None]), min_size=n, max_size=n),
        st.integers(1, n),
    )
)


@given(rows)
@settings(max_examples=150, deadline=None)
def test_pass_and_vote_are_the_mean_over_every_subset(row):
    correct, answers, k = row
    table = np.array([correct])
    assert pass_at_k(table.sum(1), len(correct), k)[0] == pytest.approx(passes_in_every_subset(correct, k))
    assert majority_at_k(table, [answers], k)[0] == pytest.approx(vote_in_every_subset(correct, answers, k))


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_pass_at_k_is_exact_where_binomials_are_huge(samples, data):
    right = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    exact = 1 - comb(samples - right, k) / comb(samples, k)  # integers of any size, one division
    assert pass_at_k(np.array([right]), samples, k)[0] == pytest.approx(exact, abs=1e-12)


def test_a_vote_among_many_subsets_is_close_to_the_exact_one_and_repeats():
    # n = 14, k = 4: C(14, 4) = 1001 subsets, one too many to list; the twin lists them all
    rng = np.random.default_rng(0)
    answers = [[str(value) for value in rng.integers(0, 4, 14)] for _ in range(20)]
    correct = np.array([[answer == "1" for answer in row] for row in answers])
    exact = np.array([vote_in_every_subset(c, a, 4) for c, a in zip(correct.tolist(), answers, strict=True)])
    assert comb(14, 4) > SUBSETS
    found = majority_at_k(correct, answers, 4)
    assert np.abs(found - exact).max() < 4 * 0.5 / SUBSETS**0.5  # four standard errors at most
    assert found.tolist() == majority_at_k(correct, answers, 4).tolist()
    assert found.tolist() != majority_at_k(correct, answers, 4, seed=1).tolist()


def test_random_subsets_have_the_size_asked_for_and_favour_nobody():
    drawn = subsets(14, 4, 0)
    assert drawn.shape == (SUBSETS, 14)
    assert (drawn.sum(1) == 4).all()
    # a response is in 4/14 of the subsets; four standard errors of 1,000 draws are 0.057
    assert np.abs(drawn.mean(0) - 4 / 14).max() < 0.057


@pytest.mark.parametrize("k", [0, -1, 5])
def test_a_k_that_is_no_number_of_the_samples_is_named(k):
    with pytest.raises(InputError, match=f"k = {k}: must lie between 1 and the 4 samples"):
        pass_at_k(np.array([1]), 4, k)
    with pytest.raises(InputError, match=f"k = {k}: must lie between 1 and the 2 samples"):
        majority_at_k(np.ones((1, 2), dtype=bool), [["1", "1"]], k)


def test_sizes_are_powers_of_two_and_all():
    assert [sizes(n) for n in (1, 2, 6, 32)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32]]


def test_the_bootstrap_interval_covers_as_often_as_it_says():
    # The mean of 40 problems, each solved with a probability of its own, mean 1/2: the true mean is 0.5
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        values = (rng.random((40, 4)) < rng.random((40, 1))).mean(1)
        (low,), (high,) = bootstrap(values[None], resamples=1000, seed=trial)
        hits += low <= 0.5 <= high
    # the percentile interval of 40 problems covers 94.4 % (1,500 trials); four standard errors of 300 are 5 points
    assert 0.89 <= hits / 300 <= 0.99


def test_the_bootstrap_draws_problems_whatever_the_block(monkeypatch):
    values = np.array([[0.0, 1.0, 0.25, 0.5, 0.75], [1.0] * 5])
    low, high = bootstrap(values)
    # slow twin: one resample after the other
    rng = np.random.default_rng(5)
    means = sorted(rng.choice(values[0], 5).mean() for _ in range(20_000))
    assert low[0] == pytest.approx(means[499], abs=0.03)
    assert high[0] == pytest.approx(means[19_499], abs=0.03)
    assert (low[1], high[1]) == (None, None)  # every problem has the same value
    monkeypatch.setattr("tppo.evaluation.statistics.BLOCK_DRAWS", 35)  # blocks of seven resamples
    assert bootstrap(values)[0][0] == pytest.approx(low[0], abs=0.05)


def test_one_problem_or_problems_that_do_not_differ_have_no_interval():
    alike = summarise(np.array([[True, False], [False, True], [True, False]]), [["7", "3"]] * 3)
    assert (alike["avg@2"].low, alike["avg@2"].high, alike["avg@2"].value) == (None, None, 0.5)
    found = summarise(np.array([[True, False]]), [["7", "3"]])
    assert all((estimate.low, estimate.high) == (None, None) for estimate in found.values())
    assert found["avg@2"].value == 0.5


def test_the_summary_names_every_metric_and_leaves_votes_without_answers_null():
    correct = np.array([[True, False, True, True], [False, False, False, True]])
    found = summarise(correct, [["7", "3", "7", "7"], ["1", "1", None, "2"]])
    assert list(found) == ["avg@4", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4"]
    # shares 3/4 and 1/4; some response is right in both; the vote is right in the first
    assert (found["avg@4"].value, found["pass@4"].value, found["maj@4"].value) == (0.5, 1.0, 0.5)
    assert found["avg@4"].value == found["pass@1"].value
    # two problems: a resample holds either twice (1/4 each) or both (1/2)
    assert (found["avg@4"].low, found["avg@4"].high) == (0.25, 0.75)
    unread = summarise(correct, [[None] * 4] * 2)
    assert (unread["maj@2"], unread["maj@4"]) == (None, None)
    assert unread["pass@2"] == found["pass@2"]


def test_the_standard_error_is_that_of_a_share_or_of_shares():
    # 1 of 4 right, one sample: sqrt(1/4 3/4 / 4);  shares 1/2 and 0 of two samples: deviation 1/4, / sqrt(2)
    assert standard_error(np.array([[True], [False], [False], [False]])) == (3 / 64) ** 0.5
    assert standard_error(np.array([[True, False], [False, False]])) == pytest.approx(0.25 / 2**0.5)


def graded(samples):
    correct = np.zeros((3, samples), dtype=bool)
    correct[0] = True
    lengths = np.arange(3 * samples).reshape(3, samples)
    return Graded(lengths, correct, ~correct, correct, [["7"] * samples] * 3)


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_a_row_of_metrics_has_the_names_that_other_rows_leave_null(samples):
    assert sorted(validation_metrics(graded(samples))) == sorted(validation_names(samples))


def test_one_sample_records_no_copies_of_the_accuracy():
    # lengths 0, 1, 2; one right of three; two of three hit the maximum
    assert validation_metrics(graded(1)) == {
        "val/accuracy": 1 / 3,
        "val/accuracy_stderr": pytest.approx((2 / 27) ** 0.5),
        "val/response_length/mean": 1.0,
        "val/response_length/clip_ratio": 2 / 3,
    }


@given(st.text(alphabet="#$0123:;a", max_size=8), st.integers(0, 19))
def test_a_read_answer_is_the_right_one_where_the_response_is_right(response, number):
    reward = FinalAnswer()
    assert isinstance(reward, AnswerReader)
    (answer,) = reward.answers([response])
    (grade,) = reward.grade([Problem("", str(number))], [response])
    assert grade.correct == (answer == str(number))


class Ranks:
    """Both of two, one after the other."""

    rank, world = 0, 2

    def everyones(self, work):
        parts = [work()]
        self.rank = 1
        return [*parts, work()]


class IgnoresCase(FinalAnswer):
    def alike(self, answers):
        return [[next(a for a in own if a.lower() == b.lower()) for b in own] for own in answers]


def test_ranks_share_the_problems_whose_answers_are_compared():
    given = [["a", "A", None], ["b", "c", "b"], ["D", "e", "d"], [None, None, None], ["F", "f", "g"]]
    # the right ones of the second problem are one whatever the reward says: b, c
    correct = np.array([[False] * 3, [True] * 3, [False] * 3, [False] * 3, [False] * 3])
    wanted = [["a", "a", None], ["b", "b", "b"], ["D", "e", "D"], [None] * 3, ["F", "F", "g"]]
    assert votes(given, correct, IgnoresCase(), Ranks()) == votes(given, correct, IgnoresCase()) == wanted


def test_answers_of_the_arithmetic_task_are_read():
    responses = ["a1b2:3;#3$", "#7$", "b2:3;", "#$", "#7", "#1$#2$", "#7$\n"]
    assert FinalAnswer().answers(responses) == ["3", "7", None, None, None, "2", None]
