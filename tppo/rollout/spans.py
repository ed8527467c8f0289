"""The records that an engine keeps of its work: adjoining spans, as profiling.schema.ENGINE has them."""

from typing import Any

from tppo.rollout.protocol import Clock

_EMPTY = {"engine": 0, "fresh_tokens": 0, "resumed_tokens": 0, "recomputed_tokens": 0, "waiting": 0}


class Spans:
    """A span reaches back to the end of the one before, so that the host's own work between them is inside."""

    def __init__(self, clock: Clock, slots: int) -> None:
        self.end = 0.0
        """Of the last span. Unit: s of the run's clock."""
        self._clock, self._slots = clock, slots
        self._records: list[dict[str, Any]] = []

    def start(self) -> None:
        """Now, with nothing running: the time since the last span is not the engine's."""
        self.end = self._clock()

    def close(self, kind: str, *, at: float | None = None, **values: int) -> None:
        """End a span, now or at a time that is past. values: fields of ENGINE; those left out are 0."""
        end = self._clock() if at is None else at
        span = {"kind": kind, "t_start": self.end, "t_end": end, "slots": self._slots}
        self._records.append({**_EMPTY, **span, **values})
        self.end = end

    def close_decode(self, steps: int, batch: int, context: int, **values: Any) -> None:
        """End a span of `steps` decode iterations of a constant batch, whose rows held `context` tokens before it."""
        pairs = steps * context + batch * steps * (steps - 1) // 2
        self.close("decode", steps=steps, batch=batch, context_tokens=context, attended_pairs=pairs, **values)

    def take(self) -> list[dict[str, Any]]:
        records, self._records = self._records, []
        return records
