"""Groups rows of similar length into micro-batches, so that little of what is computed is padding."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

LAUNCH_COST_TOKENS = 50
"""What one more micro-batch costs, in tokens computed: its launches and small matrices. On a CPU core a training pass
of the demo's models took the same time, within a tenth, at 50 and at 350; 50 keeps padding below a tenth on the demo's
lengths (docs/results/rollout). It moves the split, never the result."""


def micro_batches(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in groups whose padded size stays within `budget_tokens` (a longer row stands alone).

    Minimises padded tokens + LAUNCH_COST_TOKENS per group over all splits of the rows sorted by length, by dynamic
    programming: best[j] = min over i < j of best[i] + (j - i) length[j-1] + launch.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, cut = [0.0], [0]
    for j in range(1, len(order) + 1):
        longest = lengths[order[j - 1]]
        choices = []
        for i in range(j - 1, -1, -1):
            padded = (j - i) * longest
            if padded > budget_tokens and i < j - 1:
                break
            choices.append((best[i] + padded + LAUNCH_COST_TOKENS, i))
        cost, start = min(choices)
        best.append(cost)
        cut.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def pad_right(rows: Sequence[Sequence[int]], pad_token_id: int) -> Int[Tensor, "rows time"]:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in rows])
