"""The lives of a run that was stopped and went on in its directory. Its own clock has no gap between them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd


def without_gaps(devices: pd.DataFrame, resumed_s: Sequence[float]) -> pd.DataFrame:
    """Device samples of a run that was stopped and went on at these times of its own clock: meanwhile counters counted
    what was none of its, or began anew. Across such a time they rise by their mean power here."""
    joules = devices.energy_joules.to_numpy(float, copy=True)
    for rows in devices[devices.energy_joules.notna()].groupby("device", sort=False).indices.values():
        t, own = devices.t.to_numpy(float)[rows], joules[rows]
        cuts = np.unique(np.searchsorted(t, resumed_s, side="right"))
        cuts = cuts[(cuts > 0) & (cuts < len(t))] - 1
        rise, passed = np.diff(own), np.diff(t)
        lived = np.delete(np.arange(len(rise)), cuts)
        if len(cuts) and passed[lived].sum() > 0:
            rise[cuts] = passed[cuts] * rise[lived].sum() / passed[lived].sum()
            joules[rows] = own[0] + np.concatenate([[0.0], np.cumsum(rise)])
    return devices.assign(energy_joules=joules)
