"""Processes of a program that are in different phases at once, of which the idle ledger counts one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from profiling.ledger import innermost_phases
from profiling.schema import PHASES

SHARE = 0.05
"""Of the wall time, from which it is worth a word: ranks never change phases at the same instant."""


def overlap_note(records: Sequence[Mapping[str, Any]], wall_s: float) -> str | None:
    """records: phases of the trace, with their `process`."""
    phases = pd.DataFrame([record for record in records if record["type"] == "phase"])
    if phases.empty or phases.process.nunique() < 2:
        return None
    names = sorted(set(phases.name) - set(PHASES))
    each = [innermost_phases(own, wall_s, other_names=names) for _, own in phases.groupby("process")]
    edges = np.unique(np.concatenate([pieces.t_start for pieces in each] + [[wall_s]]))
    somebody = np.full(len(edges) - 1, "", dtype=object)  # between two edges: the phase of the first that is in any
    apart = np.zeros(len(edges) - 1, dtype=bool)
    for pieces in each:
        inner = pieces.name.to_numpy(object)[np.searchsorted(pieces.t_start, edges[:-1], "right") - 1]
        apart |= (inner != "") & (somebody != "") & (inner != somebody)
        somebody = np.where(somebody != "", somebody, inner)
    seconds = float(np.diff(edges)[apart].sum())
    if seconds < SHARE * wall_s:
        return None
    return (
        f"processes are in different phases at once for {seconds:.1f} s of {wall_s:.1f} s: each moment counts as one "
        "phase, the first in the idle ledger's order, for all processes and devices"
    )
