"""Accuracy on held-out problems, sampled at the training temperature."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tppo.data.problem import Problem, prompt_ids
from tppo.rewards.protocol import Reward
from tppo.rollout.protocol import Request, RolloutEngine, Sampling


@dataclass(frozen=True)
class Accuracy:
    mean: float
    stderr: float
    """Standard error of the mean over problems, sqrt(p (1 - p) / n)."""


def evaluate(
    engine: RolloutEngine,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    reward: Reward,
    *,
    max_response_tokens: int,
) -> Accuracy:
    """One sampled answer per problem. With `sampling.seed`, training's random state is not touched."""
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    engine.submit([Request(i, prompt, 0, max_response_tokens) for i, prompt in enumerate(prompts)], sampling)
    responses = [""] * len(problems)
    while ended := engine.run_until_a_row_ends():
        for completion in ended:
            responses[completion.row] = str(tokenizer.decode(completion.token_ids))
    engine.take_records()
    mean = sum(grade.correct for grade in reward.grade(problems, responses)) / len(problems)
    return Accuracy(mean, math.sqrt(mean * (1 - mean) / len(problems)))
