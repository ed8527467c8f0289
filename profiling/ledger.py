"""The idle ledger: every GPU-second of a run has exactly one name, and the names add up to GPUs x wall time.

The first that holds names a GPU's interval: the phase it is in (evaluation and checkpoint before training phases);
in a rollout, what its engine does (prefills, decode); else what it waits for. Measured and simulated runs go through
the same code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from profiling.errors import ConservationError
from profiling.schema import CAUSES, PHASES

TOLERANCE = 1e-9
"""Of the wall time: what rounding may leave unnamed."""

OUTSIDE = -1
"""The step of time outside every step."""

WHOLE_CLUSTER = ("down", "switch", "weight_sync", "evaluation", "checkpoint")
"""Phases that hold up every GPU; the others, but the rollout, run on the training GPUs."""


@dataclass(frozen=True)
class Cluster:
    """Who spends the GPU-seconds. `trainer_gpus` = 0: the trainer runs on the engines' GPUs (colocated)."""

    engines: int
    gpus_per_engine: int
    trainer_gpus: int = 0

    @property
    def gpus(self) -> int:
        return self.engines * self.gpus_per_engine + self.trainer_gpus


def build_ledger(
    *, cluster: Cluster, phases: pd.DataFrame, engine: pd.DataFrame, rollouts: pd.DataFrame, wall_s: float
) -> pd.DataFrame:
    """GPU-seconds by step, GPU and cause (columns of profiling.schema.LEDGER).

    phases: name, step, t_start, t_end, depth. engine, rollouts: profiling.schema. Raises ConservationError when a
    GPU's seconds do not add up to `wall_s` within TOLERANCE, naming the GPU and what is missing.
    """
    unknown = engine.engine[(engine.engine < 0) | (engine.engine >= cluster.engines)]
    if len(unknown):
        raise ConservationError(f"ledger: spans of engine {unknown.iloc[0]}, but there are {cluster.engines} engines")
    separate = cluster.trainer_gpus > 0
    pieces = innermost_phases(phases, wall_s, rollout_first=separate)
    parts = [_split_spans(engine, rollouts, pieces), _waits(cluster, engine, pieces)]
    parts.append(_outside_rollout(cluster, pieces))
    if separate:
        parts.append(_trainer(innermost_phases(phases, wall_s)))
    per_engine = pd.concat([part for part in parts if not part.empty], ignore_index=True)
    ledger = _per_gpu(cluster, per_engine)
    _check(cluster, ledger, wall_s)
    return ledger


def ledger_totals(ledger: pd.DataFrame) -> dict[str, float]:
    """GPU-seconds by cause, every cause in order; 0.0 for one that did not occur."""
    seconds = ledger.groupby("cause").seconds.sum()
    return {cause: float(seconds.get(cause, 0.0)) for cause in CAUSES}


def without_rounding(difference: float, of: float) -> float:
    """0 where it is within half of TOLERANCE of what was subtracted from; so a run's sums stay within TOLERANCE."""
    return difference if abs(difference) > TOLERANCE / 2 * of else 0.0


def innermost_phases(
    phases: pd.DataFrame, wall_s: float, *, rollout_first: bool = False, other_names: Sequence[str] = ()
) -> pd.DataFrame:
    """The run as adjoining pieces (name, step, t_start, t_end), each with the phase that names it; "" for none.

    Where phases overlap, the one that stands first in CAUSES wins (an evaluation that rolls out is evaluation), then
    the deeper one. rollout_first: as the engines' GPUs see it, where the trainer has its own: a rollout beside
    training is rollout. other_names: of a program's own phases, which count where none of the ledger's is.
    """
    known = phases[phases.name.isin([*PHASES, *other_names]) & (phases.t_end > phases.t_start)]
    training = [cause for cause in CAUSES if cause in PHASES and cause not in WHOLE_CLUSTER]
    order_of = ["rollout", *training] if rollout_first else [*training, "rollout"]
    rank = {name: place for place, name in enumerate([*WHOLE_CLUSTER, *order_of])}
    rank |= dict.fromkeys(other_names, len(rank))
    if known.empty:
        return pd.DataFrame([("", OUTSIDE, 0.0, wall_s)], columns=["name", "step", "t_start", "t_end"])
    edges = np.unique(np.concatenate([[0.0, wall_s], known.t_start.clip(0, wall_s), known.t_end.clip(0, wall_s)]))
    order = known.assign(rank=known.name.map(rank)).sort_values(["rank", "depth"], ascending=[False, True])
    owner = last_over(order, edges)
    names = np.append(order.name.to_numpy(object), "")
    steps = np.append(order.step.to_numpy(), OUTSIDE)
    # A piece of no phase belongs to the step under way: the last one that began.
    begun = known.sort_values("t_start")
    current = np.searchsorted(begun.t_start.to_numpy(), edges[:-1], side="right") - 1
    under_way = np.where(current >= 0, begun.step.to_numpy()[current], OUTSIDE)
    return pd.DataFrame(
        {
            "name": names[owner],
            "step": np.where(owner >= 0, steps[owner], under_way),
            "t_start": edges[:-1],
            "t_end": edges[1:],
        }
    )


