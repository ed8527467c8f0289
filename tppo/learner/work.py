"""What the training passes of a step computed: for a roofline, for MFU and for padding waste."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields


@dataclass(slots=True)
class Work:
    """Counted pass by pass. Tokens and pairs are of the rows themselves; only `computed` counts padding."""

    passes: int = 0
    """Forward passes, each of a micro-batch."""
    tokens: int = 0
    computed: int = 0
    """Tokens and padding."""
    pairs: int = 0
    """Attended query-key pairs of causal attention."""
    outputs: int = 0
    """Positions that the output layer was applied to."""
    backward_passes: int = 0
    backward_tokens: int = 0
    backward_pairs: int = 0
    backward_outputs: int = 0
    updates: int = 0
    """Optimiser steps."""

    def forward(self, lengths: Sequence[int], *, outputs: int) -> None:
        """A pass over rows of so many tokens, padded to the longest."""
        self.passes += 1
        self.tokens += sum(lengths)
        self.computed += len(lengths) * max(lengths)
        self.pairs += sum(map(causal_pairs, lengths))
        self.outputs += outputs

    def backward(self, lengths: Sequence[int], *, outputs: int, detached: Sequence[int] | None = None) -> None:
        """The way back through such a pass; nothing flows into `detached` first tokens of each row."""
        skipped = detached or [0] * len(lengths)
        self.backward_passes += 1
        self.backward_outputs += outputs
        self.backward_tokens += sum(lengths) - sum(skipped)
        self.backward_pairs += sum(map(causal_pairs, lengths)) - sum(map(causal_pairs, skipped))

    def counts(self) -> list[int]:
        """In the order of the fields."""
        return list(astuple(self))

    def add(self, more: "Work") -> None:
        for field, count in zip(fields(self), more.counts(), strict=True):
            setattr(self, field.name, getattr(self, field.name) + count)

    @classmethod
    def of(cls, parts: Iterable["Work"]) -> "Work":
        """All together."""
        whole = cls()
        for part in parts:
            whole.add(part)
        return whole

    def since(self, before: "Work") -> "Work":
        return Work(*(now - then for now, then in zip(self.counts(), before.counts(), strict=True)))

    def copy(self) -> "Work":
        return Work(*self.counts())


def causal_pairs(tokens: int) -> int:
    """n (n + 1) / 2: each token attends to itself and to those before it."""
    return tokens * (tokens + 1) // 2
