"""From graded rows to what the updates need: values, log-probabilities, advantages, value targets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tppo.algorithms.advantages import egae, vtrace_gae
from tppo.algorithms.aggregation import age_weights
from tppo.algorithms.geppo import reuse_weights
from tppo.algorithms.lambdas import length_adaptive_lambda
from tppo.algorithms.masks import drop_trailing
from tppo.algorithms.normalise import clamp, normalise_reused, whiten
from tppo.algorithms.objectives import ratio_of
from tppo.algorithms.recipes import Recipe
from tppo.algorithms.returns import monte_carlo_returns, vtrace_returns
from tppo.algorithms.rewards import group_relative, overlong_penalty
from tppo.config import RunConfig
from tppo.learner.batch import MicroBatch, Spans, forward_spans
from tppo.models.policy import token_log_probs
from tppo.models.value import ValueModel
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.rollout.rows import Row

ALPHA_TIMES_MAXIMUM = 0.05 * 24576
"""VAPO's alpha belongs to responses of up to 24,576 tokens; it scales with the maximum."""


@dataclass(frozen=True)
class PolicyBatch:
    """What the policy's update needs."""

    spans: Spans
    mask: Bool[Tensor, "rows time"]
    """Tokens that train the policy."""
    behaviour: Float[Tensor, "rows time"]
    """Log-probabilities under the policies that sampled the tokens."""
    current: Float[Tensor, "rows time"]
    """Under the policy at the start of the step; `behaviour` where the recipe needs no forward pass of its own."""
    sampled_now: Bool[Tensor, "rows time"]
    """Tokens sampled by the policy at the start of the step: on them, `behaviour` and `current` should agree."""
    recomputed: bool
    """Whether `current` is the trainer's own."""
    advantages: Float[Tensor, "rows time"]
    """Normalised and clamped, as the recipe says."""
    row_weights: Float[Tensor, " rows"]
    """Factor on a row's tokens; 1 without reuse."""
    reference: Float[Tensor, "rows time"] | None
    """Log-probabilities under the reference policy; None without a KL penalty."""


@dataclass(frozen=True)
class ValueBatch:
    """What the value model's update needs; no rows when no row finished."""

    spans: Spans
    targets: Float[Tensor, "rows time"]
    old_values: Float[Tensor, "rows time"]
    """As stored when the token's window was first scored."""
    row_weights: Float[Tensor, " rows"]


def policy_spans(rows: Sequence[Row], recipe: Recipe) -> Spans:
    """What trains the policy: this step's tokens of every row, or all tokens of the rows that finished."""
    if recipe.policy_tokens == "finished_rows":
        return Spans.responses([row for row in rows if row.finished])
    return Spans.windows(rows)


def score_values(
    value_model: ValueModel, spans: Spans, config: RunConfig, pad_token_id: int, ranks: Ranks = SINGLE
) -> None:
    """Store V(s_t) of every token of the spans in its row. The whole row is forwarded."""
    table = forward_spans(
        spans,
        lambda part: value_model(part.input_ids, part.row, part.column),
        config.value.micro_batch_tokens or config.train.micro_batch_tokens,
        pad_token_id,
        ranks,
    ).tolist()
    for index, row in enumerate(spans.rows):
        first, count = int(spans.first[index]), int(spans.tokens[index])
        row.values[first : first + count] = table[index][:count]


def score_log_probs(
    model: PreTrainedModel, spans: Spans, config: RunConfig, pad_token_id: int, ranks: Ranks = SINGLE
) -> Float[Tensor, "rows time"]:
    """Log-probabilities of the spans' tokens under `model`."""

    def forward(part: MicroBatch) -> Float[Tensor, " picked"]:
        return token_log_probs(
            model, part.input_ids, part.row, part.column, part.targets, config.rollout.temperature
        ).log_probs

    return forward_spans(spans, forward, config.train.micro_batch_tokens, pad_token_id, ranks)


