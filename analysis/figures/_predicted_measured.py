"""Predicted against measured, for runs that were not calibrated on."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import style
from analysis.tables import QUANTITIES, arm_named
from profiling.errors import DataError
from profiling.files import read_whole
from profiling.reader import Run

WITHIN = 0.10
COLUMNS = (
    "target", "calibrated_on", "kind", "drift_corrected", "quantity", "unit", "predicted", "measured", "error",
)  # fmt: skip
CAPTION = (
    "Relative error of every predicted quantity; a marker is one target run. A forecast uses costs and lengths of the "
    "calibration runs only; a replay takes the target's own lengths and tests the cost model alone. Both take the "
    "number of steps as given, so the time to the target is conditional on it. Not corrected for drift of the "
    "machine; the table beside the figure has both, and the predicted and measured values. Band: 10 %."
)


def read_predictions(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(BytesIO(read_whole(path)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; `tppo demo` writes it beside its runs") from None
    except ValueError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if missing := set(COLUMNS) - set(table.columns):
        raise DataError(f"{path}: column '{min(missing)}' is missing")
    for name in ("predicted", "measured", "error"):
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise DataError(f"{path}: column '{name}' has something that is not a number")
    return table


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """predictions.csv beside the runs: its rows with an error, and each target's arm. Those corrected for drift are
    not drawn. Raises DataError."""
    if not runs:
        raise DataError("no runs to draw; name at least one run directory")
    path = Path(runs[0].path).parent / "predictions.csv"
    table = read_predictions(path)
    known = table[table.quantity.isin(list(QUANTITIES))]
    known = known[np.isfinite(known.error.astype(float))]
    if known[~known.drift_corrected.astype(bool)].empty:
        raise DataError(f"{path}: holds no error of a known quantity; `tppo demo` writes it anew")
    return known.assign(arm=known.target.map(arm_named)).reset_index(drop=True)


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    table = table[~table.drift_corrected.astype(bool)]
    quantities = [name for name in QUANTITIES if name in set(table.quantity)]
    figure, panels = style.subplots(1, 2, width=8.4, height=max(2.6, 1.2 + 0.42 * len(quantities)), sharey=True)
    looks = style.arm_looks(list(dict.fromkeys(table.arm)))
    reach = max(15.0, float((100 * table.error.abs()).max()) * 1.1)
    for axes, kind in zip(panels, ("forecast", "replay"), strict=True):
        _panel(axes, table[table.kind == kind], quantities, looks)
        axes.set(xlim=(-reach, reach), xlabel="error, %")
        style.title(axes, kind.capitalize())
    panels[0].set_yticks(range(len(quantities)), [QUANTITIES[name] for name in quantities])
    panels[0].set_ylim(len(quantities) - 0.5, -0.5)
    style.heading(figure, "Predicted (simulated) against measured")
    handles: dict = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    style.below(figure, list(handles.values()), list(handles), 2)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, quantities: Sequence[str], looks: dict[str, style.Look]) -> None:
    axes.axvspan(-100 * WITHIN, 100 * WITHIN, color="#e8f1e4", zorder=0, label=f"within {100 * WITHIN:.0f} %")
    axes.axvline(0, color=style.GREY, linewidth=style.line_width(0.9))
    for place, (arm, look) in enumerate(looks.items()):
        own = rows[rows.arm == arm]
        if own.empty:
            continue
        y = [quantities.index(name) + (place - (len(looks) - 1) / 2) * 0.22 for name in own.quantity]
        label = f"{style.arm_name(arm)}, calibrated on {style.arm_name(str(own.calibrated_on.iloc[0]))}"
        axes.plot(100 * own.error, y, look.marker, color=look.colour, markersize=style.line_width(5), alpha=0.75,
                  label=label, gid=arm)  # fmt: skip
    if rows.empty:
        axes.text(0.5, 0.5, "no such prediction", ha="center", transform=axes.transAxes, color=style.GREY)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, prune="both"))
    axes.grid(axis="y", visible=False)
