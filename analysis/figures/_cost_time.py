"""Hours against money for as many finished responses: which runs nothing beats in both."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.chosen import asked, left_out, listed, simulated_only, usable
from analysis.hardware import hardware_of, hardware_path
from analysis.labels import name_points
from analysis.tables import arm_of, by_arm, processor, provenance
from profiling.errors import DataError
from profiling.reader import Run

RESPONSES = 1_000_000
MOST_NAMED = 8
CAPTION = (
    "Time and cost of a million finished responses, at each run's rate after its start-up steps (evaluation, "
    "checkpoints and failures left out): hours of wall-clock against US dollars (GPU-hours times the price in "
    "hardware.json), or against GPU-hours (host-hours of a machine without GPUs) where a run has no price. Ringed "
    f"and joined: the front, that is runs that no other beats in both. Of more than {MOST_NAMED} runs those on the "
    "front are named. A finished response is not a learning step: schedules that train on staler or shorter "
    "responses may need more of them for the same score, which this figure does not know."
)
COLUMNS = ["run", "arm", "simulated", "schedule", "gpus", "hours", "gpu_hours", "dollars", "on_front"]


def seconds_per_response(run: Run) -> float:
    """Raises DataError."""
    if run.summary is None:
        raise DataError(f"{run.path}: has no summary.json: it has not ended")
    if not run.summary.get("seconds_per_finished_row"):
        raise DataError(f"{run.path}: has no finished responses")
    return float(run.summary["seconds_per_finished_row"])


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """Per run, for RESPONSES finished responses. dollars: null without a price."""
    rows = []
    for run, seconds in asked(runs, seconds_per_response)[0]:
        hours = RESPONSES * seconds / 3600
        gpus = run.header["gpus"]
        price = hardware_of(run).price_per_hour if hardware_path(run) else None
        kind = (run.header["schedule"] or {}).get("kind")
        dollars = None if price is None else hours * gpus * price
        rows.append((run.name, arm_of(run), run.simulated, kind, gpus, hours, hours * gpus, dollars))
    table = pd.DataFrame(rows, columns=COLUMNS[:-1]).astype({"dollars": float})
    return table.assign(on_front=front(table.hours.to_numpy(), table[cost_column(table)].to_numpy()))


def cost_column(table: pd.DataFrame) -> str:
    return "dollars" if table.dollars.notna().all() else "gpu_hours"


def front(hours: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Which points no other beats: as good in both and better in one."""
    better = (hours[:, None] <= hours) & (cost[:, None] <= cost) & ((hours[:, None] < hours) | (cost[:, None] < cost))
    return np.logical_not(better.any(axis=0))


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    found, reasons = usable(runs, seconds_per_response)
    cost = cost_column(table)
    figure, (axes,) = style.subplots(height=4.4)
    looks = style.arm_looks(list(by_arm(found)))
    many = len(looks) > 8
    for arm, own in table.groupby("arm", sort=False):
        label = None if many else style.arm_name(str(arm))
        look = looks[str(arm)]
        axes.scatter(own.hours, own[cost], s=style.line_width(46), color=look.colour, marker=look.marker,
                     edgecolor="white", label=label, zorder=3)  # fmt: skip
    best = table[table.on_front].sort_values("hours")
    axes.step(best.hours, best[cost], where="post", color="#555555", linewidth=1, linestyle="--", zorder=2)
    axes.scatter(best.hours, best[cost], s=style.line_width(130), facecolor="none", edgecolor="#222222",
                 linewidth=1.1, zorder=4, label="front")  # fmt: skip
    spread = max(table.hours.max() / table.hours.min(), table[cost].max() / table[cost].min())
    if spread > 20:
        axes.set(xscale="log", yscale="log")
        style.powers(axes.xaxis)
        style.powers(axes.yaxis)
    else:
        axes.set(xlim=(0, 1.4 * table.hours.max()), ylim=(0, 1.15 * table[cost].max()))
    unit = "US dollars" if cost == "dollars" else f"{processor(found)}-hours"
    axes.set(xlabel="hours per million finished responses", ylabel=f"{unit} per million\nfinished responses")
    style.title(axes, f"Cost against time ({provenance(found)})")
    words = left_out(reasons) + simulated_only(found)
    if cost == "gpu_hours":
        missing = listed(list(table[table.dollars.isna()].run))
        words.append(f"In {unit}: no price_per_hour is known for {missing} (hardware.json).")
    style.below(figure, *axes.get_legend_handles_labels(), 4, "\n".join(words))
    members = {run.name: run for run in found}
    named = [(_name(members[str(row.run)]), [(row.hours, getattr(row, cost))])
             for row in (table if len(table) <= MOST_NAMED else best.head(MOST_NAMED)).itertuples()]  # fmt: skip
    name_points(axes, named, list(zip(table.hours, table[cost], strict=True)), away=style.line_width(9))
    return figure


def _name(run: Run) -> str:
    gpus, what = run.header["gpus"], processor([run])
    return f"{style.short(run.name)}, {gpus} {what}{'s' if gpus > 1 else ''}"
