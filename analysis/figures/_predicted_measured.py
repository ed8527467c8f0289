"""Predicted against measured, for runs that were not calibrated on."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import style
from analysis.tables import QUANTITIES
from profiling.errors import DataError
from profiling.reader import Run

WITHIN = 0.10
COLUMNS = (
    "target", "calibrated_on", "kind", "drift_corrected", "quantity", "unit", "predicted", "measured", "error",
)  # fmt: skip
CAPTION = (
    "Relative error of every predicted quantity; a marker is one target run. A forecast uses costs and lengths of the "
    "calibration runs only; a replay takes the target's own lengths and tests the cost model alone. Both take the "
    "number of steps as given, so the time to the target is conditional on it. Not corrected for drift of the "
    "machine; "
    "the table shows both. Band: 10 %."
)


def read_predictions(path: Path) -> pd.DataFrame:
    needed = {
        "target",
        "calibrated_on",
        "kind",
        "drift_corrected",
        "quantity",
        "unit",
        "predicted",
        "measured",
        "error",
    }
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if missing := needed - set(table.columns):
        raise DataError(f"{path}: column '{min(missing)}' is missing")
    return table


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """predictions.csv beside the runs."""
    return read_predictions(Path(runs[0].path).parent / "predictions.csv")


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    table = table[~table.drift_corrected.astype(bool)]
    quantities = [name for name in QUANTITIES if name in set(table.quantity)]
    figure, panels = style.subplots(1, 2, width=8.4, height=0.9 + 0.42 * len(quantities))
    for axes, kind in zip(panels, ("forecast", "replay"), strict=True):
        rows = table[table.kind == kind]
        axes.axvspan(-100 * WITHIN, 100 * WITHIN, color="#e8f1e4", zorder=0)
        axes.axvline(0, color="#555555", linewidth=0.9)
        arms = list(dict.fromkeys(rows.target.str.replace(r"-s\d+$", "", regex=True)))
        colours = style.arm_colours(arms)
        for place, arm in enumerate(arms):
            own = rows[rows.target.str.replace(r"-s\d+$", "", regex=True) == arm]
            source = own.calibrated_on.iloc[0] if len(own) else ""
            shift = (place - (len(arms) - 1) / 2) * 0.22
            y = [quantities.index(name) + shift for name in own.quantity]
            label = f"{style.arm_name(arm)}, calibrated on {style.arm_name(source)}"
            axes.plot(100 * own.error, y, "o", color=colours[arm], markersize=5, alpha=0.75, label=label)
        reach = max(15.0, float((100 * table.error.abs()).max()) * 1.1)
        axes.set(xlim=(-reach, reach), xlabel="error, %", ylim=(len(quantities) - 0.5, -0.5))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, prune="both"))
        axes.set_title(kind)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(quantities)), [QUANTITIES[name] for name in quantities])
    panels[1].set_yticks(range(len(quantities)), [""] * len(quantities))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
