"""How far the policy's advantages look ahead."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def length_adaptive_lambda(
    response_tokens: Int[Tensor, " rows"],
    finished: Bool[Tensor, " rows"],
    *,
    window: int,
    alpha: float = 0.05,
    floor: float = 0.0,
) -> Float[Tensor, " rows"]:
    """lam = 1 - 1 / (alpha len), at least `floor` (VAPO, arXiv 2504.05118, Eq. 8; floor 0.95 in T-PPO's port).

    len = response tokens so far over all windows, plus window / 2 for a truncated row (port of T-PPO to verl,
    PR 3728: what is still to come is not known). alpha = 0.05 belongs to a maximum of 24,576 tokens; keep
    alpha times the maximum (1,229) at another maximum, or the floor hides the feature.
    """
    length = response_tokens + torch.where(finished, 0.0, window / 2)
    return (1.0 - 1.0 / (alpha * length.clamp(min=1))).clamp(min=floor)
