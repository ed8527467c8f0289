"""The idle ledger per training step, by cause: for the tables of a report and of a comparison."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.tables import SET_APART, by_arm, processor
from profiling.errors import DataError
from profiling.reader import Run
from profiling.schema import CAUSES
from profiling.summary import NEEDS_RECORDS

UNRESOLVED = "unresolved"


def causes_per_step(run: Run, after: int = 0) -> pd.Series:
    """GPU-seconds per step of the steps later than `after`, by cause in the ledger's order, evaluation and checkpoints
    left out; 0 for what did not occur, null for what the run cannot tell. Raises DataError without such steps."""
    if run.ledger is None:
        raise DataError(f"{run.path}: has no ledger yet; the run has not ended")
    own = run.ledger[(run.ledger.step >= 1) & (run.ledger.step > after) & ~run.ledger.cause.isin(SET_APART)]
    if own.empty:
        raise DataError(f"{run.path}: its ledger has no training step after step {after}")
    seconds = own.groupby("cause").seconds.sum() / own.step.nunique()
    found = pd.Series({cause: float(seconds.get(cause, 0.0)) for cause in CAUSES if cause not in SET_APART})
    if found[UNRESOLVED] > 0:
        found[[UNRESOLVED, *NEEDS_RECORDS]] = np.nan
        found.attrs["unresolved_s"] = float(seconds[UNRESOLVED])
    return found


def ledger_table(runs: Sequence[Run], names: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """A row per cause that occurs, and per arm its GPU-seconds per step and their share of all: means over the arm's
    runs that have ended. names: cause -> (colour, name). Raises DataError."""
    columns: dict[str, pd.Series] = {}
    for arm, members in by_arm(runs).items():
        ended = [causes_per_step(run, _startup(run)) for run in members if run.ledger is not None]
        if ended:
            seconds = pd.DataFrame(ended).astype(float).mean(skipna=False)
            whole = seconds.sum() + sum(own.attrs.get("unresolved_s", 0.0) for own in ended) / len(ended)
            columns[f"{arm}: {processor(members)} s per step"] = seconds
            columns[f"{arm}: share"] = seconds / whole if whole > 0 else seconds * float("nan")
    if not columns:
        raise DataError(f"{runs[0].path}: has no ledger yet; the run has not ended")
    table = pd.DataFrame(columns)
    shares = table[[column for column in table if str(column).endswith(": share")]]
    seen = shares.isna().any(axis=1) | (shares > 0).any(axis=1)
    table = table[seen]
    table.insert(0, "cause", [names.get(str(cause), ("", str(cause)))[1] for cause in table.index])
    return table.reset_index(drop=True)


def _startup(run: Run) -> int:
    return int((run.summary or {}).get("startup_steps") or 0)
