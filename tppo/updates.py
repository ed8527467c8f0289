"""One pass of optimisation over a step's rows: advantages and targets, then policy and value, each on its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tppo.algorithms.advantages import egae, length_adaptive_lambda, monte_carlo_returns, whiten
from tppo.algorithms.losses import policy_loss, token_weights, value_loss
from tppo.algorithms.masks import drop_trailing, window_mask
from tppo.algorithms.recipes import Recipe
from tppo.batching import micro_batches, pad_right
from tppo.config import RunConfig
from tppo.models.policy import token_log_probs
from tppo.models.value import ValueModel
from tppo.rollout.rows import Row

# Shapes: rows = responses of the step, time = the widest window (or response); tokens = those picked, flattened.


@dataclass(frozen=True)
class Advantages:
    """What the policy's update needs, window by window."""

    values: Float[Tensor, "rows time"]
    advantages: Float[Tensor, "rows time"]
    """Whitened and clamped, as the recipe says."""
    returns: Float[Tensor, "rows time"]
    """A + V before whitening: the value target `gae_return`."""
    mask: Bool[Tensor, "rows time"]
    """Tokens of the window that train the policy."""


def score_rows(value_model: ValueModel, rows: Sequence[Row], config: RunConfig, pad_token_id: int) -> None:
    """Append V(s_t) of every token of each row's window to `row.values`. The whole row is forwarded."""
    lengths = [row.all_tokens - 1 for row in rows]  # V(s_t) is read at the token before a_t; the last has none
    with torch.inference_mode():
        for group in micro_batches(lengths, config.train.micro_batch_tokens):
            members = [rows[i] for i in group]
            input_ids = pad_right([_inputs(row) for row in members], pad_token_id)
            width = input_ids.shape[1]
            positions = [
                index * width + row.context_before - 1 + t
                for index, row in enumerate(members)
                for t in range(row.window_tokens)
            ]
            values = value_model(input_ids, torch.tensor(positions)).tolist()
            for row in members:
                row.values += values[: row.window_tokens]
                values = values[row.window_tokens :]


def compute_advantages(rows: Sequence[Row], recipe: Recipe, config: RunConfig) -> Advantages:
    """EGAE over each row's window, then the recipe's mask, whitening and clamp. For rows that all finished in one
    window EGAE is GAE."""
    algorithm = config.algorithm
    tokens = torch.tensor([row.window_tokens for row in rows])
    finished = torch.tensor([row.finished for row in rows])
    width = int(tokens.max())
    valid = window_mask(tokens, width)  # (rows, time)
    values, rewards = torch.zeros(len(rows), width), torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        values[index, : row.window_tokens] = torch.tensor(row.values[row.window_start :])
        if row.finished:
            assert row.reward is not None, "a finished row was not graded"
            rewards[index, row.window_tokens - 1] = row.reward
    lam: float | Tensor = recipe.lam if algorithm.lam is None else algorithm.lam
    if algorithm.adaptive_lambda_alpha is not None:
        lam = length_adaptive_lambda(
            torch.tensor([len(row.response_ids) for row in rows]),
            finished,
            window=config.rollout.window,
            alpha=algorithm.adaptive_lambda_alpha,
            floor=algorithm.adaptive_lambda_floor,
        )
    raw = egae(rewards, values, valid, finished, gamma=recipe.gamma, lam=lam)
    mask = valid
    if recipe.truncated:
        mask = drop_trailing(valid, tokens, finished, algorithm.trailing_tokens)
    advantages = whiten(raw, mask) if recipe.whiten_advantages else raw
    if recipe.clamp_advantages is not None:
        advantages = advantages.clamp(-recipe.clamp_advantages, recipe.clamp_advantages)
    return Advantages(values, advantages, raw + values, mask)


def value_targets(rows: Sequence[Row], recipe: Recipe, estimates: Advantages) -> tuple[list[Row], list[list[float]]]:
    """The rows that train the value model and a target for each of their tokens.

    gae_return: every row, its window's A + V. monte_carlo: rows that finished in this step, all tokens of all
    windows, the return.
    """
    if recipe.value_target == "gae_return":
        targets = estimates.returns.tolist()
        return list(rows), [t[: row.window_tokens] for t, row in zip(targets, rows, strict=True)]
    return monte_carlo_targets(rows, recipe.gamma)


def monte_carlo_targets(rows: Sequence[Row], gamma: float) -> tuple[list[Row], list[list[float]]]:
    done = [row for row in rows if row.finished]
    if not done:
        return [], []
    lengths = torch.tensor([len(row.response_ids) for row in done])
    rewards = torch.tensor([float(row.reward or 0.0) for row in done])
    targets = monte_carlo_returns(rewards, window_mask(lengths, int(lengths.max())), gamma).tolist()
    return done, [t[: len(row.response_ids)] for t, row in zip(targets, done, strict=True)]


