"""Held-out accuracy against training steps: what a step teaches, however long it takes."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures._curves import curve_table, draw_curves
from profiling.reader import Run

CAPTION = (
    "Accuracy on held-out problems against training steps. Steps of different schedules take different times and "
    "train different numbers of responses, so that fewer steps are not by themselves a faster training. Thin: one "
    "run a seed; thick: median over seeds, as long as all of them run. Markers: where the mean of three consecutive "
    "evaluations first reaches the target (dotted). Bracket: medians over paired seeds."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    return curve_table(runs, "step")


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    return draw_curves(table, runs, x="step", xlabel="training step", title="Accuracy against steps", of_what="steps")
