"""Energy of the GPUs by phase, with 95 % intervals, and per trained token; hatched where the sensors cannot tell."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis import style
from analysis.gather import gather, left_out_note
from analysis.tables import arm_of, provenance
from profiling.attribution import device_estimates
from profiling.errors import DataError
from profiling.reader import Run

UNRESOLVED = "//"
CAPTION = (
    "Joules that all GPUs of a run drew in each phase, mean over an arm's runs, from the GPUs' energy counters. "
    "Bars: 95 % intervals of the attribution to phases (the GPUs' and runs' bounds added up, so at least as wide), "
    "not of differences between runs. Hatched: unresolved, the phase is too short for the counter; the bar spans "
    "what can be said, or the whole axis where nothing can. Right: joules per trained token, a marker per run, "
    "start-up steps, evaluation and checkpoints left out. Simulated runs hold no energy."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """arm, run (null: mean over the arm's), part (`phase` or `per_token`), phase, joules, low, high: joules is null
    where a GPU's is unresolved in a run, low and high also where nothing bounds them."""
    by_run = gather(runs, _of_run)
    phases = by_run[by_run.part == "phase"]
    means = phases.groupby(["arm", "phase"], sort=False)[["joules", "low", "high"]].agg(lambda v: v.mean(skipna=False))
    parts = [means.reset_index().assign(part="phase"), by_run[by_run.part == "per_token"]]
    table = pd.concat(parts, ignore_index=True)[["arm", "run", "part", "phase", "joules", "low", "high"]]
    table.attrs.update(by_run.attrs)
    return table


def _of_run(run: Run) -> pd.DataFrame:
    if run.simulated:
        raise DataError(f"{run.path}: energy is not simulated")
    if run.devices.empty:
        raise DataError(f"{run.path}: has no device samples; profile it on a machine with GPUs")
    estimates = device_estimates(run)
    joules = estimates[estimates.quantity == "joules"]
    if joules.empty:
        raise DataError(f"{run.path}: no GPU with an energy counter was sampled")
    columns = {"value": "joules", "low": "low", "high": "high"}
    numbers = joules.assign(**{name: joules[name].astype(float) for name in columns})
    sums = (
        numbers.groupby("phase", sort=False)[list(columns)].agg(lambda v: v.sum(skipna=False)).rename(columns=columns)
    )
    table = sums.rename_axis("phase").reset_index().assign(part="phase")
    per_token = (run.summary or {}).get("joules_per_trained_token")
    token = pd.DataFrame({"part": ["per_token"], "joules": [np.nan if per_token is None else float(per_token)]})
    return pd.concat([table, token], ignore_index=True).assign(run=run.name, arm=arm_of(run))


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    phases = table[table.part == "phase"]
    names = list(dict.fromkeys(phases.phase))
    looks = style.arm_looks(list(dict.fromkeys(table.arm)))
    height = 1.6 + 0.28 * len(names) * max(1, len(looks)) ** 0.7
    figure, (left, right) = style.subplots(1, 2, width=8.4, height=max(3.0, height), width_ratios=(3, 1))
    reach = max(1e-9, float(np.nanmax([0.0, *phases.joules, *phases.high])))
    thick = 0.8 / len(looks)
    for place, (arm, look) in enumerate(looks.items()):
        for bar in phases[phases.arm == arm].itertuples():
            y = names.index(bar.phase) + (place - (len(looks) - 1) / 2) * thick
            _bar(left, y, thick, bar, look, reach)
    left.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    left.invert_yaxis()
    left.set(xlabel="J, mean over runs", xlim=(0, reach * 1.05))
    left.grid(axis="y", visible=False)
    _per_token(right, table[table.part == "per_token"], looks)
    drawn = [run for run in runs if arm_of(run) in looks and not run.simulated]
    style.title(left, f"Energy by phase ({provenance(drawn)})")
    handles = [Patch(facecolor=look.colour, edgecolor="white", hatch=look.hatch) for look in looks.values()]
    labels = [style.arm_name(arm) for arm in looks]
    if phases.joules.isna().any():
        handles.append(Patch(facecolor="none", edgecolor=style.GREY, hatch=UNRESOLVED))
        labels.append("unresolved")
    style.below(figure, handles, labels, 4, left_out_note(table))
    return figure


def _bar(axes: Axes, y: float, thick: float, bar: "object", look: style.Look, reach: float) -> None:
    joules, low, high = (float(getattr(bar, name)) for name in ("joules", "low", "high"))
    if np.isnan(joules):
        start, end = (0.0, reach * 1.05) if np.isnan(low) or np.isnan(high) else (low, high)
        axes.barh(y, end - start, thick * 0.9, left=start, facecolor="none", edgecolor=look.colour, hatch=UNRESOLVED,
                  linewidth=style.line_width(0.8), gid="unresolved")  # fmt: skip
        return
    axes.barh(
        y, joules, thick * 0.9, color=look.colour, edgecolor="white", hatch=look.hatch, linewidth=0.4, gid="joules"
    )
    if np.isfinite([low, high]).all():
        axes.errorbar(joules, y, xerr=[[max(0.0, joules - low)], [max(0.0, high - joules)]], color=style.BLACK,
                      capsize=style.line_width(3), linewidth=style.line_width(1.0))  # fmt: skip


def _per_token(axes: Axes, table: pd.DataFrame, looks: dict[str, style.Look]) -> None:
    for place, (arm, look) in enumerate(looks.items()):
        known = table[table.arm == arm].joules.dropna()
        if len(known):
            axes.plot(known, [place] * len(known), look.marker, color=look.colour, markersize=style.line_width(7),
                      alpha=0.8, gid=arm)  # fmt: skip
        else:
            axes.text(0.5, place, "not known", ha="center", va="center", fontsize="x-small",
                      color=style.GREY, transform=axes.get_yaxis_transform())  # fmt: skip
    most = table.joules.max()
    axes.set(ylim=(len(looks) - 0.4, -0.6), xlim=(0, most * 1.2 if most > 0 else 1.0), xlabel="J per trained token")
    axes.set_yticks(range(len(looks)), [style.arm_name(arm) for arm in looks], fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.grid(axis="y", visible=False)