def update_policy(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    estimates: Advantages,
    recipe: Recipe,
    config: RunConfig,
    pad_token_id: int,
    order: Sequence[int],
) -> dict[str, float]:
    """One epoch of mini-batches in `order`. Earlier windows of a row are context only. Returns actor/* metrics."""
    weights_all = torch.zeros_like(estimates.advantages)
    size = len(rows) // config.train.mini_batches
    tokens = clipped = kl_sum = entropy_sum = loss_sum = 0.0
    norms = []
    for start in range(0, len(rows), size):
        members = list(order[start : start + size])
        mask = estimates.mask[members]
        if not mask.any():
            continue
        weights_all[members] = token_weights(mask, recipe.aggregation)
        members = [i for i in members if estimates.mask[i].any()]
        optimizer.zero_grad()
        for group in micro_batches([rows[i].all_tokens - 1 for i in members], config.train.micro_batch_tokens):
            chosen = [members[i] for i in group]
            input_ids = pad_right([_inputs(rows[i]) for i in chosen], pad_token_id)
            width = input_ids.shape[1]
            positions, targets, old = [], [], []
            for index, i in enumerate(chosen):
                row = rows[i]
                picked = estimates.mask[i].nonzero().flatten().tolist()
                positions += [index * width + row.context_before - 1 + t for t in picked]
                targets += [row.response_ids[row.window_start + t] for t in picked]
                old += [row.log_probs[t] for t in picked]
            log_probs, entropy = token_log_probs(
                model, input_ids, torch.tensor(positions), torch.tensor(targets), config.rollout.temperature
            )
            part = estimates.mask[chosen]
            result = policy_loss(
                log_probs, torch.tensor(old), estimates.advantages[chosen][part], weights_all[chosen][part],
                clip=recipe.clip, dual_clip=config.algorithm.dual_clip,
            )  # fmt: skip
            result.loss.backward()
            loss_sum += result.loss.item()
            clipped += result.clipped_tokens
            kl_sum += result.kl_sum
            entropy_sum += entropy.sum().item()
            tokens += len(targets)
        norms.append(_step(model, optimizer, config))
    share = 1 / tokens if tokens else math.nan
    return {
        "actor/pg_loss": loss_sum / max(len(norms), 1) if norms else math.nan,
        "actor/pg_clipfrac": clipped * share,
        "actor/ppo_kl": kl_sum * share,
        "actor/entropy": entropy_sum * share,
        "actor/grad_norm": sum(norms) / len(norms) if norms else math.nan,
        "training/trained_tokens": int(tokens),
    }


def update_value(
    model: ValueModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    targets: Sequence[Sequence[float]],
    recipe: Recipe,
    config: RunConfig,
    pad_token_id: int,
    order: Sequence[int],
    mini_batches: int,
    clip: float | None,
) -> dict[str, float]:
    """One epoch over `rows`; `targets[i]` covers the last len(targets[i]) response tokens of row i. No rows: no
    step, and no metrics."""
    if not rows:
        return {}
    size = math.ceil(len(rows) / mini_batches)
    losses, norms = [], []
    for start in range(0, len(rows), size):
        members = list(order[start : start + size])
        counts = torch.tensor([len(targets[i]) for i in members])
        weights = token_weights(window_mask(counts, int(counts.max())), recipe.aggregation)
        optimizer.zero_grad()
        total = 0.0
        for group in micro_batches([rows[i].all_tokens - 1 for i in members], config.train.micro_batch_tokens):
            chosen = [members[i] for i in group]
            input_ids = pad_right([_inputs(rows[i]) for i in chosen], pad_token_id)
            width = input_ids.shape[1]
            positions: list[int] = []
            wanted: list[float] = []
            old: list[float] = []
            token_weight: list[Tensor] = []
            for index, (place, i) in enumerate(zip(group, chosen, strict=True)):
                count = len(targets[i])
                first = index * width + rows[i].all_tokens - count - 1
                positions += range(first, first + count)
                wanted += targets[i]
                old += rows[i].values[len(rows[i].values) - count :]
                token_weight.append(weights[place, :count])
            loss = value_loss(
                model(input_ids, torch.tensor(positions)), torch.tensor(wanted), torch.cat(token_weight),
                old_values=None if clip is None else torch.tensor(old), clip=clip,
            )  # fmt: skip
            loss.backward()
            total += loss.item()
        norms.append(_step(model, optimizer, config))
        losses.append(total)
    return {"critic/vf_loss": sum(losses) / len(losses), "critic/grad_norm": sum(norms) / len(norms)}


def _inputs(row: Row) -> list[int]:
    """All tokens but the last, which predicts nothing that is trained."""
    return [*row.prompt_ids, *row.response_ids][:-1]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig) -> float:
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
    optimizer.step()
    return float(norm)
