"""A small verifiable task with a long tail of response lengths: running sums modulo 10, written out.

    prompt    a4b7c9=           operands 4, 7, 9, each with a name
    response  b7:1;c9:0;#0$     4 + 7 = 11 -> 1;  1 + 9 = 10 -> 0;  the answer is 0

Five tokens a step and three for the answer. The number of steps is lognormal, so a few responses are many times
longer than the median, as with reasoning models. Only the final answer is verified.

The demonstrations of the warm start come from a careless pupil, who goes wrong on a fixed eighth of the (total,
operand) pairs. A model trained on them answers 30 to 60 % correctly and stays there, which leaves room to learn by
reinforcement: every slip can be unlearned, none is out of reach.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from tppo.data.problem import Problem

NAMES = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZαβγδεζηθικλμνξοπρστυφχψωабвгдежзийклмнопрстуфхцчшщъыьэюя"
SYMBOLS = "0123456789=:;#$"
END = "$"
TOKENS_PER_STEP = 5
ANSWER_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class ArithmeticTask:
    """Problem number i is a function of (seed, i) alone, so every training run sees the same rows."""

    median_steps: float
    sigma: float
    """Standard deviation of the logarithm of the number of steps."""
    max_steps: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_steps < len(NAMES):
            raise ValueError(f"max_steps = {self.max_steps}: must lie between 1 and {len(NAMES) - 1}")

    @property
    def max_prompt_tokens(self) -> int:
        return 2 * (self.max_steps + 1) + 1

    def longest_prompt(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return self.max_prompt_tokens + tokenizer.num_special_tokens_to_add()

    @property
    def max_response_tokens(self) -> int:
        return TOKENS_PER_STEP * self.max_steps + ANSWER_TOKENS

    def operands(self, number: int) -> list[int]:
        rng = np.random.default_rng((self.seed, number))
        steps = round(self.median_steps * math.exp(self.sigma * rng.standard_normal()))
        return rng.integers(0, 10, 1 + min(max(steps, 1), self.max_steps)).tolist()

    def problem(self, number: int) -> Problem:
        operands = self.operands(number)
        prompt = "".join(f"{NAMES[i]}{x}" for i, x in enumerate(operands)) + "="
        return Problem(prompt, str(sum(operands) % 10))


def worked_solution(operands: Sequence[int]) -> str:
    return _working(operands, [0] * len(operands))


def careless_solution(operands: Sequence[int], slip_probability: float, rng: np.random.Generator) -> str:
    """As `worked_solution`, but one too high, with `slip_probability`, wherever 3 total + 7 operand is divisible
    by 8 (12 or 13 of the 100 pairs); the working goes on from the wrong total."""
    slips, total = [0], operands[0]
    for operand in operands[1:]:
        slip = int((3 * total + 7 * operand) % 8 == 0 and rng.random() < slip_probability)
        total = (total + operand + slip) % 10
        slips.append(slip)
    return _working(operands, slips)


def _working(operands: Sequence[int], slips: Sequence[int]) -> str:
    total, lines = operands[0], []
    for position in range(1, len(operands)):
        total = (total + operands[position] + slips[position]) % 10
        lines.append(f"{NAMES[position]}{operands[position]}:{total};")
    return "".join(lines) + f"#{total}{END}"


def verify(problem: Problem, response: str) -> bool:
    """Whether the response ends with the right final answer. The working is not looked at."""
    return response.endswith(f"#{problem.answer}{END}")
