"""Rewards: a number for every finished response, and whether its answer is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tppo.data.problem import Problem


@dataclass(frozen=True)
class Grade:
    reward: float
    """What trains; on the last token."""
    correct: bool
    """What accuracy, dynamic sampling and evaluation count."""


class Reward(Protocol):
    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        """One grade per (problem, response), in order. responses: text, special tokens included."""
        ...


@runtime_checkable
class AnswerReader(Protocol):
    """A reward that can also say what a response answers, whatever is right: a majority vote counts these."""

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        """In order. Responses that answer the same have the same text here; None: no answer can be read."""
        ...
