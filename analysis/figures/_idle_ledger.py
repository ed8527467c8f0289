"""Where the GPU time of training went: every second has one name."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.tables import provenance, training_ledger
from profiling.reader import Run

CAPTION = (
    "GPU time of the training steps (evaluation and checkpoints left out) by ledger cause; the causes are exclusive "
    "and add up to all of it. Empty slots of a decode step are shown apart, but filling them would hardly make "
    "the step "
    "shorter. Hatched: not measured."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """run, simulated, cause, seconds, share (null where the run cannot tell)."""
    rows = []
    for run in runs:
        seconds = training_ledger(run)
        total = float(seconds.sum())
        for cause in style.CAUSES:
            if seconds.get(cause, 0.0) > 0:
                share = None if cause == "unresolved" else seconds[cause] / total
                rows.append((run.name, run.simulated, cause, float(seconds[cause]), share))
    return pd.DataFrame(rows, columns=["run", "simulated", "cause", "seconds", "share"])


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    names = [run.name for run in runs]
    figure, (axes,) = style.subplots(height=1.6 + 0.36 * len(names))
    left = dict.fromkeys(names, 0.0)
    for cause, (colour, label) in style.CAUSES.items():
        rows = table[(table.cause == cause) & table.share.notna()]
        if rows.empty or rows.share.max() < 1e-4:
            continue
        axes.barh(rows.run, rows.share, left=[left[n] for n in rows.run], color=colour, label=label, height=0.74)
        for row in rows.itertuples():
            left[row.run] += row.share
    for name in names:
        if left[name] < 0.999:
            axes.barh(name, 1 - left[name], left=left[name], fill=False, hatch="//", linewidth=0.5)
    labels = [f"{run.name} ({run.kind})" if run.simulated else run.name for run in runs]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="share of GPU time", xlim=(0, 1))
    axes.set_title(f"Idle ledger ({provenance(runs)})")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
