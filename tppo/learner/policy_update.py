"""The policy's update: epochs of mini-batches, each summed over micro-batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from tppo.algorithms.aggregation import token_weights
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
from tppo.learner.ewma import ProximalPolicy
from tppo.learner.finite import Found, check_loss, found_in, of_rows
from tppo.learner.mismatch import importance_weights, mismatch_metrics
from tppo.learner.step import step_optimizer
from tppo.models.dropout import Draws, draw_masks
from tppo.models.policy import Scored, token_log_probs
from tppo.parallel.ranks import SINGLE, Ranks


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

    def take(
        self, terms: Mapping[str, Tensor], log_probs: Tensor, entropy: Tensor, tokens: "_Tokens", result: PolicyLoss,
        *, detached_tokens: int,
    ) -> None:  # fmt: skip
        """Of one micro-batch."""
        for name, value in terms.items():
            self.losses[-1][name] = self.losses[-1].get(name, 0.0) + value.item()
        self.tokens += len(log_probs)
        self.detached_tokens += detached_tokens
        if not self.norms:
            own = tokens.sampled_now
            self.unchanged.append((tokens.behaviour[own].cpu(), log_probs[own].cpu()))
        self.add(
            low=result.clipped_low.item(), high=result.clipped_high.item(), entropy=entropy.sum().item(),
            k1=k1_kl(log_probs, tokens.behaviour).sum().item(), k3=k3_kl(tokens.behaviour, log_probs).sum().item(),
        )  # fmt: skip
        self.largest_ratio = max(self.largest_ratio, result.ratio_max.item())

    def mean(self, name: str) -> float | None:
        return self.totals[name] / self.tokens if self.tokens else None

    @classmethod
    def over(cls, parts: Sequence["Sums"]) -> "Sums":
        """Of all ranks, each with its share of every gradient step; norms are the same on all of them."""
        whole = cls(norms=parts[0].norms, losses=[{} for _ in parts[0].losses])
        for part in parts:
            whole.tokens += part.tokens
            whole.detached_tokens += part.detached_tokens
            whole.largest_ratio = max(whole.largest_ratio, part.largest_ratio)
            whole.unchanged += part.unchanged
            whole.add(**part.totals)
            for step, losses in zip(whole.losses, part.losses, strict=True):
                for name, value in losses.items():
                    step[name] = step.get(name, 0.0) + value
        return whole


def update_policy(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: PolicyBatch,
    recipe: Recipe,
    config: RunConfig,
    pad_token_id: int,
    generator: torch.Generator,
    proximal: ProximalPolicy | None = None,
    ranks: Ranks = SINGLE,
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
            dropout_seed = None
            if config.model.lora_dropout:
                dropout_seed = int(torch.randint(2**62, (), generator=generator))
            _accumulate(model, batch, members, recipe, config, pad_token_id, proximal, ranks, sums, dropout_seed)
            with of_rows([batch.spans.rows[i] for i in members]):
                sums.norms.append(step_optimizer(model, optimizer, config, "policy"))
            batch.spans.work.updates += 1
            if proximal is not None:
                proximal.update(model)
    sums = Sums.over(ranks.gather(sums))
    return {**_metrics(sums, config), **_mismatch(sums, batch, recipe)}


def total_variation(
    model: PreTrainedModel, batch: PolicyBatch, config: RunConfig, pad_token_id: int, ranks: Ranks = SINGLE
) -> float:
    """0.5 E_nu |pi / pi_{k-i} - pi_k / pi_{k-i}| over the batch's tokens, after the update (GePPO)."""
    after = score_log_probs(model, batch.spans, config, pad_token_id, ranks)
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
    ranks: Ranks,
    sums: Sums,
    dropout_seed: int | None,
) -> None:
    """Gradients of one mini-batch, micro-batch by micro-batch: this rank's, which sharding sums with the others'.
    dropout_seed: the same on all ranks; None: nothing is dropped."""
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
    for group, detached, counts in _groups(spans, [i for i in members if wanted[i]], config, ranks):
        part = pick(spans, group, batch.mask, pad_token_id, count=counts).to(ranks.device)
        asked, picked = part, len(part.targets)
        if imitated is not None:
            asked = _joined(part, pick(responses, group, demonstrated, pad_token_id).to(ranks.device))
            spans.work.outputs += (len(asked.targets) - picked) * counts
        prefix = [spans.rows[i].context_before - 1 for i in group] if detached else None
        if dropout_seed is not None:
            skipped = prefix or [0] * len(group)
            tokens_behind = [length - own for length, own in zip(part.lengths, skipped, strict=True)]
            draw_masks(model, Draws(dropout_seed, [spans.rows[i].row for i in group], tokens_behind))
        scored = token_log_probs(
            model, asked.input_ids, asked.row, asked.column, asked.targets, config.rollout.temperature,
            prefix_tokens=None if prefix is None else torch.tensor(prefix, device=ranks.device),
            entropy_gradient=algorithm.entropy_coef > 0,
        )  # fmt: skip
        log_probs, entropy = scored.log_probs[:picked], scored.entropy[:picked]
        tokens = _Tokens.of(batch, weights, group, ranks.device)
        result = _objective(log_probs, tokens, recipe, config, proximal, part)
        terms = {"pg_loss": result.loss}
        if algorithm.entropy_coef:
            terms["entropy_loss"] = -algorithm.entropy_coef * (tokens.weights * entropy).sum()
        if tokens.reference is not None:
            terms["kl_loss"] = algorithm.kl_coef * (tokens.weights * k3_kl(log_probs, tokens.reference)).sum()
        if imitated is not None and demonstrated[group].any():
            lm_weight = lm_weights[group][demonstrated[group]].to(ranks.device)
            terms["lm_loss"] = -_lm_coef(recipe, config) * (lm_weight * scored.log_probs[picked:]).sum()
        loss = torch.stack(list(terms.values())).sum()
        check_loss(loss, "policy", ranks, partial(_found, model, spans, group, asked, terms, scored, tokens))
        (loss * (ranks.world if counts else 0)).backward()  # shards take the mean over the ranks
        if not counts:
            continue
        spans.work.backward(part.lengths, outputs=len(asked.targets), detached=prefix)
        if recipe.proximal == "ewma":
            spans.work.forward(part.lengths, outputs=picked)  # of the proximal policy
        sums.take(terms, log_probs.detach(), entropy.detach(), tokens, result, detached_tokens=sum(prefix or []))


