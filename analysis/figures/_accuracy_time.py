"""Held-out accuracy against training wall-clock; a thin line per run, and the time to the target bracketed."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.tables import accuracy_curve, arm_of, by_arm, paired_speedup, provenance, time_to_score
from profiling.reader import Run

TARGET = 0.85
CAPTION = (
    "Accuracy on held-out problems against training time (evaluation and checkpoints left out). Thin: one run a seed; "
    "thick: median over seeds, as long as all of them run. Dots: where the mean of three consecutive evaluations "
    "first reaches the target. Sampling noise of one evaluation is about two points; a crossing inherits it."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    return pd.concat([accuracy_curve(run).assign(run=run.name, arm=arm_of(run)) for run in runs], ignore_index=True)


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    figure, (axes,) = style.subplots(height=4.4)
    arms = by_arm(runs)
    colours = style.arm_colours(list(arms))
    medians = {}
    for arm, members in arms.items():
        curves = [table[table.run == run.name] for run in members]
        for curve in curves:
            axes.plot(curve.clock_s, curve.accuracy, color=colours[arm], linewidth=0.8, alpha=0.45)
        end = min(curve.clock_s.iloc[-1] for curve in curves)
        grid = np.linspace(0, end, 100)
        middle = np.median([np.interp(grid, curve.clock_s, curve.accuracy) for curve in curves], axis=0)
        axes.plot(grid, middle, color=colours[arm], linewidth=2.4, label=style.arm_name(arm))
        times = [time_to_score(run, TARGET) for run in members]
        for seconds in times:
            if seconds is not None:
                axes.plot(seconds, TARGET, "o", color=colours[arm], markersize=5)
        if all(seconds is not None for seconds in times):
            medians[arm] = float(np.median(np.array(times, float)))
    axes.axhline(TARGET, color="#555555", linewidth=0.9, linestyle="--")
    if "ppo" in medians and "tppo" in medians:
        ratio = paired_speedup(runs, "ppo", "tppo", TARGET)["median"]
        if ratio is not None:
            _bracket(axes, medians["ppo"] / ratio, medians["ppo"])
    axes.set(xlabel="training time, s", ylabel="held-out accuracy", ylim=(0, 1.12))
    axes.set_title(f"Accuracy against wall-clock ({provenance(runs)})")
    axes.set_xlim(left=0)
    style.legend(axes, columns=3)
    return figure


def _bracket(axes: "object", fast: float, slow: float) -> None:
    """Two spans above the curves: the slower arm's median time to the target, and that by the seeds' median ratio."""
    share = fast / slow
    for seconds, y in ((slow, 1.02), (fast, 0.96)):
        axes.annotate(  # type: ignore[attr-defined]
            "", xy=(seconds, y), xytext=(0, y), arrowprops={"arrowstyle": "|-|,widthA=0.3,widthB=0.3", "linewidth": 1}
        )
    axes.text(  # type: ignore[attr-defined]
        0.01 * slow, 1.045, f"same score in {share:.0%} of the time (median of paired seeds)", fontsize=9
    )
