"""How token losses become one number, alike for one batch, many micro-batches or many ranks.

A loss is a sum of token losses times token weights. The weights hold the aggregation, so a micro-batch's or a rank's
part needs nothing of the others but the denominator, which adds up over them.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Aggregation = Literal["token-mean", "sequence-mean"]


def loss_denominator(mask: Bool[Tensor, "rows time"], aggregation: Aggregation) -> Float[Tensor, ""]:
    """What a mean divides by: unmasked tokens, or rows with at least one. Sum it over ranks (all-reduce) and give the
    sum to `token_weights` of each rank."""
    if aggregation == "token-mean":
        return mask.sum().float()
    return mask.any(dim=1).sum().float()


def token_weights(
    mask: Bool[Tensor, "rows time"], aggregation: Aggregation, denominator: Float[Tensor, ""] | None = None
) -> Float[Tensor, "rows time"]:
    """Weight of every token of a mini-batch; the weights sum to 1, or are all 0 when nothing is unmasked.

        token-mean      w = 1 / tokens                      (DAPO, arXiv 2503.14476, Eq. 8)
        sequence-mean   w = 1 / (rows x the row's tokens)   (each row's mean counts alike)

    denominator: of the whole mini-batch, where `mask` is one rank's part of it.
    """
    weights = mask.float()
    whole = loss_denominator(mask, aggregation) if denominator is None else denominator
    if aggregation == "token-mean":
        return weights / whole.clamp(min=1)
    per_row = weights.sum(1, keepdim=True)  # (rows, 1)
    return weights / per_row.clamp(min=1) / whole.clamp(min=1)


def age_weights(
    mask: Bool[Tensor, "rows time"], age: Int[Tensor, " rows"], weights: Float[Tensor, " ages"]
) -> Float[Tensor, " rows"]:
    """A factor per row that makes a token-mean over batches of several ages weigh each batch by `weights`[age].

    weights_i x all tokens / tokens of age i, after scaling `weights` to sum to 1 over the ages present; the factors
    average 1 over tokens (GePPO, arXiv 2111.00072: an expectation over i ~ nu; its batches are equally large).
    """
    tokens = mask.sum(1).float()  # (rows,)
    per_age = tokens.new_zeros(len(weights)).index_add(0, age, tokens)  # (ages,)
    present = torch.where(per_age > 0, weights.float(), 0.0)
    factors = present / present.sum().clamp(min=1e-12) * tokens.sum() / per_age.clamp(min=1)
    return factors[age]
