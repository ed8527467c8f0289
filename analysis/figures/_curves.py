"""Held-out accuracy against what it took: the curves that three figures share."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import style
from analysis.gather import decimated, gather, left_out_note
from analysis.tables import accuracy_curve, arm_of, at_score, by_arm, paired_speedup, provenance
from profiling.errors import DataError
from profiling.reader import Run

TARGET = 0.85
POINTS = 8000
"""Of all runs together; a run has at most MOST of them."""
MOST = 400
GRID = 100
COLUMNS = ("run", "arm", "part", "step", "clock_s", "trained_tokens", "accuracy", "accuracy_min", "accuracy_max",
           "points")  # fmt: skip


def curve_table(runs: Sequence[Run], x: str) -> pd.DataFrame:
    """Everything that is drawn against the column x of accuracy_curve, by `part`:

    evaluations  a row per evaluation, or per `points` neighbours of a long run: mean, least, greatest accuracy
    median       of an arm's runs, on a grid, as far as all of them go
    reached      where a run first reaches the target (see at_score)
    bracket      two rows, or none: the slower arm's median, and that times the inverse of the seeds' median ratio
    """
    runs = list(runs)
    most = max(10, min(MOST, POINTS // max(len(runs), 1)))
    table = gather(runs, lambda run: _evaluations(run, x, most))
    attrs, parts = table.attrs, [table]
    drawn = [run for run in runs if run.name in set(table.run)]
    medians = {}
    for arm, members in by_arm(drawn).items():
        curves = [table[table.run == run.name] for run in members]
        parts.append(_median(arm, x, curves))
        reached = {run.name: at_score(run, x, TARGET) for run in members}
        parts += [_row(name, arm, "reached", x, value) for name, value in reached.items() if value is not None]
        if all(value is not None for value in reached.values()):
            medians[arm] = float(np.median([value for value in reached.values() if value is not None]))
    parts += _bracket_rows(drawn, x, medians)
    whole = pd.concat(parts, ignore_index=True).reindex(columns=COLUMNS)
    whole.attrs.update(attrs)
    return whole


def _evaluations(run: Run, x: str, most: int) -> pd.DataFrame:
    curve = accuracy_curve(run)
    curve = curve[curve[x].notna()]
    if curve.empty:
        raise DataError(f"{run.path}: metrics.jsonl has no {_METRICS[x]} of its evaluations")
    return decimated(curve, x, ["accuracy"], most).assign(run=run.name, arm=arm_of(run), part="evaluations")


_METRICS = {"clock_s": "clock_s", "step": "step", "trained_tokens": "training/trained_tokens"}


def _median(arm: str, x: str, curves: Sequence[pd.DataFrame]) -> pd.DataFrame:
    start = max(curve[x].iloc[0] for curve in curves)
    end = min(curve[x].iloc[-1] for curve in curves)
    grid = np.linspace(start, end, GRID) if end > start else np.array([start])
    middle = np.median([np.interp(grid, curve[x], curve.accuracy) for curve in curves], axis=0)
    return pd.DataFrame({"arm": arm, "part": "median", x: grid, "accuracy": middle})


def _row(run: str, arm: str, part: str, x: str, value: float) -> pd.DataFrame:
    return pd.DataFrame({"run": [run], "arm": [arm], "part": [part], x: [value], "accuracy": [TARGET]})


def _bracket_rows(runs: Sequence[Run], x: str, medians: dict[str, float]) -> list[pd.DataFrame]:
    """PPO against T-PPO; where one of them is not there or did not arrive, the slowest against the fastest arm."""
    if len(medians) < 2:
        return []
    slow = "ppo" if "ppo" in medians else max(medians, key=lambda arm: medians[arm])
    others = {arm: value for arm, value in medians.items() if arm != slow}
    fast = "tppo" if "tppo" in others else min(others, key=lambda arm: others[arm])
    ratio = paired_speedup(runs, slow, fast, TARGET, x)["median"]
    if ratio is None:
        return []
    return [_row("", slow, "bracket", x, medians[slow]), _row("", fast, "bracket", x, medians[slow] / ratio)]


def draw_curves(table: pd.DataFrame, runs: Sequence[Run], *, x: str, xlabel: str, title: str, of_what: str) -> Figure:
    figure, (axes,) = style.subplots(height=4.4)
    runs = [run for run in runs if run.name in set(table.run)]
    looks = style.arm_looks(list(by_arm(runs)))
    evaluations = table[table.part == "evaluations"]
    for _, curve in evaluations.groupby("run", sort=False):
        look = looks[curve.arm.iloc[0]]
        lone = len(curve) == 1
        if (curve.points > 1).any():
            axes.fill_between(curve[x], curve.accuracy_min, curve.accuracy_max, color=look.colour, alpha=0.15, lw=0)
        axes.plot(curve[x], curve.accuracy, color=look.colour, linewidth=style.line_width(0.8), alpha=0.45,
                  marker=look.marker if lone else "", gid="evaluations")  # fmt: skip
    for arm, look in looks.items():
        middle = table[(table.part == "median") & (table.arm == arm)]
        axes.plot(middle[x], middle.accuracy, color=look.colour, linewidth=style.line_width(2.2), linestyle=look.line,
                  zorder=3 if look.line == "-" else 3.5,
                  label=style.arm_name(arm), marker=look.marker if len(middle) == 1 else "",
                  markersize=style.line_width(6), gid="median")  # fmt: skip
        reached = table[(table.part == "reached") & (table.arm == arm)]
        axes.plot(reached[x], reached.accuracy, look.marker, color=look.colour, markersize=style.line_width(6),
                  markeredgecolor="white", markeredgewidth=0.5, zorder=4, gid="reached")  # fmt: skip
    axes.axhline(TARGET, color=style.GREY, linewidth=style.line_width(0.9), linestyle=(0, (2, 2)))
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.set(xlabel=xlabel, ylabel="held-out accuracy", ylim=(0, 1.3 if style.is_paper() else 1.16))
    if (table[x] > 0).any():
        axes.set_xlim(left=0)
    if x == "step":
        style.whole_numbers(axes.xaxis)
    elif x == "trained_tokens":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        style.thousands(axes.xaxis)
    bracket = table[table.part == "bracket"]
    if len(bracket):
        pairs = paired_speedup(runs, bracket.arm.iloc[0], bracket.arm.iloc[1], TARGET, x)["pairs"]
        _draw_bracket(figure, axes, bracket, x, of_what, int(pairs or 0))
    style.title(axes, f"{title} ({provenance(runs)})")
    style.legend(axes, columns=3, note=left_out_note(table))
    return figure


def _draw_bracket(figure: Figure, axes: Axes, bracket: pd.DataFrame, x: str, of_what: str, pairs: int) -> None:
    """Two spans above the curves: the slower arm's, and below it the other's."""
    slow, fast = bracket.iloc[0], bracket.iloc[1]
    arrow = {"arrowstyle": "|-|,widthA=0.3,widthB=0.3", "linewidth": style.line_width(1), "shrinkA": 0, "shrinkB": 0}
    for end, y in ((slow, 1.02), (fast, 0.96)):
        axes.annotate("", xy=(end[x], y), xytext=(0, y), arrowprops=arrow)
    text = f"{style.arm_name(fast.arm)}: same score in {100 * fast[x] / slow[x]:.0f} % of the {of_what} of "
    text += f"{style.arm_name(slow.arm)} ({f'median of {pairs} paired seeds' if pairs > 1 else '1 seed'})"
    axes.text(
        0.01, 1.045, style.wrapped(text, figure, 0.74, "small"), fontsize="small", transform=axes.get_yaxis_transform()
    )
