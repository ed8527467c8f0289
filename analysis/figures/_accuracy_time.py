"""Held-out accuracy against training wall-clock; a thin line per run, and the time to the target bracketed."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures._curves import curve_table, draw_curves
from profiling.reader import Run

CAPTION = (
    "Accuracy on held-out problems against training time (evaluation and checkpoints left out). Thin: one run a "
    "seed; thick: median over seeds, as long as all of them run. Markers: where the mean of three consecutive "
    "evaluations first reaches the target (dotted). Bracket: medians over paired seeds. Sampling noise of one "
    "evaluation is about two points; a crossing inherits it. Runs with many evaluations: means of neighbours, "
    "shaded from least to greatest."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    return curve_table(runs, "clock_s")


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    return draw_curves(
        table, runs, x="clock_s", xlabel="training time, s", title="Accuracy against wall-clock", of_what="time"
    )
