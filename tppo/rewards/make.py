"""The reward that a configuration asks for."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from profiling.errors import ConfigError
from tppo.config import RewardConfig, RunConfig
from tppo.data.problem import Problem
from tppo.rewards.final_answer import FinalAnswer
from tppo.rewards.form import FormReward
from tppo.rewards.function import FunctionReward
from tppo.rewards.http import HttpReward
from tppo.rewards.math import MathReward
from tppo.rewards.pool import WorkerPool
from tppo.rewards.protocol import Grade, Reward, RewardError, alike_of, answers_of

TIMEOUT_S = {"final_answer": 5.0, "math": 5.0, "python": 60.0, "http": 30.0}


class WithoutEnd:
    """Grades responses without the tokens that ended them: they are not part of what was written."""

    def __init__(self, inner: Reward, ends: Sequence[str]) -> None:
        self.inner, self.ends = inner, tuple(end for end in ends if end)

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        return self.inner.grade(problems, [self._without_end(response) for response in responses])

    def answers(self, responses: Sequence[str]) -> list[str | None]:
        return answers_of(self.inner, [self._without_end(response) for response in responses])

    def alike(self, answers: Sequence[Sequence[str]]) -> list[list[str]]:
        return alike_of(self.inner, answers)

    def _without_end(self, response: str) -> str:
        for end in self.ends:
            if response.endswith(end):
                return response.removesuffix(end)
        return response

    def close(self) -> None:
        self.inner.close()


def kind_of(config: RunConfig) -> str:
    """reward.kind, the task's where it is auto."""
    if config.reward.kind != "auto":
        return config.reward.kind
    return "final_answer" if config.data.task == "arithmetic" else "math"


def header_of(settings: RewardConfig) -> tuple[str, str] | None:
    """Name and value of the header that reward.header_env asks for. Raises ConfigError, which does not show it."""
    if not settings.header_env:
        return None
    value = os.environ.get(settings.header_env, "")
    if not (value.isascii() and value.isprintable() and value):
        raise ConfigError(
            f"reward.header_env = {settings.header_env!r}: the environment has no such variable, or it is empty or "
            "not one line of printable ASCII; export it before the run starts"
        )
    return settings.header, value


@contextmanager
def reward_of(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, own_stops: Sequence[int] = ()
) -> Iterator[Reward]:
    """The reward, its processes started; they are ended with the block, however it ends. own_stops: tokens that end a
    response besides the tokenizer's and those of the configuration.

    Raises ConfigError when they cannot be: a function that does not import, say.
    """
    settings, kind = config.reward, kind_of(config)
    pool = WorkerPool(
        {
            "math": kind == "math",
            "pattern": settings.format_pattern or None,
            "function": settings.function if kind == "python" else None,
            "sys_path": [*(path for path in sys.path if path), os.getcwd()],
        },
        workers=settings.workers,
        timeout_s=settings.timeout_s or TIMEOUT_S[kind],
    )
    reward: Reward
    if kind == "math":
        reward = MathReward(pool, settings.right, settings.wrong)
    elif kind == "python":
        reward = FunctionReward(pool, settings.function, settings.right_above)
    elif kind == "http":
        reward = HttpReward(
            settings.url, timeout_s=settings.timeout_s or TIMEOUT_S[kind], retries=settings.retries,
            batch_rows=settings.batch_rows, right_above=settings.right_above, concurrency=settings.concurrency,
            header=header_of(settings),
        )  # fmt: skip
    else:
        reward = FinalAnswer(settings.right, settings.wrong)
    if settings.format_pattern:
        reward = FormReward(reward, pool, settings.format_reward)
    if kind != "final_answer":
        stops = [str(tokenizer.decode([token])) for token in (*own_stops, *config.rollout.stop_token_ids)]
        reward = WithoutEnd(reward, [str(tokenizer.eos_token), *stops])
    try:
        if kind in ("math", "python") or settings.format_pattern:
            try:
                pool.start()
            except RewardError as error:
                name = f"reward.function = {settings.function!r}" if kind == "python" else f"reward.kind = {kind!r}"
                remedy = "name a function that imports" if kind == "python" else "is math-verify installed?"
                raise ConfigError(f"{name}: {error}; {remedy}") from None
        yield reward
    finally:
        reward.close()
