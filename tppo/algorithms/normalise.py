"""How raw advantages are centred, scaled and bounded. Masked tokens get 0."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tppo.algorithms.masks import zero_unless

ROUNDING = 1e-6
"""A spread below this share of the mean is what float32 leaves of equal numbers."""


def whiten(
    advantages: Float[Tensor, "rows time"], mask: Bool[Tensor, "rows time"], epsilon: float = 1e-8
) -> Float[Tensor, "rows time"]:
    """Zero mean and unit variance over the unmasked tokens.

    With fewer than two unmasked tokens, or all of them equal but for rounding, everything is 0.
    """
    tokens = mask.sum()
    if tokens == 0:
        return torch.zeros_like(advantages)
    mean = zero_unless(mask, advantages).sum() / tokens
    centred = zero_unless(mask, advantages - mean)
    scale = (centred * centred).sum().div(tokens).sqrt()
    scale = torch.where(scale > ROUNDING * mean.abs(), scale, torch.inf)
    return centred / (scale + epsilon)


def normalise_reused(
    advantages: Float[Tensor, "rows time"],
    mask: Bool[Tensor, "rows time"],
    importance: Float[Tensor, "rows time"],
    epsilon: float = 1e-8,
) -> Float[Tensor, "rows time"]:
    """(A - mean) / scale for tokens that older policies sampled (GePPO, authors' code; arXiv 2111.00072, Appendix B).

        mean  = sum importance A / sum importance
        scale = standard deviation of importance x A

    importance = rho_0 x weight: pi_k / pi_{k-i} times the batch's weight, averaging 1 over tokens. Advantages that are
    equal but for rounding become 0.
    """
    picked, weight = advantages[mask], importance[mask]
    if picked.numel() == 0:
        return torch.zeros_like(advantages)
    mean = (weight * picked).sum() / weight.sum().clamp(min=epsilon)
    scale = (weight * picked).std(correction=0).nan_to_num()
    spread = (picked - mean).abs().max()
    scale = torch.where(spread > ROUNDING * mean.abs(), scale, torch.inf)
    return torch.where(mask, (advantages - mean) / (scale + epsilon), 0.0)


def clamp(advantages: Float[Tensor, "rows time"], bound: float) -> Float[Tensor, "rows time"]:
    """Hold advantages within +-bound (10 in T-PPO's port, verl PR 3728); 0: no bound."""
    return advantages.clamp(-bound, bound) if bound > 0 else advantages
