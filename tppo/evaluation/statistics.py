"""From graded responses to numbers: avg@n, pass@k and maj@k, each with an interval over problems. Pure.

Shapes: problems; samples = responses to each problem, n in the formulas.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from profiling.errors import InputError

RESAMPLES = 10_000
"""Of the bootstrap: the ends of a 95 % interval then vary by 0.7 % of its width from seed to seed."""
SUBSETS = 1000
"""Votes that maj@k averages over, where there are more. A problem's error is at most 0.5 / sqrt(1000) = 0.016, and
that of the mean over problems far below its interval."""
CONFIDENCE = 0.95
BLOCK_DRAWS = 4_000_000
"""Problems drawn at once by the bootstrap; bounds its memory (8 bytes each)."""

Answers = Sequence[Sequence[str | None]]
"""(problems, samples): what each response answers; None where no answer can be read."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems. low, high: its 95 % interval; None where the problems do not differ (or there is only
    one): drawing the same again says nothing of others."""

    value: float
    low: float | None
    high: float | None


def summarise(correct: Bool[np.ndarray, "problems samples"], answers: Answers) -> dict[str, Estimate | None]:
    """avg@n; pass@k and maj@k for every k of `sizes(n)`, maj@1 apart (it is pass@1 of the answers that can be read).
    maj@k is None when no response has an answer."""
    samples = correct.shape[1]
    right = correct.sum(1)
    per_problem = {f"avg@{samples}": right / samples}
    per_problem |= {f"pass@{k}": pass_at_k(right, samples, k) for k in sizes(samples)}
    votes = [f"maj@{k}" for k in sizes(samples) if k > 1]
    has_answers = any(answer is not None for row in answers for answer in row)
    if has_answers:
        per_problem |= {name: majority_at_k(correct, answers, int(name[4:])) for name in votes}
    low, high = bootstrap(np.stack(list(per_problem.values())))
    found: dict[str, Estimate | None] = {
        name: Estimate(float(values.mean()), low[i], high[i]) for i, (name, values) in enumerate(per_problem.items())
    }
    return found if has_answers else found | dict.fromkeys(votes)


def sizes(samples: int) -> list[int]:
    """The powers of two up to n, and n."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def pass_at_k(right: Int[np.ndarray, " problems"], samples: int, k: int) -> Float[np.ndarray, " problems"]:
    """The chance that k of a problem's n responses, drawn without replacement, hold a correct one, c of n being
    correct; over models' randomness an unbiased estimate of pass@k (Chen et al., arXiv 2107.03374, Eq. 1).

        1 - C(n - c, k) / C(n, k)  =  1 - prod_{i = n - c + 1}^{n} (1 - k / i)

    The product has no large numbers. Raises InputError unless 1 <= k <= n.
    """
    check_size(k, samples)
    factors = np.maximum(0.0, 1 - k / np.arange(samples, 0, -1))  # of i = n, n - 1, ..., 1
    missed = np.concatenate([[1.0], np.cumprod(factors)])  # (samples + 1,): by c
    return 1 - missed[right]


def majority_at_k(
    correct: Bool[np.ndarray, "problems samples"], answers: Answers, k: int, *, seed: int = 0
) -> Float[np.ndarray, " problems"]:
    """The chance that the most frequent answer among k of a problem's n responses, drawn without replacement, is
    correct. A tie is split evenly among the tied answers; a response without an answer has no vote; without any vote
    the chance is 0. An answer is as correct as its responses are on average.

    The mean over all C(n, k) subsets where there are at most SUBSETS of them (k = n always), else over SUBSETS random
    ones, the same for every problem. Raises InputError unless 1 <= k <= n.
    """
    samples = correct.shape[1]
    check_size(k, samples)
    drawn = subsets(samples, k, seed).astype(np.float32)  # (subsets, samples)
    chances = np.zeros(len(correct))
    for problem, row in enumerate(answers):
        distinct = sorted({answer for answer in row if answer is not None})
        if not distinct:
            continue
        # (samples, distinct): 1 where the response gives the answer
        gives = np.array([[given == answer for answer in distinct] for given in row], dtype=np.float32)
        worth = correct[problem] @ gives / gives.sum(0)  # (distinct,)
        votes = drawn @ gives  # (subsets, distinct)
        most = votes.max(1, keepdims=True)
        winners = (votes == most) & (most > 0)
        chances[problem] = ((winners @ worth) / np.maximum(1, winners.sum(1))).mean()
    return chances


def subsets(samples: int, k: int, seed: int) -> Bool[np.ndarray, "subsets samples"]:
    """Every subset of size k, or SUBSETS random ones where there are more."""
    if math.comb(samples, k) <= SUBSETS:
        chosen = np.array(list(itertools.combinations(range(samples), k)))  # (subsets, k)
        members = np.zeros((len(chosen), samples), dtype=bool)
        np.put_along_axis(members, chosen, True, axis=1)
        return members
    ranks = np.tile(np.arange(samples), (SUBSETS, 1))
    return np.random.default_rng(seed).permuted(ranks, axis=1) < k


def bootstrap(
    per_problem: Float[np.ndarray, "metrics problems"], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[list[float | None], list[float | None]]:
    """Lower and upper ends of each mean's 95 % percentile interval, problems drawn with replacement (Efron 1979).
    All metrics share the draws. None for a metric that is the same for every problem, or with a single one."""
    problems = per_problem.shape[1]
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK_DRAWS // problems)
    means = []
    for first in range(0, resamples, block):
        drawn = rng.integers(0, problems, (min(block, resamples - first), problems), dtype=np.int32)
        offsets = np.arange(len(drawn))[:, None] * problems
        times = np.bincount((drawn + offsets).ravel(), minlength=drawn.size).reshape(drawn.shape)
        means.append(times.astype(np.float64) @ per_problem.T / problems)  # (block, metrics)
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)  # (2, metrics)
    differs = np.ptp(per_problem, axis=1) > 0
    low, high = ([float(end) if known else None for end, known in zip(row, differs, strict=True)] for row in ends)
    return low, high


def standard_error(correct: Bool[np.ndarray, "problems samples"]) -> float:
    """Of avg@n, over problems: the standard deviation of the problems' shares / sqrt(problems)."""
    shares = correct.mean(1)
    mean = float(shares.mean())
    # With one sample the variance is p (1 - p): written so, it has no rounding of a sum.
    variance = mean * (1 - mean) if correct.shape[1] == 1 else float(shares.var())
    return math.sqrt(variance / len(correct))


def check_size(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise InputError(f"k = {k}: must lie between 1 and the {samples} samples of each problem")
