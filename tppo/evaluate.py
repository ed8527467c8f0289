"""Accuracy on held-out problems, sampled at the training temperature."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.data.arithmetic import Problem, verify
from tppo.rollout.protocol import Request
from tppo.rollout.torch_engine import TorchEngine


@dataclass(frozen=True)
class Accuracy:
    mean: float
    stderr: float
    """Standard error of the mean over problems, sqrt(p (1 - p) / n)."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_response_tokens: int,
    temperature: float,
    seed: int,
) -> Accuracy:
    """One sampled answer per problem, from a generator of its own: training's random state is not touched."""
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    engine = TorchEngine(
        model,
        slots=len(problems),
        max_tokens=max(map(len, prompts)) + max_response_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(seed),
        clock=lambda: 0.0,
        temperature=temperature,
    )
    engine.submit([Request(i, prompt, 0, max_response_tokens) for i, prompt in enumerate(prompts)])
    right = 0
    while ended := engine.run_until_a_row_ends():
        for completion in ended:
            right += verify(problems[completion.row], str(tokenizer.decode(completion.token_ids)))
    mean = right / len(problems)
    return Accuracy(mean, math.sqrt(mean * (1 - mean) / len(problems)))
