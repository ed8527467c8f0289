"""The arithmetic task's reward: whether the response ends with the right answer. The working is not read."""

import re
from collections.abc import Sequence

from tppo.data.arithmetic import END, verify
from tppo.data.problem import Problem
from tppo.rewards.protocol import Grade

ANSWER = re.compile(rf"#(\d+){re.escape(END)}\Z")


class FinalAnswer:
    def __init__(self, right: float = 1.0, wrong: float = -1.0) -> None:
        self.right, self.wrong = right, wrong

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        correct = [verify(problem, response) for problem, response in zip(problems, responses, strict=True)]
        return [Grade(self.right if each else self.wrong, each) for each in correct]

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        """The number between # and the end: "a1b2:3;#3$" answers 3."""
        found = [ANSWER.search(response) for response in responses]
        return [match.group(1) if match else None for match in found]

    def alike(self, answers: Sequence[Sequence[str]]) -> list[list[str]]:
        """None are: they are digits."""
        return [list(each) for each in answers]

    def close(self) -> None:
        pass
