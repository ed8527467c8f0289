"""How long responses are while training goes on: mean, quantiles, the longest, and the share of rows carried over."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.chosen import simulated_only
from analysis.gather import decimated, gather, left_out_note
from analysis.lengths import QUANTILES, STATISTICS, lengths_by_step
from analysis.tables import arm_of, provenance
from profiling.reader import Run

MOST = 30
"""Points of an arm's line."""
SPREAD = ("mean_tokens", "max_tokens", "truncated_share")
CAPTION = (
    "Lengths of the responses that finished in a step, in tokens of all their windows; mean over an arm's runs, as "
    "far as all of them go. Top: mean and median. Middle: 90th and 99th percentile and the longest. Bottom: share "
    "of a step's rows that carry over. Under truncation the first steps finish short responses only, until the mix "
    f"of fresh and carried rows is steady. Where a run has more than {MOST} steps: means of neighbouring steps (the "
    "longest of them all), shaded from least to greatest. Where a run has no rollout records: no quantiles, which is "
    "then said below."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """arm, runs, step, STATISTICS: what each line shows; a row stands for `points` steps."""
    by_step = gather(runs, lambda run: lengths_by_step(run).assign(run=run.name, arm=arm_of(run)))
    arms = list(dict.fromkeys(by_step.arm))
    parts = []
    for arm in arms:
        own = by_step[by_step.arm == arm]
        last = own.groupby("run").step.max().min()
        mean = own[own.step <= last].groupby("step")[list(STATISTICS)].mean().reset_index()
        parts.append(decimated(mean, "step", SPREAD, MOST).assign(arm=arm, runs=own.run.nunique()))
    table = pd.concat(parts, ignore_index=True)
    table.attrs.update(by_step.attrs)
    return table[
        ["arm", "runs", "step", *STATISTICS, *(c for c in table if str(c).endswith(("_min", "_max"))), "points"]
    ]


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    figure, (middle, tail, carried) = style.subplots(3, 1, height=8.2, sharex=True, height_ratios=(3, 3, 2))
    looks = style.arm_looks(list(dict.fromkeys(table.arm)))
    thick, thin = style.line_width(1.8), style.line_width(0.9)
    handles = []
    for arm, look in looks.items():
        rows = table[table.arm == arm]
        lone = look.marker if len(rows) == 1 else ""
        shown = {"color": look.colour, "linestyle": look.line, "zorder": 3 if look.line == "-" else 3.5,
                 "marker": lone, "markersize": style.line_width(7)}  # fmt: skip
        for axes, name, width in (
            (middle, "mean_tokens", thick), (middle, "p50_tokens", thin), (tail, "p99_tokens", thick),
            (tail, "p90_tokens", thin), (carried, "truncated_share", thick),
        ):  # fmt: skip
            hollow: dict[str, Any] = {"markerfacecolor": "white"} if width == thin else {}
            axes.plot(rows.step, rows[name], linewidth=width, gid=name, **shown, **hollow)
        tail.plot(rows.step, rows.max_tokens_max, look.marker, color=look.colour, markersize=style.line_width(2.5),
                  alpha=0.6, linewidth=0, gid="max_tokens")  # fmt: skip
        for axes, name in ((middle, "mean_tokens"), (carried, "truncated_share")):
            if (rows.points > 1).any():
                axes.fill_between(rows.step, rows[f"{name}_min"], rows[f"{name}_max"], color=look.colour, alpha=0.15,
                                  linewidth=0)  # fmt: skip
        handles.append(Line2D([], [], linewidth=thick, label=style.arm_name(arm), **shown))
    lone = (table.groupby("arm").size() == 1).any()
    _tell_lines(middle, [(thick, "mean"), (thin, "median")], lone)
    _tell_lines(tail, [(thick, "99th percentile"), (thin, "90th percentile")], lone, dots="longest")
    for axes in (middle, tail):
        _log_tokens(axes)
    style.whole_numbers(carried.xaxis)
    carried.set(
        xlabel="training step",
        ylabel="share carried over",
        ylim=(
            -0.02,
            max(0.1, 1.08 * float(table.truncated_share_max.max()) if table.truncated_share.notna().any() else 0),
        ),
    )
    drawn = [run for run in runs if arm_of(run) in looks]
    style.heading(figure, f"Response lengths ({provenance(drawn)})")
    notes = [left_out_note(table)]
    of_arms = {style.arm_name(arm): table[table.arm == arm] for arm in looks}
    nothing = [arm for arm, rows in of_arms.items() if rows.mean_tokens.isna().all()]
    if nothing:
        notes.append(f"No response of {', '.join(nothing)} finished.")
    if without := [arm for arm, rows in of_arms.items() if rows[list(QUANTILES)].isna().all(axis=None)
                   and arm not in nothing]:  # fmt: skip
        notes.append(f"No quantiles of {', '.join(without)}: no rollout records.")
    notes += simulated_only(drawn)
    if (table[["mean_tokens", "p50_tokens"]] <= 0).any(axis=None):
        notes.append("Lengths of 0 cannot be shown on a logarithmic axis.")
    style.below(figure, handles, [str(h.get_label()) for h in handles], 3, " ".join(filter(None, notes)))
    return figure


def _log_tokens(axes: Axes) -> None:
    """Logarithmic where there is something above zero to show; where there is nothing at all, that is said."""
    shown = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.array([])])
    if (shown > 0).any():
        style.log_scale(axes, "y")
    elif not np.isfinite(shown).any():
        axes.text(0.5, 0.5, "no response finished", ha="center", transform=axes.transAxes, color=style.GREY)
        axes.set_yticks([])
    axes.set_ylabel("length, tokens")


def _tell_lines(axes: Axes, lines: Sequence[tuple[float, str]], lone: bool, dots: str | None = None) -> None:
    """Above the axes. lone: some arm has one point only; the second of the lines is hollow there."""
    handles = [
        Line2D([], [], color=style.GREY, linewidth=width, label=label, marker="o" if lone else "",
               markersize=style.line_width(6), markerfacecolor="white" if place else style.GREY)
        for place, (width, label) in enumerate(lines)
    ]  # fmt: skip
    if dots:
        handles.append(
            Line2D([], [], color=style.GREY, marker="o", markersize=style.line_width(2.5), linewidth=0, label=dots)
        )
    axes.legend(handles=handles, fontsize="x-small", loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles),
                borderaxespad=0.1)  # fmt: skip
