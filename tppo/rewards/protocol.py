"""Rewards: a number for every finished response, and whether its answer is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
