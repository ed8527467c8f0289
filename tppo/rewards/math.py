"""Answers compared as mathematics: 0.5 is \\frac{1}{2}. By math-verify, in processes with a time limit.

The answer of a response is its last \\boxed{...}; without one, the last that math-verify finds in its last
characters. Where both answers are the same text, or both plain integers, no process is asked.
"""

import re
from collections.abc import Sequence

from tppo.data.boxed import last_boxed
from tppo.data.problem import Problem
from tppo.rewards.pool import WorkerPool
from tppo.rewards.protocol import Grade, RewardError

INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
TAIL_CHARACTERS = 1000
"""Of a response without a box that are searched: the answer stands at the end, and searching takes time."""


class MathReward:
    def __init__(self, pool: WorkerPool, right: float = 1.0, wrong: float = -1.0) -> None:
        self.pool, self.right, self.wrong = pool, right, wrong

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        boxes = [last_boxed(response) for response in responses]
        golds = [problem.answer for problem in problems]
        sure = [None if box is None else certain(gold, box) for gold, box in zip(golds, boxes, strict=True)]
        jobs = [
            {"kind": "math", "gold": _plain(gold), "text": _text(box, response)}
            for gold, box, response, known in zip(golds, boxes, responses, sure, strict=True)
            if known is None
        ]
        results = iter(self.pool.run(jobs) if jobs else [])
        grades = []
        for known, problem in zip(sure, problems, strict=True):
            result = {"correct": known, "unparsed": False} if known is not None else next(results)
            if "error" in result:  # math-verify catches its own; short memory is left
                result = {"correct": False, "unparsed": True}
            if result.get("timed_out"):
                grades.append(Grade(self.wrong, False, timed_out=True, unparsed=False))
                continue
            if not isinstance(result.get("correct"), bool):
                raise RewardError(f"reward: the check of {problem.answer!r:.60} ended without a verdict")
            reward = self.right if result["correct"] else self.wrong
            grades.append(Grade(reward, result["correct"], timed_out=False, unparsed=result["unparsed"]))
        return grades

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        """What is graded, spaces left out; whole numbers as AIME's readers write them, 033 as 33. None also where
        reading takes too long. Raises RewardError."""
        boxes = [last_boxed(response) for response in responses]
        jobs = [
            {"kind": "answer", "text": _text(box, response)}
            for box, response in zip(boxes, responses, strict=True)
            if box is None
        ]
        results = iter(self.pool.run(jobs) if jobs else [])
        given = [next(results).get("answer") if box is None else box for box in boxes]
        return [None if answer is None else _plain("".join(answer.split())) for answer in given]

    def alike(self, answers: Sequence[Sequence[str]]) -> list[list[str]]:
        """Compared by math-verify, a problem's answers under one time limit; where that ends, they differ as their
        texts do. Raises RewardError."""
        places = [place for place, own in enumerate(answers) if len(own) > 1 and not all(map(INTEGER.fullmatch, own))]
        jobs = [{"kind": "alike", "answers": list(answers[place])} for place in places]
        firsts = [list(each) for each in answers]
        for place, result in zip(places, self.pool.run(jobs) if jobs else [], strict=True):
            firsts[place] = [answers[place][first] for first in result.get("first", range(len(answers[place])))]
        return firsts

    def close(self) -> None:
        self.pool.close()


def certain(gold: str, given: str) -> bool | None:
    """Whether the answers are equal, where that needs no algebra; None where it does."""
    gold, given = gold.strip(), given.strip()
    if gold == given:
        return True
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(given):
        return int(gold) == int(given)
    return None


def _plain(gold: str) -> str:
    """AIME writes 33 as 033."""
    return str(int(gold)) if INTEGER.fullmatch(gold.strip()) else gold


def _text(box: str | None, response: str) -> str:
    return response[-TAIL_CHARACTERS:] if box is None else f"\\boxed{{{box}}}"
