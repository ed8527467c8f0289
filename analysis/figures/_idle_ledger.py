"""Where the GPU time of training went: every second has one name."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.chosen import asked, beyond, left_out, simulated_only, usable
from analysis.tables import processor, provenance, told_apart, training_ledger
from profiling.errors import DataError
from profiling.reader import Run

MOST_RUNS = 24
CAPTION = (
    "GPU time (or the host's, without GPUs) of the training steps (evaluation and checkpoints left out) by ledger "
    "cause; the causes are exclusive and add up to all of it. Empty slots of a decode step are shown apart, but "
    "filling them would hardly make the step shorter. Hatched: not measured."
)


def seconds_of(run: Run) -> pd.Series:
    """By cause. Raises DataError."""
    seconds = training_ledger(run)
    if not seconds.sum() > 0:
        raise DataError(f"{run.path}: has no finished training step")
    return seconds


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """run, simulated, cause, seconds, share (null where the run cannot tell)."""
    rows = []
    for run, seconds in asked(runs, seconds_of)[0][:MOST_RUNS]:
        total = float(seconds.sum())
        for cause in style.CAUSES:
            if seconds.get(cause, 0.0) > 0:
                share = None if cause == "unresolved" else seconds[cause] / total
                rows.append((run.name, run.simulated, cause, float(seconds[cause]), share))
    return pd.DataFrame(rows, columns=["run", "simulated", "cause", "seconds", "share"])


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    found, reasons = usable(runs, seconds_of)
    shown = found[:MOST_RUNS]
    figure, (axes,) = style.subplots(height=2.0 + 0.36 * len(shown))
    left = [0.0] * len(shown)
    for cause, (_, label) in style.CAUSES.items():
        rows = table[(table.cause == cause) & table.share.notna()].set_index("run").share
        if rows.empty or rows.max() < 1e-4:
            continue
        shares = [float(rows.get(run.name, 0.0)) for run in shown]
        axes.barh(range(len(shown)), shares, left=left, label=label, height=0.74, **style.cause_bar(cause))
        left = [before + share for before, share in zip(left, shares, strict=True)]
    for place, known in enumerate(left):
        if known < 0.999:
            axes.barh(place, 1 - known, left=known, fill=False, hatch="//", linewidth=0.5)
    labels = [f"{style.short(run.name)}{told_apart(run, shown)}" for run in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=f"share of {processor(shown)} time", xlim=(0, 1))
    style.heading(figure, f"Idle ledger ({provenance(shown)})")
    words = left_out(reasons + beyond([run.name for run in found], MOST_RUNS, "runs")) + simulated_only(shown)
    style.below(figure, *axes.get_legend_handles_labels(), 3, "\n".join(words))
    return figure
