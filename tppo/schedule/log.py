"""What a run directory keeps of a schedule's inputs and decisions, measured and simulated alike, and how they are
made again from it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tppo.schedule.protocol import CarriedRow, Decision, Demand, RowEnd, Schedule, StepPlan, StepState


def plan_record(t: float, carried: Sequence[CarriedRow], demand: Demand, plan: StepPlan) -> dict[str, Any]:
    """A trace record (profiling.schema) of a step's plan. t: seconds from the start of the run."""
    return {
        "type": "plan_step",
        "step": plan.step,
        "t": t,
        "carried": [row._asdict() for row in carried],
        "demand": demand._asdict(),
        "admissions": [admission._asdict() for admission in plan.admissions],
        "rows_wanted": plan.rows_wanted,
    }


def row_end_record(t: float, state: StepState, event: RowEnd, decisions: Sequence[Decision]) -> dict[str, Any]:
    """A trace record of a row that stopped, the state before it, and what the schedule decided."""
    return {
        "type": "row_end",
        **state._asdict(),
        "t": t,
        "event": event._asdict(),
        "decisions": [decision._asdict() for decision in decisions],
    }


def decide_again(
    schedule: Schedule, records: Iterable[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Feed the logged inputs to `schedule`: pairs of (record as logged, record as made again)."""
    pairs = []
    for record in records:
        if record["type"] == "plan_step":
            carried = [CarriedRow(**row) for row in record["carried"]]
            demand = Demand(**record["demand"])
            pairs.append((record, plan_record(record["t"], carried, demand, schedule.plan_step(carried, demand))))
        elif record["type"] == "row_end":
            state = StepState(**{name: record[name] for name in StepState._fields})
            event = RowEnd(**record["event"])
            pairs.append((record, row_end_record(record["t"], state, event, schedule.on_row_end(state, event))))
    return pairs
