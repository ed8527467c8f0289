"""Policy and value objectives, and how token losses become one number. All float32.

A loss is a sum of token losses times token weights; the weights hold the aggregation, so a micro-batch's or a
rank's part needs no knowledge of the others.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Aggregation = Literal["token-mean", "sequence-mean"]

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8 is finite in float32; beyond it a ratio is meaningless and would overflow."""


def token_weights(mask: Bool[Tensor, "rows time"], aggregation: Aggregation) -> Float[Tensor, "rows time"]:
    """Weight of every token of a whole mini-batch; the weights sum to 1, or are all 0 when nothing is unmasked.

    token-mean: 1 / all unmasked tokens. sequence-mean: 1 / (rows with a token x the row's unmasked tokens).
    """
    weights = mask.float()
    if aggregation == "token-mean":
        return weights / weights.sum().clamp(min=1)
    per_row = weights.sum(1, keepdim=True)  # (rows, 1)
    rows = (per_row > 0).sum().clamp(min=1)
    return weights / per_row.clamp(min=1) / rows


@dataclass(frozen=True)
class PolicyLoss:
    """`loss` carries the gradient; the rest are sums over tokens, without gradient."""

    loss: Float[Tensor, ""]
    clipped_tokens: float
    kl_sum: float
    """Sum of log pi_old - log pi_new: the plain (k1) estimate of KL(pi_old, pi_new)."""


def policy_loss(
    log_probs: Float[Tensor, " tokens"],
    old_log_probs: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    clip: tuple[float, float],
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate (PPO, arXiv 1707.06347, Eq. 7), with separate lower and upper widths (DAPO, 2503.14476).

        r = exp(log pi - log pi_old)
        L = - sum_t w_t min(r A, clip(r, 1 - low, 1 + high) A)

    dual_clip c > 1 bounds the term below by c A where A < 0 (arXiv 1912.09729).
    """
    difference = log_probs - old_log_probs
    ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = clip
    clipped = ratio.clamp(1 - low, 1 + high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, bounded, objective)
    with torch.no_grad():
        outside = (clipped * advantages < ratio * advantages).sum().item()
        kl = -difference.sum().item()
    return PolicyLoss(-(weights * objective).sum(), outside, kl)


def value_loss(
    values: Float[Tensor, " tokens"],
    targets: Float[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    old_values: Float[Tensor, " tokens"] | None = None,
    clip: float | None = None,
) -> Float[Tensor, ""]:
    """0.5 sum_t w_t (V - target)^2; with `clip`, the larger of that and the same with V held within `clip` of the
    value stored when the token was first scored (PPO2's value clipping)."""
    error = (values - targets) ** 2
    if clip is not None:
        if old_values is None:
            raise ValueError("value clipping needs the old values")
        held = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (held - targets) ** 2)
    return 0.5 * (weights * error).sum()
