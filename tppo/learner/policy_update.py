"""The policy's update: epochs of mini-batches, each summed over micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from tppo.algorithms.aggregation import token_weights
from tppo.algorithms.ewma import ProximalPolicy
from tppo.algorithms.geppo import clip_width, reuse_weights
from tppo.algorithms.objectives import (
    PolicyLoss,
    additive_clip_loss,
    clipped_loss,
    decoupled_loss,
    k1_kl,
    k3_kl,
)
from tppo.algorithms.recipes import Recipe
from tppo.config import RunConfig
from tppo.learner.batch import MicroBatch, Spans, in_micro_batches, mini_batches, pick
from tppo.learner.estimates import PolicyBatch, score_log_probs
from tppo.learner.mismatch import importance_weights, mismatch_metrics
from tppo.learner.step import step_optimizer
from tppo.models.policy import token_log_probs


@dataclass
class Sums:
    """Running totals of a step, for its metrics."""

    tokens: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    largest_ratio: float = 0.0
    detached_tokens: int = 0
    losses: list[dict[str, float]] = field(default_factory=list)
    """A row per gradient step."""
    norms: list[float] = field(default_factory=list)
    unchanged: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(engine's, trainer's) log-probabilities of tokens scored before the first gradient step."""

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value)

    def mean(self, name: str) -> float | None:
        return self.totals[name] / self.tokens if self.tokens else None


