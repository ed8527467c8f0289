"""Which phase drew how much energy and kept each device how busy: the estimators applied to a run directory."""

import numpy as np
import pandas as pd

from profiling.estimators import busy_by_phase, energy_by_phase
from profiling.hosts import is_host
from profiling.ledger import innermost_phases, last_over
from profiling.reader import Run
from profiling.schema import PHASES
from profiling.windows import Pieces, Windows, windows_of_polls

SENSOR_WINDOW_S = 1.0
"""Of a GPU's utilisation where its driver keeps no samples of its own: the longer of the two that NVML documents."""
SHORTEST_S = 0.05
"""Of a phase's time in all, of which anything is said. Another process's phase may cover nearly all of it."""
COUNTERS = ("sm_activity", "sm_occupancy", "tensor_activity", "dram_activity")
COLUMNS = ["device", "phase", "seconds", "quantity", "value", "low", "high", "method"]


def device_estimates(run: Run) -> pd.DataFrame:
    """A row for each device, phase and quantity: `busy` (fraction of the phase's time); of GPUs, `joules` and what
    their own counters tell (COUNTERS, fractions); 95 % intervals; value null where it is `unresolved`. Phases nest:
    each moment belongs to the innermost.

    Empty for a run without phases or samples.
    """
    samples = run.devices
    if run.phases.empty or samples.empty:
        return pd.DataFrame(columns=COLUMNS)
    end = run.trailer["t"] if run.trailer else float(samples.t.max())
    pieces = Pieces.of(_named_pieces(run, float(end)))
    rows = []
    for device, own in samples.groupby("device", sort=False):
        t, busy = own.t.to_numpy(float), own.utilisation.to_numpy(float)
        found = [("busy", busy_by_phase(pieces, _windows(run, str(device), t, busy)))]
        if not is_host(str(device)) and own.energy_joules.notna().any():
            found.append(("joules", energy_by_phase(pieces, t, own.energy_joules.to_numpy(float))))
        for metric in COUNTERS:
            if len((counted := windows_of(run, str(device), metric)).end):
                found.append((metric, busy_by_phase(pieces, counted)))
        for quantity, estimates in found:
            rows += [
                (device, name, e.seconds, quantity, e.value, e.low, e.high, e.method)
                if e.seconds >= SHORTEST_S
                else (device, name, e.seconds, quantity, None, None, None, "unresolved")
                for name, e in estimates.items()
                if name
            ]
    return pd.DataFrame(rows, columns=COLUMNS)


def interval_text(estimates: pd.DataFrame, quantity: str, scale: float = 1.0, unit: str = "") -> str | None:
    """`value (low to high)`, `unresolved`, or None without such an estimate. estimates: those of one device and phase,
    by quantity."""
    if quantity not in estimates.index:
        return None
    own = estimates.loc[quantity]
    if pd.isna(own.value):
        return "unresolved"
    value, low, high = (scale * float(own[name]) for name in ("value", "low", "high"))
    return f"{_short(value)}{unit} ({_short(low)} to {_short(high)})"


def _short(value: float) -> str:
    """Three digits, without an exponent where people expect none."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _named_pieces(run: Run, end: float) -> pd.DataFrame:
    """As the ledger has them, and within its phases a program's own where one of those is the innermost: whoever
    marked it wants to know its joules. The ledger, and steps, need the phase around: a program's own within an
    evaluation is no training."""
    phases = run.phases[run.phases.t_end > run.phases.t_start].sort_values("depth", kind="stable")
    pieces = innermost_phases(phases, end, other_names=sorted(set(phases.name) - set(PHASES)))
    inner = last_over(phases, np.append(pieces.t_start, end))
    own = np.append(~phases.name.isin(PHASES), False)[inner]
    for column in ("name", "step"):
        pieces.loc[own, column] = phases[column].to_numpy()[inner[own]]
    return pieces


def windows_of(run: Run, device: str, metric: str) -> Windows:
    """What the driver or a counter of the device has averaged itself; none where it does not."""
    own = run.windows[(run.windows.device == device) & (run.windows.metric == metric)]
    return Windows(own.t_begin.to_numpy(), own.t_end.to_numpy(), own.value.to_numpy())


def _windows(run: Run, device: str, t: np.ndarray, busy: np.ndarray) -> Windows:
    """What each reading is the mean of: the time since the one before on the host, the driver's own samples where it
    keeps them, else the sensor's window."""
    if is_host(device):
        known = np.isfinite(busy)
        known[:1] = False  # it has no reading before it
        return Windows(t[:-1][known[1:]], t[known], busy[known])
    own = windows_of(run, device, "utilisation")
    if len(own.end):
        return own
    return windows_of_polls(t, busy, SENSOR_WINDOW_S)
