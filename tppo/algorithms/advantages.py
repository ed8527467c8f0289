"""Advantage estimates. Shapes: rows = responses, time = tokens of the window. Unit: reward."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tppo.algorithms.masks import zero_unless
from tppo.algorithms.scan import reverse_linear_recurrence, row_chunks


def last_valid(values: Float[Tensor, "rows time"], mask: Bool[Tensor, "rows time"]) -> Float[Tensor, " rows"]:
    """Each row's value at its last unmasked token; 0 for a row without one."""
    rows, time = values.shape
    if time == 0:
        return values.new_zeros(rows)
    places = torch.arange(1, time + 1, dtype=torch.int32, device=mask.device)
    last = (mask * places).amax(dim=1)  # (rows,): counted from 1; 0 without a token
    picked = values.gather(1, (last - 1).clamp(min=0)[:, None].long()).squeeze(1)
    return torch.where(last > 0, picked, 0.0)


def next_unmasked(
    values: Float[Tensor, "rows time"], mask: Bool[Tensor, "rows time"], after: Float[Tensor, " rows"]
) -> Float[Tensor, "rows time"]:
    """At each token the value of the next unmasked token of its row, `after` where none is left."""
    if values.shape[1] == 0:
        return values
    values = zero_unless(mask, values)
    if torch.equal(mask[:, 1:] & mask[:, :-1], mask[:, 1:]):
        # No row resumes after a masked token: the usual case, and quicker; the numbers are the same.
        here_or_next = values.add_(zero_unless(~mask, after[:, None].expand_as(values)))
    else:
        # The recurrence with decay 0 at unmasked tokens and 1 elsewhere copies values through gaps exactly.
        here_or_next = reverse_linear_recurrence((~mask).to(values.dtype), values, after)
    return torch.cat([here_or_next.mT[1:], after[None]]).mT


@torch.no_grad()
def _advantages(
    rewards: Float[Tensor, "rows time"],
    values: Float[Tensor, "rows time"],
    mask: Bool[Tensor, "rows time"],
    finished: Bool[Tensor, " rows"],
    gamma: float,
    lam: float | Float[Tensor, " rows"],
    ratios: Float[Tensor, "rows time"] | None = None,
    c_bar: float = 1.0,
) -> Float[Tensor, "rows time"]:
    """A_t = delta_t + gamma lam c_{t+1} A_{t+1}, t+1 being the next unmasked token; c = 1 without ratios.

    Rows go chunk by chunk, so that memory beyond arguments and result is a few tens of megabytes at any size.
    """
    per_row = torch.as_tensor(gamma * lam, dtype=values.dtype, device=values.device).expand(len(values))
    advantages = torch.empty_like(values)
    for part in row_chunks(*values.shape):
        reward, value, here = (_along_rows(each[part]) for each in (rewards, values, mask))
        after = torch.where(finished[part], 0.0, last_valid(value, here))
        delta = next_unmasked(value, here, after).mul_(gamma).add_(reward).sub_(value)
        decay = per_row[part, None].expand_as(value)
        if ratios is not None:
            trust = _along_rows(ratios[part]).clamp(max=c_bar)
            decay = decay * next_unmasked(trust, here, torch.zeros_like(after))
        decay = zero_unless(here, decay).add_(zero_unless(~here, torch.ones_like(after)[:, None].expand_as(value)))
        advantages[part] = zero_unless(here, reverse_linear_recurrence(decay, zero_unless(here, delta)))
    return advantages


def _along_rows(tensor: Tensor) -> Tensor:
    """The same (rows, time) tensor with memory running along rows, as the recurrence wants it."""
    return tensor.mT.contiguous().mT


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
    No gradient flows through it.
    """
    return _advantages(rewards, values, mask, finished, gamma, lam)


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


def vtrace_gae(
    rewards: Float[Tensor, "rows time"],
    values: Float[Tensor, "rows time"],
    mask: Bool[Tensor, "rows time"],
    ratios: Float[Tensor, "rows time"],
    *,
    gamma: float = 1.0,
    lam: float | Float[Tensor, " rows"] = 0.95,
    c_bar: float = 1.0,
) -> Float[Tensor, "rows time"]:
    """GAE of another policy's rows that ran to their end (GePPO, arXiv 2111.00072; V-trace, 1802.01561).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lam c_{t+1} A_{t+1}
        c_t     = min(c_bar, ratios_t),  ratios_t = pi_k(a_t | s_t) / pi_behaviour(a_t | s_t)

    t+1 is the next unmasked token; masked tokens get 0. Ratios of 1 and c_bar >= 1 give GAE.
    """
    finished = torch.ones(rewards.shape[0], dtype=torch.bool, device=rewards.device)
    return _advantages(rewards, values, mask, finished, gamma, lam, ratios, c_bar)
