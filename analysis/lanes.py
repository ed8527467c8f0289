"""What each engine and a separate trainer do between two instants, as pieces that follow one another.

The names are the ledger's and so are the rules (profiling.ledger): the first that holds names an instant. What an
engine does in decode is one piece with a `fill`, the share of its slots that decode a row.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from profiling.ledger import WHOLE_CLUSTER, innermost_phases
from profiling.reader import Run

COLUMNS = ["lane", "cause", "rest", "t_start", "t_end", "fill"]
TRAINER = "trainer"
PREFILLS = {"prefill": "fresh_tokens", "re_prefill": "resumed_tokens", "preempt_recompute": "recomputed_tokens"}


def lanes(run: Run, spans: pd.DataFrame, start: float, end: float, engines: list[int]) -> pd.DataFrame:
    """Pieces from `start` to `end` (seconds of the run), lane by lane: an engine's number, or "trainer" where it has
    GPUs of its own. fill: of decode; 1 elsewhere. rest: what the other slots of a decode are. spans: the engines'
    records of all steps that touch the interval."""
    near = run.phases[(run.phases.t_end > start) & (run.phases.t_start < end)]
    separate = run.header["trainer_gpus"] > 0
    seen_by_engines = _clipped(innermost_phases(near, end, rollout_first=separate), start, end)
    spans = spans[(spans.t_end > start) & (spans.t_start < end)].sort_values("t_start", kind="stable")
    done = spans.groupby("step").t_end.max()
    rows: list[tuple] = []
    for engine in engines:
        own = spans[spans.engine == engine]
        for piece in seen_by_engines.itertuples():
            if piece.name == "rollout":
                inside = own[(own.t_end > piece.t_start) & (own.t_start < piece.t_end)]
                all_done = float(done.get(piece.step, piece.t_start))
                rows += ((str(engine), *found) for found in _rollout(inside, piece.t_start, piece.t_end, all_done))
            else:
                cause = piece.name or "wait_other"
                if separate and cause not in (*WHOLE_CLUSTER, "wait_other"):
                    cause = "wait_train"
                rows.append((str(engine), cause, None, piece.t_start, piece.t_end, 1.0))
    if separate:
        for piece in _clipped(innermost_phases(near, end), start, end).itertuples():
            cause = {"rollout": "wait_rollout", "": "wait_other"}.get(piece.name, piece.name)
            rows.append((TRAINER, cause, None, piece.t_start, piece.t_end, 1.0))
    return pd.DataFrame(rows, columns=COLUMNS)


def _clipped(pieces: pd.DataFrame, start: float, end: float) -> pd.DataFrame:
    own = pieces[(pieces.t_end > start) & (pieces.t_start < end)]
    return own.assign(t_start=own.t_start.clip(lower=start), t_end=own.t_end.clip(upper=end))


def _rollout(spans: pd.DataFrame, start: float, end: float, all_done: float) -> Iterator[tuple]:
    """Prefills and decodes of one engine, and what lies between and after them."""
    now = start
    for span in spans.itertuples():
        first, last = max(span.t_start, start), min(span.t_end, end)
        if first > now:
            yield ("wait_other", None, now, first, 1.0)
        now = max(last, now)
        if span.kind == "decode":
            rest = "kv_stall" if span.waiting > 0 else "decode_underfilled"
            yield ("decode_useful", rest, first, last, min(1.0, span.batch / span.slots))
            continue
        tokens = {cause: getattr(span, column) for cause, column in PREFILLS.items() if getattr(span, column) > 0}
        tokens = tokens or {"prefill": 1}
        edges = first + (last - first) * np.cumsum([0, *tokens.values()]) / sum(tokens.values())
        for cause, left, right in zip(tokens, edges[:-1], edges[1:], strict=True):
            yield (cause, None, left, right, 1.0)
    if now < min(all_done, end):
        yield ("wait_tail", None, now, min(all_done, end), 1.0)
        now = min(all_done, end)
    if now < end:
        yield ("wait_other", None, now, end, 1.0)


def with_slots(spans: pd.DataFrame) -> pd.DataFrame:
    """An unlimited engine (slots = 0) has as many slots as the most rows that it ran in the step."""
    peak = spans.batch.where(spans.kind == "decode", 1).groupby([spans.step, spans.engine]).transform("max")
    return spans.assign(slots=np.where(spans.slots > 0, spans.slots, peak))


def coarse(pieces: pd.DataFrame, shortest_s: float) -> pd.DataFrame:
    """Pieces shorter than `shortest_s` joined with their short neighbours, up to that long: one after another by
    cause, so that every cause keeps its seconds; `fill` is the mean over them."""
    seconds = pieces.t_end - pieces.t_start
    short = seconds < shortest_s
    bucket = np.where(short, np.floor(pieces.t_start / shortest_s), -1)
    changed = (pd.Series(bucket, pieces.index).diff() != 0) | (pieces.lane != pieces.lane.shift()) | ~short
    rows: list[tuple] = []
    for _, group in pieces.assign(seconds=seconds, filled=seconds * pieces.fill).groupby(changed.cumsum(), sort=True):
        if len(group) == 1:
            rows.append(tuple(group[COLUMNS].iloc[0]))
            continue
        now = group.t_start.iloc[0]
        kept = group.assign(rest=group.rest.fillna("")).groupby(["cause", "rest"], sort=False)
        for (cause, rest), own in kept[["seconds", "filled"]].sum().iterrows():
            fill = own.filled / own.seconds if own.seconds > 0 else 1.0
            rows.append((group.lane.iloc[0], cause, rest or None, now, now + own.seconds, fill))
            now += own.seconds
    return pd.DataFrame(rows, columns=COLUMNS)
