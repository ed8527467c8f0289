"""How long responses are, of one run: by step, and over the whole run with those that it did not finish."""

from typing import Any

import numpy as np
import pandas as pd

from analysis.gather import numbers
from profiling.errors import DataError
from profiling.reader import Run

QUANTILES = {"p50_tokens": 0.5, "p90_tokens": 0.9, "p99_tokens": 0.99}
STATISTICS = ("mean_tokens", *QUANTILES, "max_tokens", "truncated_share")


def lengths_by_step(run: Run) -> pd.DataFrame:
    """step, STATISTICS, source: a row per training step. Lengths are those of the responses that finished in the step,
    in tokens of all their windows; truncated_share: rows that carry over / rows of the step. From the rollout records,
    or for a run without any from metrics.jsonl, which knows no quantiles (null)."""
    rows = run.rollouts[run.rollouts.step >= 1]
    if rows.empty:
        return _from_metrics(run)
    done = rows[rows.finished]
    lengths = (done.context_before + done.tokens - done.prompt_tokens).groupby(done.step)
    found = pd.DataFrame({"mean_tokens": lengths.mean(), "max_tokens": lengths.max()})
    for name, share in QUANTILES.items():
        found[name] = lengths.quantile(share)
    carried = (~rows.finished & ~rows.discarded).groupby(rows.step).mean().rename("truncated_share")
    table = found.join(carried, how="right").sort_index()
    return table.assign(source="rollouts").rename_axis("step").reset_index()[["step", *STATISTICS, "source"]]


def _from_metrics(run: Run) -> pd.DataFrame:
    metrics = run.metrics
    if "response_length/mean" not in metrics or "step" not in metrics:
        raise DataError(f"{run.path}: has no rollout records, and metrics.jsonl no response_length/mean")
    rows = metrics[metrics.step >= 1]
    known = {
        "mean_tokens": "response_length/mean",
        "max_tokens": "response_length/max",
        "truncated_share": "training/truncated_share",
    }
    columns: dict[str, Any] = {name: numbers(rows[key]) if key in rows else np.nan for name, key in known.items()}
    return pd.DataFrame({"step": rows.step, **dict.fromkeys(QUANTILES, np.nan), **columns, "source": "metrics"})[
        ["step", *STATISTICS, "source"]
    ]


def responses(run: Run) -> pd.DataFrame:
    """tokens, finished: a row per response of steps 1 and later. Of one that the run did not finish (it carries over,
    or was dropped), tokens is how long it had become: a lower bound. Raises DataError."""
    rows = run.rollouts[run.rollouts.step >= 1]
    if rows.empty:
        raise DataError(f"{run.path}: has no rollout records; lengths need them")
    last = rows.sort_values("step", kind="stable").drop_duplicates("row", keep="last")
    tokens = last.context_before + last.tokens - last.prompt_tokens
    return pd.DataFrame({"tokens": tokens, "finished": last.finished}).reset_index(drop=True)


def survival(tokens: np.ndarray, finished: np.ndarray) -> pd.DataFrame:
    """tokens, share: the share of responses longer than so many tokens, at each length at which one finished.

        S(n) = product over lengths m <= n of (1 - finished at m / responses known to reach m)

    (Kaplan and Meier, JASA 1958): a response without an end counts as long as it is known to go on, so that the long
    ones, which are more often unfinished, are not forgotten. An estimate as long as what is unfinished does not depend
    on anything but its length.
    """
    order = np.argsort(tokens, kind="stable")
    tokens, finished = tokens[order], finished[order]
    lengths, first = np.unique(tokens, return_index=True)
    ended = np.add.reduceat(finished.astype(int), first)
    at_risk = len(tokens) - first
    share = np.cumprod(1 - ended / at_risk)
    return pd.DataFrame({"tokens": lengths, "share": share})[ended > 0].reset_index(drop=True)


def limits(run: Run) -> dict[str, int]:
    """`window` and `cap` (the longest response allowed), in tokens, of those that the run has and tells."""
    found = {}
    schedule = run.header["schedule"] or {}
    if isinstance(schedule.get("window"), int):
        found["window"] = schedule["window"]
    try:
        config = run.config
    except DataError:
        return found
    for section in ("rollout", "workload"):
        own = config.get(section)
        cap = own.get("max_response_tokens") if isinstance(own, dict) else None
        if isinstance(cap, int):
            found["cap"] = cap
    return found
