"""How far the engine's log-probabilities are from the trainer's, for the same tokens under the same weights: other
kernels, other precision, stale keys and values. Names as in verl."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tppo.algorithms.objectives import k1_kl, k3_kl


def mismatch_metrics(rollout: Float[Tensor, " tokens"], trainer: Float[Tensor, " tokens"]) -> dict[str, float | None]:
    """Of tokens that the policy at the start of the step sampled itself; null when there are none (asynchronous).

    kl and k3_kl: per token, estimates of KL(rollout, trainer) and KL(trainer, rollout). Unit: nats.
    """
    names = ("log_prob_diff_mean", "log_prob_diff_max", "kl", "k3_kl", "tokens")
    if not len(rollout):
        return dict.fromkeys([f"rollout_corr/{name}" for name in names[:-1]]) | {"rollout_corr/tokens": 0}
    difference = (trainer - rollout).abs()
    values = (
        difference.mean().item(),
        difference.max().item(),
        k1_kl(trainer, rollout).mean().item(),
        k3_kl(trainer, rollout).mean().item(),
        len(rollout),
    )
    return {f"rollout_corr/{name}": value for name, value in zip(names, values, strict=True)}


def importance_weights(
    old: Float[Tensor, "rows time"], behaviour: Float[Tensor, "rows time"], cap: float
) -> Float[Tensor, "rows time"]:
    """Truncated importance sampling: min(pi_old / pi_rollout, cap), per token; cap 0: all 1 (IMPALA's rho-bar, arXiv
    1802.01561; verl's `rollout_is`, token level)."""
    if cap == 0:
        return torch.ones_like(old)
    return (old - behaviour).clamp(max=math.log(cap)).exp()
