"""Advantage estimates. Shapes: rows = responses, time = tokens of the window. Unit: reward."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def last_valid(values: Float[Tensor, "rows time"], mask: Bool[Tensor, "rows time"]) -> Float[Tensor, " rows"]:
    """Each row's value at its last unmasked token; 0 for a row without one."""
    time = values.shape[1]
    index = torch.where(mask, torch.arange(time, device=mask.device), -1).amax(dim=1)  # (rows,)
    picked = values.gather(1, index.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(index >= 0, picked, 0.0)


def egae(
    rewards: Float[Tensor, "rows time"],
    values: Float[Tensor, "rows time"],
    mask: Bool[Tensor, "rows time"],
    finished: Bool[Tensor, " rows"],
    *,
    gamma: float = 1.0,
    lam: float | Float[Tensor, " rows"] = 0.95,
) -> Float[Tensor, "rows time"]:
    """Extended GAE: advantages over one window; unfinished rows bootstrap (T-PPO, arXiv 2506.15050, Eq. 6).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lam A_{t+1},  A_l = 0
        V(s_l)  = 0 if finished, else V(s_{l-1})

    Masked tokens get 0 and pass the sum through, so what stands in padding never changes a result.
    """
    values = torch.where(mask, values, 0.0)
    next_value = torch.where(finished, 0.0, last_valid(values, mask))  # (rows,)
    advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(here, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(here, values[:, t], next_value)
        columns.append(torch.where(here, advantage, 0.0))
    if not columns:
        return torch.zeros_like(values)
    return torch.stack(columns[::-1], dim=1)  # (rows, time)


def gae(
    rewards: Float[Tensor, "rows time"],
    values: Float[Tensor, "rows time"],
    mask: Bool[Tensor, "rows time"],
    *,
    gamma: float = 1.0,
    lam: float | Float[Tensor, " rows"] = 0.95,
) -> Float[Tensor, "rows time"]:
    """Generalised advantage estimate of rows that ran to their end (arXiv 1506.02438, Eq. 16).

    It is EGAE with every row finished; the value after the last token is 0.
    """
    finished = torch.ones(rewards.shape[0], dtype=torch.bool, device=rewards.device)
    return egae(rewards, values, mask, finished, gamma=gamma, lam=lam)


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


def whiten(
    advantages: Float[Tensor, "rows time"], mask: Bool[Tensor, "rows time"], epsilon: float = 1e-8
) -> Float[Tensor, "rows time"]:
    """Zero mean and unit variance over the unmasked tokens; masked tokens get 0.

    With fewer than two unmasked tokens, or all of them equal, only the mean is taken off.
    """
    picked = advantages[mask]
    if picked.numel() == 0:
        return torch.zeros_like(advantages)
    scale = picked.std(correction=0).nan_to_num() + epsilon
    return torch.where(mask, (advantages - picked.mean()) / scale, 0.0)


def monte_carlo_returns(
    terminal_rewards: Float[Tensor, " rows"], mask: Bool[Tensor, "rows time"], gamma: float = 1.0
) -> Float[Tensor, "rows time"]:
    """Return of a finished row from each token on: gamma^(tokens left) times its terminal reward (lambda = 1).

    Masked tokens get 0.
    """
    later = mask.flip(1).cumsum(1).flip(1) - 1  # (rows, time): unmasked tokens after this one
    return torch.where(mask, terminal_rewards[:, None] * gamma ** later.clamp(min=0).float(), 0.0)