def last_over(phases: pd.DataFrame, edges: np.ndarray) -> np.ndarray:
    """Between each two edges, at which all phases begin and end: the place of the last phase there, -1 for none."""
    owner = np.full(len(edges) - 1, -1)
    first, last = np.searchsorted(edges, phases.t_start), np.searchsorted(edges, phases.t_end)
    for place, (start, end) in enumerate(zip(first, last, strict=True)):
        owner[start:end] = place
    return owner


def _outside_rollout(cluster: Cluster, pieces: pd.DataFrame) -> pd.DataFrame:
    """What the engines' GPUs do outside rollouts: the phase itself, or wait for a trainer that has its own."""
    outside = pieces[pieces.name != "rollout"]
    cause = outside.name.where(outside.name != "", "wait_other")
    if cluster.trainer_gpus:
        cause = cause.where(cause.isin([*WHOLE_CLUSTER, "wait_other"]), "wait_train")
    seconds = outside.t_end - outside.t_start
    one = pd.DataFrame({"step": outside.step, "engine": 0, "cause": cause, "seconds": seconds})
    return pd.concat([one.assign(engine=number) for number in range(cluster.engines)], ignore_index=True)


def _trainer(pieces: pd.DataFrame) -> pd.DataFrame:
    """What the trainer's own GPUs do (engine = -1)."""
    cause = pieces.name.replace({"rollout": "wait_rollout", "": "wait_other"})
    return pd.DataFrame({"step": pieces.step, "engine": -1, "cause": cause, "seconds": pieces.t_end - pieces.t_start})


def _split_spans(engine: pd.DataFrame, rollouts: pd.DataFrame, pieces: pd.DataFrame) -> pd.DataFrame:
    """Engine spans by cause: prefills by whose tokens they are, decodes by how full the engine was. Of the useful
    decode time of an engine's step, the share of tokens that were dropped for good is decode_discarded."""
    spans = _clip_to_rollouts(engine, pieces)
    if spans.empty:
        return _frame([])
    seconds = spans.seconds.to_numpy()
    decode = (spans.kind == "decode").to_numpy()
    peak = spans.batch.where(decode, 0).groupby([spans.step, spans.engine]).transform("max")
    slots = np.where(spans.slots > 0, spans.slots, np.maximum(peak, 1))
    full = np.clip(spans.batch.to_numpy() / np.maximum(slots, 1), 0.0, 1.0)
    tokens = spans[["fresh_tokens", "resumed_tokens", "recomputed_tokens"]].to_numpy(float)
    whole = tokens.sum(axis=1)
    share = np.divide(tokens, whole[:, None], out=np.zeros_like(tokens), where=whole[:, None] > 0)
    share[whole == 0, 0] = 1.0
    stalled = (spans.waiting > 0).to_numpy()
    dropped = _discarded_share(rollouts, spans)
    by_cause = {
        "prefill": ~decode * share[:, 0],
        "re_prefill": ~decode * share[:, 1],
        "preempt_recompute": ~decode * share[:, 2],
        "decode_useful": decode * full * (1 - dropped),
        "decode_discarded": decode * full * dropped,
        "kv_stall": decode * stalled * (1 - full),
        "decode_underfilled": decode * ~stalled * (1 - full),
    }
    together = pd.DataFrame({"step": spans.step, "engine": spans.engine}).assign(
        **{cause: seconds * part for cause, part in by_cause.items()}
    )
    totals = together.groupby(["step", "engine"]).sum()
    return totals.melt(var_name="cause", value_name="seconds", ignore_index=False).reset_index()


def _discarded_share(rollouts: pd.DataFrame, spans: pd.DataFrame) -> np.ndarray:
    """Of each span's step and engine: tokens of discarded rows / tokens of all rows."""
    tokens = rollouts.groupby(["step", "engine"]).tokens.sum()
    dropped = rollouts[rollouts.discarded.astype(bool)].groupby(["step", "engine"]).tokens.sum()
    share = (dropped / tokens).fillna(0.0)
    return share.reindex(pd.MultiIndex.from_frame(spans[["step", "engine"]])).fillna(0.0).to_numpy(float)


