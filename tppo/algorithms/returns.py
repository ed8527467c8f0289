"""Targets of the value model. Unit: reward."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def monte_carlo_returns(
    terminal_rewards: Float[Tensor, " rows"], mask: Bool[Tensor, "rows time"], gamma: float = 1.0
) -> Float[Tensor, "rows time"]:
    """Return of a finished row from each token on: gamma^(tokens left) times its terminal reward (lambda = 1).

    Masked tokens get 0.
    """
    later = mask.flip(1).cumsum(1).flip(1) - 1  # (rows, time): unmasked tokens after this one
    return torch.where(mask, terminal_rewards[:, None] * gamma ** later.clamp(min=0).float(), 0.0)


def vtrace_returns(
    advantages: Float[Tensor, "rows time"],
    values: Float[Tensor, "rows time"],
    ratios: Float[Tensor, "rows time"],
    c_bar: float = 1.0,
) -> Float[Tensor, "rows time"]:
    """V(s_t) + c_t A_t with c_t = min(c_bar, ratios_t) (GePPO, arXiv 2111.00072; V-trace, 1802.01561, Eq. 1)."""
    return values + ratios.clamp(max=c_bar) * advantages
