"""Evaluates a model outside of training: loads it, asks the held-out problems, grades the answers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tppo.config import RunConfig
from tppo.data.problem import Problem
from tppo.data.tasks import evaluation_problems
from tppo.evaluation.evaluate import evaluate, evaluation_sampling, evaluation_slots, longest_prompt_of
from tppo.evaluation.graded import Graded
from tppo.models.policy import load_policy, own_stops
from tppo.parallel.ranks import device_of
from tppo.rewards.make import reward_of
from tppo.rollout.engines import check_rows_fit, make_engine, sampling_of
from tppo.rollout.protocol import Sampling


@dataclass(frozen=True)
class Evaluation:
    problems: Sequence[Problem]
    graded: Graded
    sampling: Sampling


def evaluate_model(
    config: RunConfig, *, seed: int, on_end: Callable[[int, int], None] = lambda ended, of: None
) -> Evaluation:
    """`config.evaluation.samples` answers of the model at `config.model.path` to each held-out problem.

    On one machine, `seed` decides every token, together with how many responses are under way at once. With the seed,
    samples and settings of an evaluation during training, on the torch engine, it repeats that one. Raises ConfigError
    before anything is sampled.
    """
    torch.set_num_threads(config.train.threads)
    policy, tokenizer = load_policy(config.model.path, trust_remote_code=config.model.trust_remote_code)
    policy.requires_grad_(False)
    policy.to(device_of(config.model.device))  # type: ignore[arg-type]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never attended to; any token will do
    problems = evaluation_problems(config, tokenizer)
    longest_prompt = longest_prompt_of(problems, tokenizer)
    check_rows_fit(config, policy, tokenizer, longest_prompt)
    sampling = evaluation_sampling(config, sampling_of(config, tokenizer, own_stops=own_stops(policy)), seed)
    engine = make_engine(
        config, policy, tokenizer, model_path=config.model.path,
        slots=evaluation_slots(config, len(problems)),
        max_tokens=longest_prompt + config.rollout.max_response_tokens,
        generator=torch.Generator().manual_seed(seed), clock=time.perf_counter,
    )  # fmt: skip
    with reward_of(config, tokenizer, own_stops=own_stops(policy)) as reward:
        graded = evaluate(
            engine, sampling, tokenizer, problems, reward, max_response_tokens=config.rollout.max_response_tokens,
            samples=config.evaluation.samples, on_end=on_end,
        )  # fmt: skip
    return Evaluation(problems, graded, sampling)
