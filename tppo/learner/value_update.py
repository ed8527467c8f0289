"""The value model's update, on its own rows, optimiser, mini-batches and micro-batches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tppo.algorithms.aggregation import token_weights
from tppo.algorithms.objectives import value_loss
from tppo.algorithms.recipes import Recipe
from tppo.config import RunConfig
from tppo.learner.batch import in_micro_batches, mini_batches, pick
from tppo.learner.estimates import ValueBatch
from tppo.learner.finite import check_loss, found_in, of_rows
from tppo.learner.step import step_optimizer
from tppo.models.value import ValueModel
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.signals import nothing


def update_value(
    model: ValueModel,
    optimizer: torch.optim.Optimizer,
    batch: ValueBatch,
    recipe: Recipe,
    config: RunConfig,
    pad_token_id: int,
    generator: torch.Generator,
    *,
    epochs: int,
    steps_per_epoch: int,
    clip: float | None,
    ranks: Ranks = SINGLE,
    between: Callable[[], None] = nothing,
) -> dict[str, Any]:
    """Train on every token of the batch's spans. No rows: no step, and null metrics. between: called before every
    micro-batch, by all ranks together; what it raises ends the training in its midst."""
    spans, valid = batch.spans, batch.spans.valid
    budget = config.value.micro_batch_tokens or config.train.micro_batch_tokens
    losses, norms = [], []
    for _ in range(epochs):
        order = torch.randperm(len(spans.rows), generator=generator).tolist()
        for members in mini_batches(order, steps_per_epoch):
            weights = torch.zeros(valid.shape)
            weights[members] = token_weights(valid[members], recipe.aggregation) * batch.row_weights[members, None]
            optimizer.zero_grad()
            total = 0.0
            for group, counts in in_micro_batches(spans, members, budget, ranks):
                between()
                part, here = pick(spans, group, valid, pad_token_id, count=counts).to(ranks.device), valid[group]
                targets, weight, old = (
                    table[group][here].to(ranks.device) for table in (batch.targets, weights, batch.old_values)
                )
                values = model(part.input_ids, part.row, part.column)
                loss = value_loss(values, targets, weight, old_values=old, clip=clip)
                known = {"input_ids": part.input_ids, "row": part.row, "column": part.column, "values": values,
                         "returns": targets, "weights": weight, "old_values": old, "loss": loss}  # fmt: skip
                rows = [spans.rows[i] for i in group]
                check_loss(loss, "value model", ranks, partial(found_in, model, known, rows))
                (loss * (ranks.world if counts else 0)).backward()  # shards take the mean over the ranks
                if counts:
                    spans.work.backward(part.lengths, outputs=len(part.targets))
                    total += loss.item()
            losses.append(total)
            with of_rows([spans.rows[i] for i in members]):
                norms.append(step_optimizer(model, optimizer, config, "value model"))
            spans.work.updates += 1
    losses = [sum(shares) for shares in zip(*ranks.gather(losses), strict=True)]
    return {
        "critic/vf_loss": sum(losses) / len(losses) if losses else None,
        "critic/grad_norm": sum(norms) / len(norms) if norms else None,
        "training/value_trained_tokens": int(valid.sum()),
    }
