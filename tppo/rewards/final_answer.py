"""The arithmetic task's reward: +1 where the response ends with the right answer, else -1. The working is not read."""

from collections.abc import Sequence

from tppo.data.arithmetic import verify
from tppo.data.problem import Problem
from tppo.rewards.protocol import Grade


class FinalAnswer:
    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        right = [verify(problem, response) for problem, response in zip(problems, responses, strict=True)]
        return [Grade(1.0 if correct else -1.0, correct) for correct in right]
