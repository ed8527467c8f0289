"""Rewards: a number for every finished response, and whether its answer is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from profiling.errors import RunError
from tppo.data.problem import Problem


class RewardError(RunError):
    """A reward failed, and no grade can be given. Rows are as they were before."""


@dataclass(frozen=True)
class Grade:
    reward: float
    """What trains; on the last token."""
    correct: bool
    """What accuracy, dynamic sampling and evaluation count."""
    timed_out: bool | None = None
    """Its check took too long, or ended its process; None where checks have no limit."""
    unparsed: bool | None = None
    """No answer could be read out of it; None where the reward reads none."""
    well_formed: bool | None = None
    """It matches reward.format_pattern; None without one, or where that check timed out."""


LARGEST = 1e30
"""A reward beyond it overflows in float32, squared or summed over a batch."""


def is_reward(value: object) -> bool:
    """A number that training can compute with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


class Reward(Protocol):
    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        """One grade per (problem, response), in order. responses: text, special tokens included.

        Raises RewardError when there is no grade to give.
        """
        ...

    def close(self) -> None:
        """End what it has started. Can be called twice."""
        ...


@runtime_checkable
class AnswerReader(Protocol):
    """A reward that can also say what a response answers, whatever is right: a majority vote counts these."""

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        """In order: the answer that `grade` would compare; None: none can be read."""
        ...

    def alike(self, answers: Sequence[Sequence[str]]) -> list[list[str]]:
        """For each problem's distinct answers, in their order: the first of those that each is equal to."""
        ...


def answers_of(reward: Reward, responses: Sequence[str]) -> list[str | None]:
    """All None for a reward that reads no answers."""
    return reward.answers(responses) if isinstance(reward, AnswerReader) else [None] * len(responses)


def alike_of(reward: Reward, answers: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each like itself alone for a reward that reads no answers."""
    return reward.alike(answers) if isinstance(reward, AnswerReader) else [list(each) for each in answers]


def grade_metrics(grades: Sequence[Grade]) -> dict[str, float | None]:
    """reward/timeouts and reward/unparsed: responses; reward/format_share: share of them. None: has no meaning."""
    timed_out = [grade.timed_out for grade in grades if grade.timed_out is not None]
    unparsed = [grade.unparsed for grade in grades if grade.unparsed is not None]
    well_formed = [grade.well_formed for grade in grades if grade.well_formed is not None]
    return {
        "reward/timeouts": sum(timed_out) if timed_out else None,
        "reward/unparsed": sum(unparsed) if unparsed else None,
        "reward/format_share": sum(well_formed) / len(well_formed) if well_formed else None,
    }
