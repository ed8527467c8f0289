"""Answers of a data set that no response can be compared with: found once, before a run trains on their problems."""

import contextlib
from collections.abc import Iterable

from profiling.errors import ConfigError
from tppo.config import RunConfig
from tppo.rewards.make import TIMEOUT_S, kind_of
from tppo.rewards.math import INTEGER
from tppo.rewards.pool import WorkerPool
from tppo.rewards.protocol import RewardError


def unreadable(answers: Iterable[str], config: RunConfig) -> set[str]:
    """Those in which math-verify finds no mathematics, or not within reward.timeout_s; words are compared as text.
    None where another reward grades. Raises ConfigError where math-verify cannot be started."""
    if kind_of(config) != "math":
        return set()
    doubtful = sorted({answer for answer in answers if not INTEGER.fullmatch(answer)})
    timeout_s = config.reward.timeout_s or TIMEOUT_S["math"]
    pool = WorkerPool(
        {"math": True, "pattern": None, "function": None}, workers=config.reward.workers, timeout_s=timeout_s
    )
    with contextlib.closing(pool):
        try:
            results = pool.run([{"kind": "gold", "text": answer} for answer in doubtful]) if doubtful else []
        except RewardError as error:
            raise ConfigError(f'reward.kind = "math": {error}; is math-verify installed?') from None
    return {answer for answer, result in zip(doubtful, results, strict=True) if not result.get("readable")}
