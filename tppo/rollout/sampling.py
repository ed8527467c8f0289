"""Draws tokens from logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tppo.rollout.protocol import Sampling


def draw(
    logits: Float[Tensor, "rows vocabulary"], sampling: Sampling, generator: torch.Generator | None
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """A token per row, and its log-probability at the temperature, before top-k and top-p."""
    if sampling.temperature == 0:
        log_probs = logits.log_softmax(-1)
        tokens = log_probs.argmax(-1)
    else:
        log_probs = (logits / sampling.temperature).log_softmax(-1)
        # The largest of p / Exponential(1) is a draw from p, whatever p sums to.
        noise = torch.empty_like(log_probs).exponential_(generator=generator)
        tokens = (truncated(log_probs.exp(), sampling.top_k, sampling.top_p) / noise).argmax(-1)
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)


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