def estimate(
    spans: Spans,
    ages: Int[Tensor, " rows"],
    recipe: Recipe,
    config: RunConfig,
    *,
    policy_version: int,
    current: Float[Tensor, "rows time"] | None = None,
    reference: Float[Tensor, "rows time"] | None = None,
) -> tuple[PolicyBatch, ValueBatch]:
    """Advantages over the spans and the value model's targets.

    ages: steps since a row was generated (0 without reuse). policy_version: at the start of the step. current:
    log-probabilities under that policy, where the recipe asks for them.
    """
    algorithm = config.algorithm
    valid, finished = spans.valid, spans.finished
    behaviour = spans.laid_out(lambda row: row.log_probs)
    now = behaviour if current is None else current
    values = spans.laid_out(lambda row: row.values) if recipe.has_value_model else torch.zeros(valid.shape)
    rewards = terminal_rewards(spans, recipe, config)  # (rows, time)
    ratios = ratio_of(now, behaviour)
    lam = actor_lambda(spans, recipe, config)
    if recipe.advantage == "group_relative":
        groups = torch.tensor([row.group for row in spans.rows], dtype=torch.long)
        raw = torch.where(valid, group_relative(rewards.sum(1), groups)[:, None], 0.0)
    elif recipe.advantage == "vtrace_gae":
        raw = vtrace_gae(rewards, values, valid, ratios, gamma=recipe.gamma, lam=lam)
    else:
        raw = egae(rewards, values, valid, finished, gamma=recipe.gamma, lam=lam)
    mask = valid
    if recipe.truncated and recipe.policy_tokens == "window":
        mask = drop_trailing(valid, spans.tokens, finished, algorithm.trailing_tokens)
    row_weights = torch.ones(len(spans.rows))
    if recipe.reuse > 1:
        nu = torch.tensor(reuse_weights(recipe.reuse), dtype=torch.float32)
        row_weights = age_weights(mask, ages, nu)
    advantages = raw
    if algorithm.normalise_advantages and recipe.normalise == "whiten":
        advantages = whiten(raw, mask)
    elif algorithm.normalise_advantages and recipe.normalise == "reuse":
        advantages = normalise_reused(raw, mask, ratios * row_weights[:, None])
    bound = recipe.clamp_advantages if algorithm.clamp_advantages is None else algorithm.clamp_advantages
    advantages = clamp(advantages, bound)
    policy = PolicyBatch(
        spans, mask, behaviour, now, spans.sampled_by(policy_version), current is not None, advantages, row_weights,
        reference,
    )  # fmt: skip
    if recipe.value_target == "monte_carlo":
        return policy, monte_carlo_batch([row for row in spans.rows if row.finished], recipe.gamma)
    targets = vtrace_returns(raw, values, ratios) if recipe.value_target == "vtrace_return" else raw + values
    return policy, ValueBatch(spans, targets, values, row_weights)


def monte_carlo_batch(finished: Sequence[Row], gamma: float) -> ValueBatch:
    """All response tokens of finished rows, with their returns. The verifier's reward, without shaping."""
    spans = Spans.responses(finished)
    rewards = torch.tensor([float(row.reward or 0.0) for row in finished])
    targets = monte_carlo_returns(rewards, spans.valid, gamma)
    return ValueBatch(spans, targets, spans.laid_out(stored_values), torch.ones(len(finished)))


def stored_values(row: Row) -> Sequence[float]:
    """Before the first scoring (value pre-training) a value counts as 0, which is what a new head gives."""
    return row.values if len(row.values) == len(row.response_ids) else [0.0] * len(row.response_ids)


def terminal_rewards(spans: Spans, recipe: Recipe, config: RunConfig) -> Float[Tensor, "rows time"]:
    """The verifier's reward, and the overlong penalty where the recipe has one, on a finished row's last token."""
    algorithm, longest = config.algorithm, config.rollout.max_response_tokens
    share = round(recipe.overlong_share * longest)
    cache = share if algorithm.overlong_cache_tokens is None else algorithm.overlong_cache_tokens
    lengths = torch.tensor([len(row.response_ids) for row in spans.rows], dtype=torch.long)
    penalty = overlong_penalty(lengths, max_response_tokens=longest, cache_tokens=cache)
    table = torch.zeros(spans.valid.shape)
    for index, row in enumerate(spans.rows):
        if row.finished:
            assert row.reward is not None, "a finished row was not graded"
            table[index, int(spans.tokens[index]) - 1] = row.reward + penalty[index]
    return table


def actor_lambda(spans: Spans, recipe: Recipe, config: RunConfig) -> float | Float[Tensor, " rows"]:
    """The policy's lambda: a number, or one per row. (The value model has its own: Monte-Carlo is lambda = 1.)"""
    algorithm = config.algorithm
    alpha = algorithm.adaptive_lambda_alpha
    if algorithm.lam is not None:
        return algorithm.lam
    if alpha is None and recipe.lam != "length_adaptive":
        return recipe.lam
    lengths = torch.tensor([len(row.response_ids) for row in spans.rows], dtype=torch.long)
    return length_adaptive_lambda(
        lengths,
        spans.finished,
        window=config.rollout.window,
        alpha=alpha or ALPHA_TIMES_MAXIMUM / config.rollout.max_response_tokens,
        floor=algorithm.adaptive_lambda_floor,
    )
