"""Held-out accuracy against the tokens trained on so far: how well each token is used."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures._curves import curve_table, draw_curves
from profiling.reader import Run

CAPTION = (
    "Accuracy on held-out problems against the tokens that the policy has been trained on. Tokens that were "
    "generated and never trained on do not count, so that the axis is no cost. Thin: one run a seed; thick: median "
    "over seeds, as long as all of them run. Markers: where the mean of three consecutive evaluations first reaches "
    "the target (dotted). Bracket: medians over paired seeds."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    return curve_table(runs, "trained_tokens")


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    return draw_curves(
        table, runs, x="trained_tokens", xlabel="tokens trained on", title="Accuracy against trained tokens",
        of_what="tokens",
    )  # fmt: skip
