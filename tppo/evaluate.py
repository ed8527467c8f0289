"""Accuracy on held-out problems, sampled at the training temperature."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tppo.data.arithmetic import Problem, verify
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
    *,
    max_response_tokens: int,
) -> Accuracy:
    """One sampled answer per problem. With `sampling.seed`, training's random state is not touched."""
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    engine.submit([Request(i, prompt, 0, max_response_tokens) for i, prompt in enumerate(prompts)], sampling)
    right = 0
    while ended := engine.run_until_a_row_ends():
        for completion in ended:
            right += verify(problems[completion.row], str(tokenizer.decode(completion.token_ids)))
    engine.take_records()
    mean = right / len(problems)
    return Accuracy(mean, math.sqrt(mean * (1 - mean) / len(problems)))
