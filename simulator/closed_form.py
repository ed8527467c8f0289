"""A rollout in which nothing ever waits, without events: every engine admits all of its rows at once, and they leave
one after the other. Equal to the event loop of simulator.rollout (tests/simulator), and several times faster."""

from collections.abc import Sequence

import numpy as np

from simulator.costs import RolloutCosts
from simulator.engine import DECODE, ONE_INSTANT_S, PREFILL, Job
from simulator.log import Columns


def engine_columns(number: int, jobs: Sequence[Job], costs: RolloutCosts, start_s: float) -> tuple[Columns, Columns]:
    """(rows, spans) of one engine: rows have `place` (in `jobs`) and `t_end`; spans simulator.log.SPAN_COLUMNS.

    With lengths n_1 <= ... <= n_B, the span that ends with row j has B - j + 1 rows and n_j - n_{j-1} steps; rows of
    equal length leave together.
    """
    context = np.array([job.context for job in jobs], dtype=np.int64)
    left = np.array([job.left for job in jobs], dtype=np.int64)
    resumed = np.array([job.resumed for job in jobs], dtype=bool)
    order = np.argsort(left, kind="stable")
    steps_at, leaving = np.unique(left[order], return_counts=True)  # steps done when rows leave, how many then
    steps = np.diff(steps_at, prepend=0)
    batch = len(jobs) - np.concatenate([[0], np.cumsum(leaving)[:-1]])
    # Context of the rows of a span before its first step: their admission's, and the steps done so far for each.
    gone = np.concatenate([[0], np.cumsum(context[order])[np.cumsum(leaving)[:-1] - 1]])
    before = context.sum() - gone + batch * (steps_at - steps)
    pairs = steps * before + batch * (steps * (steps - 1) // 2)
    seconds = steps * costs.step_s(batch) + costs.context_token_s * pairs
    tokens, all_pairs = int(context.sum()), int((context * (context + 1) // 2).sum())
    prefill_end = start_s + costs.prefill_s(tokens=tokens, pairs=all_pairs)
    ends = prefill_end + np.cumsum(seconds)
    resumed_tokens = int(context[resumed].sum())

    def with_prefill(first: int, rest: np.ndarray) -> np.ndarray:
        return np.concatenate([[first], rest])

    nothing = np.zeros(len(steps), dtype=np.int64)
    spans = {
        "engine": np.full(len(steps) + 1, number),
        "kind": with_prefill(PREFILL, nothing + DECODE),
        "seconds": np.concatenate([[prefill_end - start_s], seconds]),
        "steps": with_prefill(1, steps),
        "batch": with_prefill(len(jobs), batch),
        "context_tokens": with_prefill(tokens, before),
        "attended_pairs": with_prefill(all_pairs, pairs),
        "fresh_tokens": with_prefill(tokens - resumed_tokens, nothing),
        "resumed_tokens": with_prefill(resumed_tokens, nothing),
        "recomputed_tokens": with_prefill(0, nothing),
        "waiting": with_prefill(0, nothing),
        "t_start": np.concatenate([[start_s, prefill_end], ends[:-1]]),
        "t_end": np.concatenate([[prefill_end], ends]),
    }
    return {"place": order, "t_end": np.repeat(ends, leaving)}, spans


def in_order_of_events(t_end: np.ndarray, engine: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, instant): by instant, then (engine, row). Times that agree to ONE_INSTANT_S are one instant, that of the
    first of them."""
    by_time = np.argsort(t_end, kind="stable")
    ordered = t_end[by_time]
    begins = np.concatenate([[True], np.diff(ordered) > ONE_INSTANT_S])
    group = np.cumsum(begins) - 1
    order = by_time[np.lexsort((row[by_time], engine[by_time], group))]
    return order, ordered[begins][group]
