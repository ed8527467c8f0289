"""Sample reuse as GePPO does it (arXiv 2111.00072; authors' code jqueeney/geppo)."""

from functools import lru_cache

import numpy as np
from scipy.optimize import minimize

NEGLIGIBLE = 0.01
"""Weights below this are dropped and the others scaled up (the authors' `truncate`), which may exceed a bound by as
little."""


@lru_cache
def reuse_weights(batches_per_on_policy: int, *, oldest: int = 20, tradeoff: float = 1.0) -> np.ndarray:
    """Weights nu_i of the batches of i = 0, 1, ... steps ago, and with their number M how many are kept.

    B = batches_per_on_policy: PPO's batch holds as many samples as B of GePPO's. Minimise

        tradeoff x sum_i nu_i^2 / (1/B - best) + (1 - tradeoff) x sum_i (i + 1) nu_i / (B - best)

    (variance against mean age, each over its range) with sum nu = 1, nu >= 0, sum (i + 1) nu <= B and
    sum nu^2 <= 1/B: an update moves the policy no further and a batch is worth no less than PPO's (Section 4.3).
    tradeoff = 1 and B = 2 give 0.4, 0.3, 0.2, 0.1. Raises ValueError for B < 1 or a tradeoff outside [0, 1].
    """
    if batches_per_on_policy < 1 or not 0 <= tradeoff <= 1:
        raise ValueError(f"batches_per_on_policy = {batches_per_on_policy}, tradeoff = {tradeoff}: out of range")
    if batches_per_on_policy == 1:
        return np.ones(1)
    if 0 < tradeoff < 1:
        age = np.arange(1, oldest + 1)
        least_age = float(age @ _solve(batches_per_on_policy, oldest, 0.0, 1.0))
        least_variance = float((_solve(batches_per_on_policy, oldest, 1.0, 0.0) ** 2).sum())
        variance_scale = tradeoff / (1 / batches_per_on_policy - least_variance)
        age_scale = (1 - tradeoff) / (batches_per_on_policy - least_age)
    else:
        variance_scale, age_scale = tradeoff, 1 - tradeoff
    weights = _solve(batches_per_on_policy, oldest, variance_scale, age_scale)
    weights = weights[weights > NEGLIGIBLE]
    return weights / weights.sum()


def _solve(batches: int, oldest: int, variance_scale: float, age_scale: float) -> np.ndarray:
    age = np.arange(1, oldest + 1)
    start = np.where(age <= 2 * batches - 1, 1 / (2 * batches - 1), 0.0)  # uniform, mean age B: feasible
    found = minimize(
        lambda nu: variance_scale * nu @ nu + age_scale * age @ nu,
        start,
        jac=lambda nu: 2 * variance_scale * nu + age_scale * age,
        bounds=[(0, 1)] * oldest,
        constraints=[
            {"type": "eq", "fun": lambda nu: nu.sum() - 1, "jac": lambda nu: np.ones(oldest)},
            {"type": "ineq", "fun": lambda nu: batches - age @ nu, "jac": lambda nu: -age.astype(float)},
            {"type": "ineq", "fun": lambda nu: 1 / batches - nu @ nu, "jac": lambda nu: -2 * nu},
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    return found.x


def clip_width(ppo_width: float, weights: np.ndarray) -> float:
    """eps = eps_PPO / E_nu[i + 1]: the total change against every reused policy stays that of PPO (Section 4.2)."""
    return ppo_width / float(np.arange(1, len(weights) + 1) @ weights)


def next_learning_rate(lr: float, total_variation: float, epsilon: float, factor: float = 1.03) -> float:
    """lr / factor when the step moved the policy by more than eps / 2 in total variation, else lr (Section 4.4).

    total_variation: 0.5 E_nu |rho - rho_0| over the step's tokens, after the step.
    """
    return lr / factor if total_variation > epsilon / 2 else lr