def _clip_to_rollouts(engine: pd.DataFrame, pieces: pd.DataFrame) -> pd.DataFrame:
    """Each span's seconds inside rollout pieces; what an evaluation rolled out is not counted a second time."""
    rollout = pieces[pieces.name == "rollout"]
    if engine.empty or rollout.empty:
        return engine.assign(seconds=0.0).iloc[:0]
    starts, ends = rollout.t_start.to_numpy(), rollout.t_end.to_numpy()
    done = np.concatenate([[0.0], np.cumsum(ends - starts)])

    def rollout_time_until(t: np.ndarray) -> np.ndarray:
        place = np.searchsorted(starts, t, side="right")  # pieces begun by t
        before = done[np.maximum(place - 1, 0)]
        inside = np.minimum(t, ends[np.maximum(place - 1, 0)]) - starts[np.maximum(place - 1, 0)]
        return np.where(place > 0, before + inside, 0.0)

    seconds = rollout_time_until(engine.t_end.to_numpy()) - rollout_time_until(engine.t_start.to_numpy())
    return engine.assign(seconds=np.maximum(seconds, 0.0))


def _waits(cluster: Cluster, engine: pd.DataFrame, pieces: pd.DataFrame) -> pd.DataFrame:
    """What is left of a rollout when its spans are taken off.

    wait_tail: after the engine's last span, while another engine still runs. wait_other: gaps. unresolved: a
    program that writes no engine records.
    """
    rollout = pieces[pieces.name == "rollout"]
    phase_s = (rollout.t_end - rollout.t_start).groupby(rollout.step).sum()
    rows: list[tuple[int, int, str, float]] = []
    spans = _clip_to_rollouts(engine, pieces)
    busy = spans.groupby(["step", "engine"]).seconds.sum()
    last = spans.groupby(["step", "engine"]).t_end.max()
    end_of_step = last.groupby(level="step").max() if len(last) else last
    phase_end = rollout.groupby("step").t_end.max()
    recorded = set(spans.step.unique())
    for step, seconds in phase_s.items():
        for e in range(cluster.engines):
            if step not in recorded:
                rows.append((step, e, "unresolved", seconds))
                continue
            left = without_rounding(seconds - busy.get((step, e), 0.0), seconds)
            all_done = min(end_of_step[step], phase_end[step])
            phase_start = phase_end[step] - seconds
            tail = without_rounding(max(0.0, all_done - last.get((step, e), phase_start)), seconds)
            tail = min(tail, max(left, 0.0))
            gaps = without_rounding(left - tail, seconds)
            rows += [(step, e, "wait_tail", left - gaps), (step, e, "wait_other", gaps)]
    return _frame(rows)


def _per_gpu(cluster: Cluster, per_engine: pd.DataFrame) -> pd.DataFrame:
    """One row per step, GPU and cause: an engine's GPUs share its fate, the trainer's come last."""
    merged = per_engine.groupby(["step", "engine", "cause"], as_index=False).seconds.sum()  # in this order
    merged = merged[merged.seconds != 0.0]
    engine = merged.engine.to_numpy()
    copies = np.where(engine >= 0, cluster.gpus_per_engine, cluster.trainer_gpus)
    source = np.repeat(np.arange(len(merged)), copies)
    copy_number = np.arange(len(source)) - np.repeat(np.cumsum(copies) - copies, copies)
    first = np.where(engine >= 0, engine * cluster.gpus_per_engine, cluster.engines * cluster.gpus_per_engine)
    gpu = first[source] + copy_number
    order = np.lexsort((gpu, merged.step.to_numpy()[source]))  # stable: causes keep their order
    ledger = merged.iloc[source[order]].assign(gpu=gpu[order])
    return ledger[["step", "gpu", "cause", "seconds"]].reset_index(drop=True)


def _check(cluster: Cluster, ledger: pd.DataFrame, wall_s: float) -> None:
    allowed = TOLERANCE * max(wall_s, 1e-300)
    negative = ledger[ledger.seconds < -allowed]
    if len(negative):
        row = negative.iloc[0]
        raise ConservationError(
            f"ledger: step {row.step}, GPU {row.gpu}: {row.cause} is {row.seconds:.6g} s: engine spans overlap"
        )
    sums = ledger.groupby("gpu").seconds.sum()
    for gpu in range(cluster.gpus):
        missing = wall_s - sums.get(gpu, 0.0)
        if abs(missing) > allowed:
            raise ConservationError(f"ledger: GPU {gpu}: {missing:.6g} s of {wall_s:.6g} s wall have no name")


def _frame(rows: Sequence[tuple[int, int, str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["step", "engine", "cause", "seconds"])