def update_policy(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: PolicyBatch,
    recipe: Recipe,
    config: RunConfig,
    pad_token_id: int,
    generator: torch.Generator,
    proximal: ProximalPolicy | None = None,
) -> dict[str, Any]:
    """Train on the batch's masked tokens; earlier windows of a row are context only. Returns actor/* metrics."""
    sums = Sums()
    count = len(batch.spans.rows)
    for _ in range(config.train.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        for members in mini_batches(order, config.train.mini_batches):
            if not batch.mask[members].any():
                continue
            optimizer.zero_grad()
            sums.losses.append({})
            _accumulate(model, batch, members, recipe, config, pad_token_id, proximal, sums)
            sums.norms.append(step_optimizer(model, optimizer, config, "policy"))
            batch.spans.work.updates += 1
            if proximal is not None:
                proximal.update(model)
    return {**_metrics(sums, config), **_mismatch(sums, batch, recipe)}


def total_variation(model: PreTrainedModel, batch: PolicyBatch, config: RunConfig, pad_token_id: int) -> float:
    """0.5 E_nu |pi / pi_{k-i} - pi_k / pi_{k-i}| over the batch's tokens, after the update (GePPO)."""
    after = score_log_probs(model, batch.spans, config, pad_token_id)
    moved = ((after - batch.behaviour).exp() - (batch.current - batch.behaviour).exp()).abs()
    weights = token_weights(batch.mask, "token-mean") * batch.row_weights[:, None]
    return 0.5 * float((weights * moved).sum())


def additive_width(recipe: Recipe) -> float:
    return clip_width(recipe.clip[0], reuse_weights(recipe.reuse))


def _accumulate(
    model: PreTrainedModel,
    batch: PolicyBatch,
    members: Sequence[int],
    recipe: Recipe,
    config: RunConfig,
    pad_token_id: int,
    proximal: ProximalPolicy | None,
    sums: Sums,
) -> None:
    """Gradients of one mini-batch, micro-batch by micro-batch."""
    spans, algorithm = batch.spans, config.algorithm
    weights = torch.zeros(batch.mask.shape)
    weights[members] = token_weights(batch.mask[members], recipe.aggregation) * batch.row_weights[members, None]
    wanted = batch.mask.any(1)
    imitated = positive_examples(spans, recipe, config)
    if imitated is not None:
        responses, demonstrated = imitated
        lm_weights = torch.zeros(demonstrated.shape)
        lm_weights[members] = token_weights(demonstrated[members], "token-mean")
        wanted = wanted | demonstrated.any(1)
    for group, detached in _groups(spans, [i for i in members if wanted[i]], config):
        part = pick(spans, group, batch.mask, pad_token_id)
        row, column, targets = part.row, part.column, part.targets
        if imitated is not None:
            examples = pick(responses, group, demonstrated, pad_token_id)
            row, column = torch.cat([row, examples.row]), torch.cat([column, examples.column])
            targets = torch.cat([targets, examples.targets])
            spans.work.outputs += len(examples.targets)
        prefix = None
        if detached:
            prefix = torch.tensor([spans.rows[i].context_before - 1 for i in group])
            sums.detached_tokens += int(prefix.sum())
        scored = token_log_probs(
            model, part.input_ids, row, column, targets, config.rollout.temperature,
            prefix_tokens=prefix, entropy_gradient=algorithm.entropy_coef > 0,
        )  # fmt: skip
        picked = len(part.targets)
        log_probs, entropy = scored.log_probs[:picked], scored.entropy[:picked]
        here = batch.mask[group]
        token_weight = weights[group][here]
        behaviour = batch.behaviour[group][here]
        result = _objective(log_probs, batch, group, here, token_weight, recipe, config, proximal, part)
        terms = {"pg_loss": result.loss}
        if algorithm.entropy_coef:
            terms["entropy_loss"] = -algorithm.entropy_coef * (token_weight * entropy).sum()
        if batch.reference is not None:
            penalty = k3_kl(log_probs, batch.reference[group][here])
            terms["kl_loss"] = algorithm.kl_coef * (token_weight * penalty).sum()
        if imitated is not None and demonstrated[group].any():
            nll = -(lm_weights[group][demonstrated[group]] * scored.log_probs[picked:]).sum()
            terms["lm_loss"] = _lm_coef(recipe, config) * nll
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        spans.work.backward(part.lengths, outputs=len(targets), detached=None if prefix is None else prefix.tolist())
        for name, value in terms.items():
            sums.losses[-1][name] = sums.losses[-1].get(name, 0.0) + value.item()
        sums.tokens += picked
        with torch.no_grad():
            if not sums.norms:
                own = batch.sampled_now[group][here]
                sums.unchanged.append((behaviour[own], log_probs.detach()[own]))
            sums.add(
                low=result.clipped_low.item(), high=result.clipped_high.item(), entropy=entropy.sum().item(),
                k1=k1_kl(log_probs, behaviour).sum().item(), k3=k3_kl(behaviour, log_probs).sum().item(),
            )  # fmt: skip
        sums.largest_ratio = max(sums.largest_ratio, result.ratio_max.item())


def _objective(
    log_probs: Float[Tensor, " picked"],
    batch: PolicyBatch,
    group: Sequence[int],
    here: Bool[Tensor, "members time"],
    weights: Float[Tensor, " picked"],
    recipe: Recipe,
    config: RunConfig,
    proximal: ProximalPolicy | None,
    part: MicroBatch,
) -> PolicyLoss:
    behaviour, advantages = batch.behaviour[group][here], batch.advantages[group][here]
    current = batch.current[group][here]
    if recipe.objective == "additive_clip":
        return additive_clip_loss(log_probs, current, behaviour, advantages, weights, epsilon=additive_width(recipe))
    if recipe.objective == "clip":
        weights = weights * importance_weights(current, behaviour, recipe.importance_cap)
        return clipped_loss(
            log_probs, current, advantages, weights, clip=recipe.clip, dual_clip=config.algorithm.dual_clip
        )
    if recipe.proximal == "ewma":
        assert proximal is not None, "the recipe needs a proximal policy"
        batch.spans.work.forward(part.lengths, outputs=len(part.targets))
        with torch.no_grad():
            current = token_log_probs(
                proximal.model, part.input_ids, part.row, part.column, part.targets, config.rollout.temperature
            ).log_probs
    return decoupled_loss(log_probs, current, behaviour, advantages, weights, clip=recipe.clip)


def _groups(spans: Spans, members: list[int], config: RunConfig) -> list[tuple[list[int], bool]]:
    """Micro-batches, and whether their prefix is detached: only rows resumed from an earlier step have one."""
    budget = config.train.micro_batch_tokens
    if config.algorithm.prefix == "gradient":
        return [(group, False) for group in in_micro_batches(spans, members, budget)]
    resumed = [i for i in members if spans.first[i] > 0]
    fresh = [i for i in members if spans.first[i] == 0]
    return [(group, False) for group in in_micro_batches(spans, fresh, budget)] + [
        (group, True) for group in in_micro_batches(spans, resumed, budget)
    ]


def positive_examples(
    spans: Spans, recipe: Recipe, config: RunConfig
) -> tuple[Spans, Bool[Tensor, "rows time"]] | None:
    """All response tokens of the rows that finished with a positive reward: what the LM loss imitates (VAPO).
    None without that loss."""
    if not _lm_coef(recipe, config):
        return None
    responses = Spans.responses(spans.rows)
    good = torch.tensor([row.finished and (row.reward or 0.0) > 0 for row in spans.rows])
    return responses, responses.valid & good[:, None]


def _lm_coef(recipe: Recipe, config: RunConfig) -> float:
    own = config.algorithm.lm_loss_coef
    return recipe.lm_loss_coef if own is None else own


def _mismatch(sums: Sums, batch: PolicyBatch, recipe: Recipe) -> dict[str, float | None]:
    """rollout_corr/*: over all tokens where the trainer recomputed them, else over those of the first mini-batch,
    which cost nothing more."""
    if batch.recomputed:
        rollout, trainer = batch.behaviour[batch.sampled_now], batch.current[batch.sampled_now]
    elif sums.unchanged:
        rollout, trainer = (torch.cat(column) for column in zip(*sums.unchanged, strict=True))
    else:
        rollout = trainer = torch.empty(0)
    metrics = mismatch_metrics(rollout, trainer)
    if recipe.importance_cap and batch.mask.any():
        weights = importance_weights(batch.current, batch.behaviour, recipe.importance_cap)[batch.mask]
        metrics["rollout_corr/is_mean"] = weights.mean().item()
        metrics["rollout_corr/is_capped_share"] = (weights >= recipe.importance_cap).float().mean().item()
    return metrics


def _metrics(sums: Sums, config: RunConfig) -> dict[str, Any]:
    """actor/*: means over the trained tokens or over the gradient steps; null when nothing trained."""

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    def term(name: str) -> float | None:
        return mean([losses[name] for losses in sums.losses if name in losses])

    low, high = sums.mean("low"), sums.mean("high")
    return {
        "actor/pg_loss": term("pg_loss"),
        "actor/entropy_loss": term("entropy_loss"),
        "actor/kl_loss": term("kl_loss"),
        "actor/lm_loss": term("lm_loss"),
        "actor/pg_clipfrac": None if low is None or high is None else low + high,
        "actor/pg_clipfrac_low": low,
        "actor/pg_clipfrac_high": high,
        "actor/ppo_kl": sums.mean("k1"),
        "actor/approx_kl": sums.mean("k3"),
        "actor/ratio_max": sums.largest_ratio if sums.tokens else None,
        "actor/entropy": sums.mean("entropy"),
        "actor/grad_norm": mean(sums.norms),
        "training/trained_tokens": sums.tokens // config.train.epochs,
        "training/detached_tokens": sums.detached_tokens // config.train.epochs,
    }
