"""Rows laid out for training: which tokens of which rows, and what is known of each.

Shapes: rows = responses, time = the longest span; a span is the part of a response that trains, starting at `first`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tppo.algorithms.masks import window_mask
from tppo.batching import micro_batches, pad_right
from tppo.learner.work import Work
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.rollout.rows import Row


@dataclass(frozen=True)
class Spans:
    """Tokens first, first + 1, ... of each row's response."""

    rows: list[Row]
    first: Int[Tensor, " rows"]
    tokens: Int[Tensor, " rows"]
    work: Work = field(default_factory=Work, compare=False)
    """Of every micro-batch made of them so far."""

    @classmethod
    def windows(cls, rows: Sequence[Row]) -> "Spans":
        """The tokens of this step."""
        first = [row.window_start for row in rows]
        return cls(list(rows), _ints(first), _ints([row.window_tokens for row in rows]))

    @classmethod
    def responses(cls, rows: Sequence[Row]) -> "Spans":
        """All response tokens, over all windows."""
        return cls(list(rows), _ints([0] * len(rows)), _ints([len(row.response_ids) for row in rows]))

    @property
    def valid(self) -> Bool[Tensor, "rows time"]:
        return window_mask(self.tokens, int(self.tokens.max()) if self.rows else 0)

    def sampled_by(self, policy_version: int) -> Bool[Tensor, "rows time"]:
        """The tokens that this policy sampled: those of a row's current window, if it was the one."""
        own = [row.policy_version == policy_version for row in self.rows]
        start = _ints([row.window_start for row in self.rows]) - self.first  # (rows,)
        in_window = torch.arange(self.valid.shape[1]) >= start[:, None]
        return self.valid & in_window & torch.tensor(own, dtype=torch.bool)[:, None]

    @property
    def finished(self) -> Bool[Tensor, " rows"]:
        return torch.tensor([row.finished for row in self.rows], dtype=torch.bool)

    def laid_out(self, per_token: Callable[[Row], Sequence[float]]) -> Float[Tensor, "rows time"]:
        """`per_token(row)`, a number for every response token, cut to the spans; 0 in padding."""
        table = torch.zeros(self.valid.shape)
        for index, row in enumerate(self.rows):
            start, count = int(self.first[index]), int(self.tokens[index])
            table[index, :count] = torch.tensor(per_token(row)[start : start + count])
        return table


@dataclass(frozen=True)
class MicroBatch:
    """Some rows, padded to one width, and where in them the picked tokens are predicted."""

    members: list[int]
    """Their places in the spans."""
    input_ids: Int[Tensor, "members width"]
    """All tokens but each row's last, which predicts nothing."""
    lengths: list[int]
    """Of the rows, padding left out."""
    row: Int[Tensor, " picked"]
    """Which member a picked token belongs to."""
    column: Int[Tensor, " picked"]
    """Position in the row that predicts it, and after which its value is read."""
    targets: Int[Tensor, " picked"]
    """The picked tokens themselves."""

    def to(self, device: torch.device) -> "MicroBatch":
        on = {name: getattr(self, name).to(device) for name in ("input_ids", "row", "column", "targets")}
        return replace(self, **on)


def pick(
    spans: Spans, members: Sequence[int], mask: Bool[Tensor, "rows time"], pad_token_id: int, *, count: bool = True
) -> MicroBatch:
    """The micro-batch of `members`; picked are the tokens of their spans where `mask` holds, row by row. count: it is
    work of the spans."""
    chosen = [spans.rows[i] for i in members]
    token_ids = pad_right([row.token_ids for row in chosen], pad_token_id)
    row, time = mask[list(members)].nonzero(as_tuple=True)
    lengths = [r.all_tokens - 1 for r in chosen]
    if count:
        spans.work.forward(lengths, outputs=len(row))
    before = spans.first[list(members)] + _ints([len(r.prompt_ids) for r in chosen]) - 1  # (members,)
    column = before[row] + time
    return MicroBatch(list(members), token_ids[:, :-1], lengths, row, column, token_ids[row, column + 1])


def in_micro_batches(
    spans: Spans, members: Sequence[int], budget_tokens: int, ranks: Ranks = SINGLE
) -> list[tuple[list[int], bool]]:
    """`members` in groups of similar length whose padded size stays within the budget: this rank's, each with whether
    it counts (`Ranks.share`)."""
    lengths = [spans.rows[i].all_tokens - 1 for i in members]
    groups = micro_batches(lengths, budget_tokens)
    sizes = [len(group) * max(lengths[i] for i in group) for group in groups]
    return ranks.share([[members[i] for i in group] for group in groups], sizes)


def forward_spans(
    spans: Spans,
    forward: Callable[[MicroBatch], Float[Tensor, " picked"]],
    budget_tokens: int,
    pad_token_id: int,
    ranks: Ranks = SINGLE,
) -> Float[Tensor, "rows time"]:
    """`forward` of every token of the spans, without gradient, shared out among the ranks; 0 in padding."""
    valid = spans.valid
    table = torch.zeros(valid.shape)
    with torch.no_grad() if ranks.mesh else torch.inference_mode():  # a shard is no inference tensor
        for members, counts in in_micro_batches(spans, range(len(spans.rows)), budget_tokens, ranks):
            part = torch.zeros(len(members), valid.shape[1])
            micro = pick(spans, members, valid, pad_token_id, count=counts)
            part[valid[members]] = forward(micro.to(ranks.device)).float().cpu()
            if counts:
                table[members] = part
    return ranks.total(table)


def mini_batches(order: Sequence[int], count: int) -> Iterator[list[int]]:
    """`order` in `count` parts as equal as can be, the larger ones first."""
    size = -(-len(order) // max(count, 1))
    for start in range(0, len(order), max(size, 1)):
        yield list(order[start : start + size])


def _ints(values: Sequence[int]) -> Int[Tensor, " rows"]:
    return torch.tensor(values, dtype=torch.long)
