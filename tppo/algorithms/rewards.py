"""What is done to verifier rewards before they become advantages."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tppo.algorithms.normalise import ROUNDING


def overlong_penalty(
    response_tokens: Int[Tensor, " rows"], *, max_response_tokens: int, cache_tokens: int
) -> Float[Tensor, " rows"]:
    """0 up to L - cache, then falling linearly to -1 at L (soft overlong punishment, DAPO, arXiv 2503.14476, Eq. 13).

    cache_tokens = 0: no penalty. Unit: reward, added to the verifier's.
    """
    if cache_tokens == 0:
        return torch.zeros(response_tokens.shape, device=response_tokens.device)
    over = response_tokens.float() - (max_response_tokens - cache_tokens)
    return -(over / cache_tokens).clamp(0.0, 1.0)


def group_relative(
    rewards: Float[Tensor, " rows"], group: Int[Tensor, " rows"], *, epsilon: float = 1e-6
) -> Float[Tensor, " rows"]:
    """(r - mean) / (std + epsilon) over the rows that answer the same prompt; one advantage for a whole response
    (GRPO, arXiv 2402.03300; DAPO, 2503.14476, Eq. 9). std divides by n - 1, as in TRL and verl; a group of one row,
    or of rewards equal but for rounding, gets 0."""
    _, index = group.unique(return_inverse=True)  # (rows,)
    rewards = rewards.double()  # so that a large group of equal rewards is still seen to be equal
    count = _sums(torch.ones_like(rewards), index)
    mean = _sums(rewards, index) / count
    centred = rewards - mean[index]
    std = (_sums(centred**2, index) / (count - 1).clamp(min=1)).sqrt()
    std = torch.where(std > ROUNDING * mean.abs(), std, torch.inf)
    return (centred / (std[index] + epsilon)).float()


def informative_groups(right: Bool[Tensor, " rows"], group: Int[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
    """Rows whose group has both right and wrong answers; the others have no group-relative advantage and are sampled
    again (dynamic sampling, DAPO, arXiv 2503.14476, Eq. 11). `right`: before any shaping of the reward."""
    _, index = group.unique(return_inverse=True)
    count, wins = _sums(torch.ones_like(right, dtype=torch.float), index), _sums(right.float(), index)
    return ((wins > 0) & (wins < count))[index]


def _sums(values: Float[Tensor, " rows"], index: Int[Tensor, " rows"]) -> Float[Tensor, " groups"]:
    """Sum of `values` per group; `index` counts groups from 0."""
    groups = int(index.max()) + 1 if len(index) else 0
    return values.new_zeros(groups).index_add(0, index, values)
