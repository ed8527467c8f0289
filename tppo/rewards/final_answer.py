"""The arithmetic task's reward: whether the response ends with the right answer. The working is not read."""

from collections.abc import Sequence

from tppo.data.arithmetic import verify
from tppo.data.problem import Problem
from tppo.rewards.protocol import Grade


class FinalAnswer:
    def __init__(self, right: float = 1.0, wrong: float = -1.0) -> None:
        self.right, self.wrong = right, wrong

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        correct = [verify(problem, response) for problem, response in zip(problems, responses, strict=True)]
        return [Grade(self.right if each else self.wrong, each) for each in correct]

    def close(self) -> None:
        pass
