"""Policy and value objectives on flattened tokens, float32. A loss is a sum of token losses times token weights
(tppo.algorithms.aggregation). pi: the policy in training; behaviour: the one that sampled the token."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8 is finite in float32; beyond it a ratio is meaningless and would overflow."""

MAX_IMPORTANCE = 100.0
"""Bound of pi / pi_behaviour in the decoupled objective, a guard (PPO-EWMA's `imp_samp_max`)."""


@dataclass(frozen=True)
class PolicyLoss:
    """`loss` carries the gradient; the rest has none."""

    loss: Float[Tensor, ""]
    clipped_low: Float[Tensor, ""]
    """Tokens held at the lower bound: a bad token already made unlikely enough."""
    clipped_high: Float[Tensor, ""]
    """Tokens held at the upper bound."""
    ratio_max: Float[Tensor, ""]
    """Largest ratio to the policy that the trust region stands around."""


def ratio_of(log_probs: Float[Tensor, " tokens"], reference: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """exp(log pi - log pi_reference), the plain difference, held finite."""
    return (log_probs - reference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_loss(
    log_probs: Float[Tensor, " tokens"],
    behaviour: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    clip: tuple[float, float],
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate (PPO, arXiv 1707.06347, Eq. 7), with separate lower and upper widths (DAPO, 2503.14476).

        r = pi / pi_behaviour
        L = - sum_t w_t min(r A, clip(r, 1 - low, 1 + high) A)

    dual_clip c > 1 bounds the term below by c A where A < 0 (arXiv 1912.09729).
    """
    ratio = ratio_of(log_probs, behaviour)
    low, high = clip
    return _surrogate(ratio, ratio.clamp(1 - low, 1 + high), advantages, weights, dual_clip)


def decoupled_loss(
    log_probs: Float[Tensor, " tokens"],
    proximal: Float[Tensor, " tokens"],
    behaviour: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    clip: tuple[float, float],
    max_importance: float = MAX_IMPORTANCE,
) -> PolicyLoss:
    """The trust region stands around a proximal policy of its own (PPO-EWMA, arXiv 2110.00641, Eq. 2).

        r = pi / pi_proximal
        L = - sum_t w_t (pi_proximal / pi_behaviour) min(r A, clip(r, 1 - low, 1 + high) A)

    pi_behaviour is raised where pi / pi_behaviour would exceed `max_importance`, as the authors' code does.
    """
    held = torch.maximum(behaviour, log_probs.detach() - torch.tensor(max_importance).log())
    ratio = ratio_of(log_probs, proximal)
    low, high = clip
    importance = ratio_of(proximal, held)
    return _surrogate(ratio, ratio.clamp(1 - low, 1 + high), advantages, weights * importance, None)


def additive_clip_loss(
    log_probs: Float[Tensor, " tokens"],
    current: Float[Tensor, " tokens"],
    behaviour: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    epsilon: float,
) -> PolicyLoss:
    """Generalised clipping for reused samples (GePPO, arXiv 2111.00072, Eq. 12).

        rho = pi / pi_{k-i},  rho_0 = pi_k / pi_{k-i}
        L   = - sum_t w_t min(rho A, clip(rho, rho_0 - eps, rho_0 + eps) A)

    current: log-probabilities under pi_k, the policy at the start of the step; behaviour: under pi_{k-i}.
    """
    ratio, centre = ratio_of(log_probs, behaviour), ratio_of(current, behaviour)
    result = _surrogate(ratio, ratio.clamp(centre - epsilon, centre + epsilon), advantages, weights, None)
    return replace(result, ratio_max=_largest(ratio_of(log_probs.detach(), current)))


def _surrogate(
    ratio: Float[Tensor, " tokens"],
    held: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    dual_clip: float | None,
) -> PolicyLoss:
    objective = torch.minimum(ratio * advantages, held * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    with torch.no_grad():
        low = ((held > ratio) & (advantages < 0)).sum().float()
        high = ((held < ratio) & (advantages > 0)).sum().float()
        largest = _largest(ratio)
    return PolicyLoss(-(weights * objective).sum(), low, high, largest)


def _largest(ratio: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
    return ratio.max() if ratio.numel() else ratio.new_zeros(())


def k1_kl(log_probs: Float[Tensor, " tokens"], behaviour: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """log pi_behaviour - log pi: its mean over sampled tokens estimates KL(pi_behaviour, pi) without bias."""
    return behaviour - log_probs


def k3_kl(log_probs: Float[Tensor, " tokens"], reference: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """r - 1 - log r with r = pi_reference / pi: never negative; its mean estimates KL(pi, pi_reference)
    (Schulman, "Approximating KL divergence", 2020; used as a penalty by GRPO, arXiv 2402.03300, Eq. 4)."""
    difference = (reference - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - 1 - difference


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
