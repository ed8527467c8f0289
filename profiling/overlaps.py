"""Processes of a program that are in different phases at once, of which the idle ledger counts one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

SHARE = 0.05
"""Of the wall time, from which it is worth a word: ranks never change phases at the same instant."""


def overlap_note(records: Sequence[Mapping[str, Any]], wall_s: float) -> str | None:
    """records: phases of the trace, with their `process`."""
    phases = pd.DataFrame([record for record in records if record["type"] == "phase"])
    if phases.empty or phases.process.nunique() < 2:
        return None
    edges = np.unique(np.concatenate([phases.t_start, phases.t_end]))
    phases["code"] = pd.factorize(phases.name)[0]
    phases["first"], phases["last"] = np.searchsorted(edges, phases.t_start), np.searchsorted(edges, phases.t_end)
    somebody = np.full(len(edges) - 1, -1)  # between two edges: the phase of the first process that is in any
    apart = np.zeros(len(edges) - 1, dtype=bool)
    for _, own in phases.sort_values("depth", kind="stable").groupby("process"):
        inner = np.full(len(edges) - 1, -1)
        for code, first, last in zip(own.code, own["first"], own["last"], strict=True):
            inner[first:last] = code
        apart |= (inner >= 0) & (somebody >= 0) & (inner != somebody)
        somebody = np.where(somebody >= 0, somebody, inner)
    seconds = float(np.diff(edges)[apart].sum())
    if seconds < SHARE * wall_s:
        return None
    return (
        f"processes are in different phases at once for {seconds:.1f} s of {wall_s:.1f} s: each moment counts as one "
        "phase, the first in the idle ledger's order, for all processes and devices"
    )
