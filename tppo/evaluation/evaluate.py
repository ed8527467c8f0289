"""Samples answers to held-out problems and grades them."""

from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from tppo.config import RunConfig
from tppo.data.problem import Problem, prompt_ids
from tppo.evaluation.graded import Graded
from tppo.rewards.protocol import Reward, answers_of
from tppo.rollout.protocol import Completion, Request, RolloutEngine, Sampling


def evaluate(
    engine: RolloutEngine,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    reward: Reward,
    *,
    max_response_tokens: int,
    samples: int = 1,
    on_end: Callable[[int, int], None] = lambda ended, of: None,
) -> Graded:
    """`samples` answers to each problem; those that do not fit the engine's slots wait. With `sampling.seed`,
    training's random state is not touched. A response that the engine gives up is graded as it is.

    on_end: called with the number of responses that ended together, and of all.
    """
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    requests = [
        Request(problem * samples + sample, prompt, 0, max_response_tokens)
        for problem, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    engine.submit(requests, sampling)
    done: dict[int, Completion] = {}
    while ended := engine.run_until_a_row_ends():
        done |= {completion.row: completion for completion in ended}
        on_end(len(ended), len(requests))
    engine.take_records()
    completions = [done[row] for row in range(len(requests))]
    responses = [str(tokenizer.decode(completion.token_ids)) for completion in completions]
    grades = reward.grade([problem for problem in problems for _ in range(samples)], responses)
    given = answers_of(reward, responses)
    shape = (len(problems), samples)
    return Graded(
        tokens=np.array([len(completion.token_ids) for completion in completions]).reshape(shape),
        finished=np.array([completion.reason == "stop" for completion in completions]).reshape(shape),
        cut=np.array([completion.reason == "budget" for completion in completions]).reshape(shape),
        correct=np.array([grade.correct for grade in grades], dtype=bool).reshape(shape),
        answers=[given[first : first + samples] for first in range(0, len(given), samples)],
    )


def evaluation_sampling(config: RunConfig, training: Sampling, seed: int) -> Sampling:
    """As [evaluation] says, and as training where it says nothing."""
    own = config.evaluation
    return Sampling(
        training.temperature if own.temperature is None else own.temperature,
        training.top_p if own.top_p is None else own.top_p,
        training.top_k if own.top_k is None else own.top_k,
        training.stop_token_ids,
        seed,
        training.by_row,
    )


def evaluation_slots(config: RunConfig, problems: int) -> int:
    """Responses under way at once during training: one of each problem, and up to a rollout's if there are more; never
    more than rollout.max_rows_per_engine."""
    most = config.rollout.max_rows_per_engine or max(problems, config.rows_per_step)
    return min(problems * config.evaluation.samples, most)


def longest_prompt_of(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest prompt, special ones included; 0 without problems."""
    return max((len(prompt_ids(tokenizer, problem)) for problem in problems), default=0)
