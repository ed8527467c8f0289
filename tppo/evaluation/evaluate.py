"""Samples answers to held-out problems and grades them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from tppo.config import RunConfig
from tppo.data.problem import Problem, prompt_ids
from tppo.evaluation.graded import Graded
from tppo.evaluation.votes import votes
from tppo.parallel.ranks import SINGLE, Ranks
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
    ranks: Ranks = SINGLE,
) -> Graded:
    """`samples` answers to each problem; those that do not fit the engine's slots wait. With `sampling.seed`,
    training's random state is not touched. A response that the engine gives up is graded as it is.

    Ranks share the responses out. on_end: called with the number of a rank's that ended together, and of all of them.
    """
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    requests = [
        Request(problem * samples + sample, prompt, 0, max_response_tokens)
        for problem, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    mine = requests[ranks.rank :: ranks.world]

    def answered() -> list[_Answered]:
        engine.submit(mine, sampling)
        done: dict[int, Completion] = {}
        while ended := engine.run_until_a_row_ends():
            done |= {completion.row: completion for completion in ended}
            on_end(len(ended), len(mine))
        engine.take_records()
        completions = [done[request.row] for request in mine]
        responses = [str(tokenizer.decode(completion.token_ids)) for completion in completions]
        grades = reward.grade([problems[request.row // samples] for request in mine], responses)
        return [
            _Answered(done.row, len(done.token_ids), done.reason, grade.correct, given)
            for done, grade, given in zip(completions, grades, answers_of(reward, responses), strict=True)
        ]

    everyones = sorted((each for part in ranks.everyones(answered) for each in part), key=lambda each: each.row)
    shape = (len(problems), samples)
    given = [each.given for each in everyones]
    by_problem = [given[first : first + samples] for first in range(0, len(given), samples)]
    correct = np.array([each.correct for each in everyones], dtype=bool).reshape(shape)
    return Graded(
        tokens=np.array([each.tokens for each in everyones]).reshape(shape),
        finished=np.array([each.reason == "stop" for each in everyones]).reshape(shape),
        cut=np.array([each.reason == "budget" for each in everyones]).reshape(shape),
        correct=correct,
        answers=votes(by_problem, correct, reward, ranks),
    )


@dataclass(frozen=True)
class _Answered:
    row: int
    tokens: int
    reason: str
    correct: bool
    given: str | None


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
