"""Adds to another reward where a response has the form that a regular expression describes.

The expression is searched in a process with a time limit: a short one can backtrack for years.
"""

from collections.abc import Sequence
from dataclasses import replace

from tppo.data.problem import Problem
from tppo.rewards.pool import WorkerPool
from tppo.rewards.protocol import Grade, Reward, alike_of, answers_of


class FormReward:
    """`pool`: prepared with the pattern; may be the other reward's own."""

    def __init__(self, inner: Reward, pool: WorkerPool, extra: float) -> None:
        self.inner, self.pool, self.extra = inner, pool, extra

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        grades = self.inner.grade(problems, responses)
        results = self.pool.run([{"kind": "format", "text": response} for response in responses])
        return [
            replace(grade, timed_out=True)
            if result.get("timed_out") or "error" in result
            else replace(
                grade,
                reward=grade.reward + (self.extra if result["match"] else 0.0),
                well_formed=result["match"],
                timed_out=bool(grade.timed_out),
            )
            for grade, result in zip(grades, results, strict=True)
        ]

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        return answers_of(self.inner, responses)

    def alike(self, answers: Sequence[Sequence[str]]) -> list[list[str]]:
        return alike_of(self.inner, answers)

    def close(self) -> None:
        self.pool.close()
        self.inner.close()
