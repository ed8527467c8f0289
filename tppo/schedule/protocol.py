"""What a rollout schedule is told and what it decides.

A schedule decides which rows a step runs, for how many new tokens, and when the step ends. It is a pure state
machine: it never polls, sleeps, reads a clock or sees a tensor. The trainer drives it with a real engine and the
wall clock, the simulator drives the same object with a cost model and a virtual clock.

    plan = schedule.plan_step(carried, demand)
    state = StepState.of(plan)
    for event in the row ends, in time order:
        decisions = schedule.on_row_end(state, event)
        state = state.after(decisions)

A row is one response over its whole life; its id never changes.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

Reason = Literal["stop", "length", "budget", "failed", "aborted"]
"""stop: the row ended by itself (EOS). length: it reached the maximum response length. budget: it used up its
admission's token budget. failed: the engine gave it up earlier. aborted: it was stopped because the step was over.
A row ended by `stop` or `length` is finished, whatever its width; every other one continues in a later step."""

Action = Literal["finish", "carry", "end_step", "update_weights"]
"""finish: grade the row, it leaves. carry: keep its tokens, it continues in a later step. end_step: the step has the
rows that it trains on; those that still run are aborted, or run on until it has trained (`in_flight`). update_weights:
train on the step's rows and give the engines the newest policy there is."""


class CarriedRow(NamedTuple):
    """An unfinished row of an earlier step. `response_tokens`: generated so far, over all steps."""

    row: int
    response_tokens: int


class Demand(NamedTuple):
    """What a step asks for: `rows` rows in all; fresh ones are numbered from `next_row`."""

    step: int
    rows: int
    next_row: int
    max_response_tokens: int


class Admission(NamedTuple):
    """Run `row`, which has `response_tokens` so far, for at most `budget_tokens` new ones."""

    row: int
    response_tokens: int
    budget_tokens: int


class StepPlan(NamedTuple):
    """What to run. The step is over when `rows_wanted` rows have finished, or when none runs any more. 0: at once, for
    rows that finished earlier and wait."""

    step: int
    admissions: tuple[Admission, ...]
    rows_wanted: int


class RowEnd(NamedTuple):
    """A row stopped running. `tokens`: generated in this step; `response_tokens`: in all."""

    row: int
    tokens: int
    response_tokens: int
    reason: Reason


class Decision(NamedTuple):
    action: Action
    row: int | None = None


class StepState(NamedTuple):
    """What a schedule may know of a step under way: counts only, so a step of any size costs the same."""

    step: int
    running: int
    rows_wanted: int
    finished: int = 0
    ended: bool = False

    @classmethod
    def of(cls, plan: StepPlan) -> "StepState":
        return cls(plan.step, len(plan.admissions), plan.rows_wanted, ended=plan.rows_wanted == 0)

    def after(self, decisions: Sequence[Decision]) -> "StepState":
        running, finished, ended = self.running, self.finished, self.ended
        for action, _ in decisions:
            if action == "finish":
                running, finished = running - 1, finished + 1
            elif action == "carry":
                running -= 1
            elif action == "end_step":
                ended = True
        return StepState(self.step, running, self.rows_wanted, finished, ended)


class Schedule(Protocol):
    """What most schedules share is here; each says what it plans."""

    kind: ClassVar[str]

    @property
    def simulated_only(self) -> bool:
        """Our trainer does not run it; its numbers say so wherever they appear."""
        return False

    @property
    def steps_ahead(self) -> int:
        """Steps whose rollout may begin before the training of the step at hand is done; 0: none."""
        return 0

    @property
    def in_flight(self) -> bool:
        """Rows run on while a step trains, and take its weights in the middle; steps train on rows in the order in
        which these finished."""
        return False

    @abstractmethod
    def plan_step(self, carried: Sequence[CarriedRow], demand: Demand) -> StepPlan:
        """What runs in a step. A carried row that the plan leaves out waits for a later step."""

    def on_row_end(self, state: StepState, event: RowEnd) -> tuple[Decision, ...]:
        """Finished rows leave, others carry over; the last row to stop, or the last one wanted, ends the step."""
        finished = event.reason in ("stop", "length")
        own = Decision("finish" if finished else "carry", event.row)
        over = state.running == 1 or state.finished + finished == state.rows_wanted
        if state.ended or not over:
            return (own,)
        return (own, Decision("end_step"), Decision("update_weights"))

    @abstractmethod
    def startup_steps(self, max_response_tokens: int) -> int:
        """Steps before the mix of fresh and carried rows is steady; rates are quoted without them."""


def describe(schedule: Schedule) -> dict[str, Any]:
    """The schedule as plain data, for logs: its kind and its settings."""
    return {"kind": schedule.kind, **asdict(schedule)}  # type: ignore[call-overload]


def fill_with_fresh_rows(
    carried: Sequence[CarriedRow], demand: Demand, rows: int, max_new_tokens: int | None
) -> tuple[Admission, ...]:
    """Carried rows by id, then fresh ones up to `rows`, each for at most `max_new_tokens` tokens.

    Nothing is dropped: more carried rows than `rows` all run.
    """
    admissions = []
    for row in sorted(carried, key=lambda c: c.row):
        left = demand.max_response_tokens - row.response_tokens
        if left < 1:
            raise ValueError(f"row {row.row} has {row.response_tokens} tokens and cannot be carried further")
        admissions.append(Admission(row.row, row.response_tokens, _at_most(left, max_new_tokens)))
    budget = _at_most(demand.max_response_tokens, max_new_tokens)
    for offset in range(rows - len(admissions)):
        admissions.append(Admission(demand.next_row + offset, 0, budget))
    return tuple(admissions)


def _at_most(tokens: int, limit: int | None) -> int:
    return tokens if limit is None else min(tokens, limit)
