"""Rollout schedules: pure state machines that the trainer and the simulator both drive. No torch, no clock."""

from typing import Any

from tppo.schedule.asynchronous import Asynchronous
from tppo.schedule.oversample import Oversample
from tppo.schedule.protocol import (
    Admission,
    CarriedRow,
    Decision,
    Demand,
    Reason,
    RowEnd,
    Schedule,
    StepPlan,
    StepState,
    describe,
)
from tppo.schedule.synchronous import Synchronous
from tppo.schedule.tail_batching import TailBatching
from tppo.schedule.truncated import Truncated

__all__ = [
    "Admission",
    "Asynchronous",
    "CarriedRow",
    "Decision",
    "Demand",
    "Oversample",
    "Reason",
    "RowEnd",
    "Schedule",
    "StepPlan",
    "StepState",
    "Synchronous",
    "TailBatching",
    "Truncated",
    "describe",
    "from_description",
]


def from_description(settings: dict) -> Schedule:
    """The schedule that `describe` described. Raises ValueError for a kind that does not exist."""
    kinds: dict[Any, Any] = {
        each.kind: each for each in (Synchronous, Truncated, Oversample, Asynchronous, TailBatching)
    }
    values = {key: value for key, value in settings.items() if key != "kind"}
    if settings.get("kind") not in kinds:
        raise ValueError(f"schedule kind {settings.get('kind')!r} is not one of {', '.join(kinds)}")
    return kinds[settings["kind"]](**values)
