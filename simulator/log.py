"""Everything that happened in a run, in order and in columns: a paper-scale run has millions of rows and spans.

What a pure function gives again is not kept: plans and decisions are made anew from their inputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.engine import Span
from tppo.schedule import CarriedRow, Decision, Demand, Reason, RowEnd, Schedule, StepPlan, StepState

REASONS: tuple[Reason, ...] = ("stop", "length", "budget", "failed", "aborted")
Columns = dict[str, np.ndarray]


class RowRecord(NamedTuple):
    """A row in one step, in the order in which rows ended."""

    row: int
    engine: int
    policy_version: int
    prompt_tokens: int
    context_before: int
    tokens: int
    finished: bool
    preempted: int
    reason: int
    """Place in REASONS."""
    t_start: float
    t_end: float
    t_decided: float
    """When the schedule was told."""


SPAN_COLUMNS = ("engine", *Span._fields, "t_start", "t_end")
FLOATS = ("seconds", "t_start", "t_end", "t_decided")
SUMS = ("context_tokens", "attended_pairs", "fresh_tokens", "resumed_tokens", "recomputed_tokens")
"""Over the rows of an engine: may pass 2 ** 31, which nothing of a single row does."""


def compact(columns: Columns) -> Columns:
    """Times as floats, sums over rows in 64 bits, the rest in 32."""

    def kind(name: str) -> type:
        return float if name in FLOATS else np.int64 if name in SUMS else np.int32

    return {name: column.astype(kind(name)) for name, column in columns.items()}


def columns_of(records: Sequence[tuple], names: Sequence[str]) -> Columns:
    """Records side by side (integers are exact in a float below 2 ** 53)."""
    table = np.array(records, dtype=float).reshape(len(records), len(names))
    return compact({name: table[:, place] for place, name in enumerate(names)})


@dataclass
class StepLog:
    step: int
    t_planned: float
    carried: npt.NDArray[np.int64]
    """(rows, 2): row and response tokens of those that waited."""
    demand: Demand
    rows: Columns = field(default_factory=dict)
    spans: Columns = field(default_factory=dict)

    def plan(self, schedule: Schedule) -> tuple[tuple[CarriedRow, ...], StepPlan]:
        carried = tuple(CarriedRow(*row) for row in self.carried.tolist())
        return carried, schedule.plan_step(carried, self.demand)

    def decisions(self, schedule: Schedule) -> Iterator[tuple[float, StepState, RowEnd, tuple[Decision, ...]]]:
        state = StepState.of(self.plan(schedule)[1])
        for record in self.records():
            response = record.context_before + record.tokens - record.prompt_tokens
            event = RowEnd(record.row, record.tokens, response, REASONS[record.reason])
            decisions = schedule.on_row_end(state, event)
            yield record.t_decided, state, event, decisions
            state = state.after(decisions)

    def records(self) -> list[RowRecord]:
        return [RowRecord(*values) for values in zip(*(self.rows[n].tolist() for n in RowRecord._fields), strict=True)]


@dataclass
class Log:
    phases: list[tuple[str, int, float, float]] = field(default_factory=list)
    """(name, step, t_start, t_end)"""
    steps: dict[int, StepLog] = field(default_factory=dict)

    def rows(self) -> Columns:
        """Of all steps, with their `step`."""
        return _together({step: log.rows for step, log in self.steps.items()})

    def spans(self) -> Columns:
        return _together({step: log.spans for step, log in self.steps.items()})


def _together(by_step: dict[int, Columns]) -> Columns:
    parts = list(by_step.values())
    counts = [len(next(iter(part.values()))) for part in parts]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {"step": np.repeat(np.array(list(by_step), dtype=np.int32), counts), **joined}
