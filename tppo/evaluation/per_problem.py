"""One row per problem: how often it was solved, and what was answered instead."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tppo.data.problem import Problem
from tppo.evaluation.graded import Graded


@dataclass(frozen=True)
class ProblemRow:
    problem: int
    prompt: str
    answer: str
    """The right one."""
    correct: int
    """Responses."""
    samples: int
    vote: str | None
    """The most frequent answer, of tied ones the first given; None: no response has one."""
    votes: int
    mean_tokens: float
    clipped: int
    """Responses that hit the maximum."""


def hardest_first(problems: Sequence[Problem], graded: Graded) -> list[ProblemRow]:
    """Fewest correct responses first, then the longest ones."""
    rows = []
    for number, problem in enumerate(problems):
        given = Counter(answer for answer in graded.answers[number] if answer is not None)
        vote, votes = given.most_common(1)[0] if given else (None, 0)
        rows.append(
            ProblemRow(
                problem=number,
                prompt=problem.prompt,
                answer=problem.answer,
                correct=int(graded.correct[number].sum()),
                samples=graded.samples,
                vote=vote,
                votes=votes,
                mean_tokens=float(graded.tokens[number].mean()),
                clipped=int(graded.cut[number].sum()),
            )
        )
    return sorted(rows, key=lambda row: (row.correct, -row.mean_tokens, row.problem))
