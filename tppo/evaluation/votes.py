"""What responses vote for: answers that are equal but written differently are one candidate."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from tppo.evaluation.statistics import Answers
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.rewards.protocol import Reward, alike_of


def votes(
    answers: Answers, correct: Bool[np.ndarray, "problems samples"], reward: Reward, ranks: Ranks = SINGLE
) -> list[list[str | None]]:
    """`answers`, each as the first that it equals is written. (problems, samples), as they are.

    Right answers equal the data's and so each other; the others are equal where the reward says so (`alike`), which
    sees the distinct ones of a problem. Ranks share the problems out. Raises RewardError, on all ranks.
    """
    merged = [_right_as_one(row, right) for row, right in zip(answers, correct.tolist(), strict=True)]
    distinct = [list(dict.fromkeys(answer for answer in row if answer is not None)) for row in merged]
    parts = ranks.everyones(lambda: alike_of(reward, distinct[ranks.rank :: ranks.world]))
    firsts = [
        dict(zip(own, parts[problem % ranks.world][problem // ranks.world], strict=True))
        for problem, own in enumerate(distinct)
    ]
    return [
        [None if answer is None else first[answer] for answer in row]
        for row, first in zip(merged, firsts, strict=True)
    ]


def _right_as_one(row: Sequence[str | None], right: Sequence[bool]) -> list[str | None]:
    texts = [answer for answer, is_right in zip(row, right, strict=True) if is_right and answer is not None]
    return [texts[0] if answer in texts else answer for answer in row]
