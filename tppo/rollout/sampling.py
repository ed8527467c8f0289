"""Draws tokens from logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tppo.rollout.protocol import Sampling


def draw(
    logits: Float[Tensor, "rows vocabulary"],
    sampling: Sampling,
    generator: torch.Generator | None,
    row: Int[Tensor, " rows"],
    position: Int[Tensor, " rows"],
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """A token per row, and its log-probability at the temperature, before top-k and top-p. position: of the token."""
    if sampling.temperature == 0:
        log_probs = logits.log_softmax(-1)
        tokens = log_probs.argmax(-1)
    elif sampling.by_row:
        log_probs = (logits / sampling.temperature).log_softmax(-1)
        below = truncated(log_probs.exp(), sampling.top_k, sampling.top_p).double().cumsum(-1)  # (rows, vocabulary)
        u = uniform_of(sampling.seed or 0, row, position) * below[:, -1]
        tokens = (below <= u[:, None]).sum(-1)  # the first token whose share of the sum reaches beyond u
    else:
        log_probs = (logits / sampling.temperature).log_softmax(-1)
        # The largest of p / Exponential(1) is a draw from p, whatever p sums to.
        noise = torch.empty_like(log_probs).exponential_(generator=generator)
        tokens = (truncated(log_probs.exp(), sampling.top_k, sampling.top_p) / noise).argmax(-1)
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)


def uniform_of(seed: int, row: Int[Tensor, " rows"], position: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """In [0, 1), float64, by a hash of the three: the finaliser of SplitMix64 (Steele, Lea & Flood, 2014), once over
    each."""
    state = torch.full_like(row, seed)
    for value in (row, position, torch.zeros_like(row)):
        state = state + value * _signed(0x9E3779B97F4A7C15) + _signed(0x9E3779B97F4A7C15)
        state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
        state = state ^ _shifted(state, 31)
    return _shifted(state, 11).double() * 2.0**-53


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(state: Int[Tensor, " rows"], by: int) -> Int[Tensor, " rows"]:
    """Right, zeros coming in: torch's own shift keeps the sign."""
    return (state >> by) & (2 ** (64 - by) - 1)


def truncated(probs: Float[Tensor, "rows vocabulary"], top_k: int, top_p: float) -> Float[Tensor, "rows vocabulary"]:
    """`probs` with 0 outside the top k, then outside the nucleus: the fewest likeliest of those left that hold at
    least `top_p` of their sum (Holtzman et al., arXiv 1904.09751). Not renormalised. Ties go to the lower id."""
    vocabulary = probs.shape[-1]
    if not 0 < top_k < vocabulary and top_p >= 1:
        return probs
    ordered, token = probs.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < vocabulary:
        ordered[:, top_k:] = 0
    if top_p < 1:
        before = ordered.cumsum(-1) - ordered  # what the likelier ones hold; the first is always kept
        ordered = ordered.where(before < top_p * ordered.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probs).scatter_(-1, token, ordered)
