"""The idle ledger step by step: what each training step's GPU time was spent on, and how that changes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis import style
from analysis.chosen import beyond, left_out, simulated_only, usable
from analysis.figures._idle_ledger import seconds_of
from analysis.tables import by_arm, provenance
from profiling.reader import Run
from profiling.summary import NOT_TRAINING

MOST_BARS = 60
MOST_ARMS = 4
CAPTION = (
    "GPU-seconds (or the host's seconds) of each training step by ledger cause (evaluation, checkpoints and "
    "failures left out), of each arm's first run, divided by its GPUs, so that a bar is as high as the step was "
    f"long. Over more than {MOST_BARS} steps, a bar is the mean of neighbouring steps. White and hatched: not "
    "measured."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """run, simulated, first_step, last_step, cause, seconds (mean of a step, per GPU)."""
    parts = []
    for run in drawn_runs(runs):
        ledger = run.ledger
        assert ledger is not None  # else it lacks something
        ledger = ledger[(ledger.step >= 1) & ~ledger.cause.isin(NOT_TRAINING)]
        steps = np.sort(ledger.step.unique())
        groups = np.array_split(steps, min(len(steps), MOST_BARS))
        first = np.array([group[0] for group in groups])
        place = np.searchsorted(first, ledger.step, side="right") - 1
        sizes = np.array([len(group) for group in groups])
        sums = ledger.seconds.groupby([place, ledger.cause.to_numpy()]).sum().rename_axis(["place", "cause"])
        rows = sums.reset_index()
        rows["seconds"] = rows.seconds / sizes[rows.place] / run.header["gpus"]
        rows["first_step"] = first[rows.place]
        rows["last_step"] = np.array([group[-1] for group in groups])[rows.place]
        parts.append(rows.assign(run=run.name, simulated=run.simulated))
    table = pd.concat(parts, ignore_index=True)
    return table[["run", "simulated", "first_step", "last_step", "cause", "seconds"]]


def drawn_runs(runs: Sequence[Run]) -> list[Run]:
    found, _ = usable(runs, seconds_of)
    return [members[0] for members in by_arm(found).values()][:MOST_ARMS]


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    found = drawn_runs(runs)
    figure, panels = style.subplots(len(found), 1, height=1.6 + 1.6 * len(found))
    highest = table.groupby(["run", "first_step"]).seconds.sum().max()
    steps = int(table.last_step.max())
    for axes, run in zip(panels, found, strict=True):
        own = table[table.run == run.name]
        bars = own.drop_duplicates("first_step").set_index("first_step").last_step.sort_index()
        width = bars.to_numpy() - bars.index.to_numpy() + 1.0
        left = bars.index.to_numpy() - 0.5
        bottom = np.zeros(len(bars))
        for cause in style.CAUSES:
            seconds = own[own.cause == cause].set_index("first_step").seconds.reindex(bars.index).fillna(0.0)
            if seconds.max() <= 0:
                continue
            axes.bar(left + 0.05 * width, seconds, 0.9 * width, bottom, align="edge", **style.cause_bar(cause))
            bottom = bottom + seconds.to_numpy()
        many = f", means of up to {int(width.max())} steps" if width.max() > 1 else ""
        style.title(axes, f"Idle ledger by step: {style.short(run.name)} ({provenance([run])}){many}")
        axes.set(xlim=(0.4, steps + 0.6), ylim=(0, 1.05 * highest), ylabel="s per step")
        axes.grid(axis="x", visible=False)
        style.whole_numbers(axes.xaxis)
    panels[-1].set_xlabel("training step")
    seen = table[table.seconds > 1e-4 * highest].cause.unique()
    handles = [
        Patch(label=style.CAUSES[cause][1], **style.cause_bar(cause)) for cause in style.CAUSES if cause in seen
    ]
    every, reasons = usable(runs, seconds_of)
    words = left_out(reasons + beyond(list(by_arm(every)), MOST_ARMS, "arms")) + simulated_only(found)
    style.below(figure, handles, [str(handle.get_label()) for handle in handles], 3, "\n".join(words))
    return figure
