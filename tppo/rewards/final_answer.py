"""The arithmetic task's reward: +1 where the response ends with the right answer, else -1. The working is not read."""

import re
from collections.abc import Sequence

from tppo.data.arithmetic import END, verify
from tppo.data.problem import Problem
from tppo.rewards.protocol import Grade

ANSWER = re.compile(rf"#(\d+){re.escape(END)}\Z")


class FinalAnswer:
    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        right = [verify(problem, response) for problem, response in zip(problems, responses, strict=True)]
        return [Grade(1.0 if correct else -1.0, correct) for correct in right]

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        """The number between # and the end: "a1b2:3;#3$" answers 3."""
        found = [ANSWER.search(response) for response in responses]
        return [match.group(1) if match else None for match in found]