@dataclass(frozen=True)
class _Tokens:
    """What is known of a micro-batch's picked tokens, where it computes."""

    behaviour: Float[Tensor, " picked"]
    current: Float[Tensor, " picked"]
    advantages: Float[Tensor, " picked"]
    weights: Float[Tensor, " picked"]
    sampled_now: Bool[Tensor, " picked"]
    reference: Float[Tensor, " picked"] | None

    @classmethod
    def of(
        cls, batch: PolicyBatch, weights: Float[Tensor, "rows time"], group: Sequence[int], device: torch.device
    ) -> "_Tokens":
        here = batch.mask[group]
        tables = (batch.behaviour, batch.current, batch.advantages, weights, batch.sampled_now, batch.reference)
        return cls(*(None if table is None else table[group][here].to(device) for table in tables))  # type: ignore


def _found(
    model: PreTrainedModel, spans: Spans, group: Sequence[int], asked: MicroBatch, terms: Mapping[str, Tensor],
    scored: Scored, tokens: _Tokens,
) -> Found:  # fmt: skip
    """What is known of a micro-batch whose loss is not finite."""
    known = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    tensors = {
        **{name: getattr(asked, name) for name in ("input_ids", "row", "column", "targets")},
        **{name: tensor for name, tensor in known.items() if tensor is not None},
        "log_probs": scored.log_probs, "entropy": scored.entropy, **terms,
    }  # fmt: skip
    return found_in(model, tensors, [spans.rows[i] for i in group])


def _joined(part: MicroBatch, more: MicroBatch) -> MicroBatch:
    """One pass over the same rows for two choices of tokens, those of `part` first."""
    return replace(
        part,
        row=torch.cat([part.row, more.row]),
        column=torch.cat([part.column, more.column]),
        targets=torch.cat([part.targets, more.targets]),
    )


def _objective(
    log_probs: Float[Tensor, " picked"],
    tokens: _Tokens,
    recipe: Recipe,
    config: RunConfig,
    proximal: ProximalPolicy | None,
    part: MicroBatch,
) -> PolicyLoss:
    behaviour, current, advantages, weights = tokens.behaviour, tokens.current, tokens.advantages, tokens.weights
    if recipe.objective == "additive_clip":
        return additive_clip_loss(log_probs, current, behaviour, advantages, weights, epsilon=additive_width(recipe))
    if recipe.objective == "clip":
        weights = weights * importance_weights(current, behaviour, recipe.importance_cap)
        return clipped_loss(
            log_probs, current, advantages, weights, clip=recipe.clip, dual_clip=config.algorithm.dual_clip
        )
    if recipe.proximal == "ewma":
        assert proximal is not None, "the recipe needs a proximal policy"
        with torch.no_grad():
            current = token_log_probs(
                proximal.model, part.input_ids, part.row, part.column, part.targets, config.rollout.temperature
            ).log_probs
    return decoupled_loss(log_probs, current, behaviour, advantages, weights, clip=recipe.clip)


def _groups(
    spans: Spans, members: list[int], config: RunConfig, ranks: Ranks
) -> Iterator[tuple[list[int], bool, bool]]:
    """This rank's micro-batches, whether their prefix is detached (only rows resumed from an earlier step have one),
    and whether they count (`Ranks.share`). All ranks compute either kind at the same time."""
    budget, resumed = config.train.micro_batch_tokens, set()
    if config.algorithm.prefix == "detached":
        resumed = {i for i in members if spans.first[i] > 0}
    fresh = [i for i in members if i not in resumed]
    for detached, own in ((False, fresh), (True, [i for i in members if i in resumed])):
        for group, counts in in_micro_batches(spans, own, budget, ranks):
            yield group, detached, counts


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
