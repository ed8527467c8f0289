"""How many of an engine's slots decode a row, from the start of a rollout to its end."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.chosen import beyond, left_out, need_engine_records, simulated_only, typical_step, usable
from analysis.lanes import with_slots
from analysis.tables import by_arm, provenance
from profiling.errors import DataError
from profiling.reader import Run

POINTS = 400
MOST_ARMS = 6
CAPTION = (
    "Rows that decode over the engine's slots through the rollout of the step of median duration (start-up steps "
    "left out), of each arm's first run. Line: mean over engines; band: from the emptiest to the fullest engine at "
    "that moment. Dot: 90 % of the step's rows are done, or where some do not finish, done or cut off (at their "
    "window, or when the step has rows enough). An engine without a limit has as many slots as the most rows that "
    "it ran in the step; while it prefills, the rows that decode next are counted."
)
COLUMNS = ["run", "arm", "simulated", "step", "t_s", "mean", "low", "high", "ended_90", "cut_off"]


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """t_s: from the rollout's start, in POINTS equal steps to its end; mean, low and high over engines of rows /
    slots; ended_90: the first moment at which 90 % of the step's rows are done or cut off; cut_off: rows of the step
    that did not finish. Raises DataError."""
    parts = []
    for (arm, _), run in zip(arms_of(runs), drawn_runs(runs), strict=True):
        step = typical_step(run)
        spans, rows = with_slots(run.steps_of("engine", [step])), run.steps_of("rollouts", [step])
        if spans.empty:
            raise DataError(f"{run.path}: no engine has a record of step {step}, the one that would be drawn")
        start, end = spans.t_start.min(), spans.t_end.max()
        grid = np.linspace(start, end, POINTS)
        share = np.array([occupancy(own, grid) for _, own in spans.groupby("engine")])
        idle = run.header["engines"] - len(share)  # engines that got no row
        share = np.vstack([share, np.zeros((max(idle, 0), POINTS))])
        last = math.ceil(0.9 * len(rows)) - 1
        ended = float(np.sort(rows.t_end)[last]) if len(rows) else math.nan
        parts.append(
            pd.DataFrame(
                {"run": run.name, "arm": arm, "simulated": run.simulated, "step": step, "t_s": grid - start,
                 "mean": share.mean(axis=0), "low": share.min(axis=0), "high": share.max(axis=0),
                 "ended_90": ended - start, "cut_off": int((~rows.finished.astype(bool)).sum())}
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def occupancy(spans: pd.DataFrame, grid: np.ndarray) -> np.ndarray:
    """Rows / slots of one engine at the instants of `grid`: those of the decode under way, or of the next one during a
    prefill; 0 once the last span has ended."""
    decodes = spans[spans.kind == "decode"].sort_values("t_end")
    if decodes.empty:
        return np.zeros(len(grid))
    place = np.searchsorted(decodes.t_end.to_numpy(), grid, side="left")
    share = np.append((decodes.batch / decodes.slots).to_numpy(), 0.0)
    return share[place]


def arms_of(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    found, _ = usable(runs, need_engine_records)
    return list(by_arm(found).items())[:MOST_ARMS]


def drawn_runs(runs: Sequence[Run]) -> list[Run]:
    return [members[0] for _, members in arms_of(runs)]


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    found = drawn_runs(runs)
    figure, (axes,) = style.subplots(height=4.6)
    looks = style.arm_looks([arm for arm, _ in arms_of(runs)])
    for (arm, own), run in zip(table.groupby("arm", sort=False), found, strict=True):
        colour = looks[str(arm)].colour
        step, done = own.step.iloc[0], own.ended_90.iloc[0]
        share = done / own.t_s.iloc[-1] if own.t_s.iloc[-1] > 0 else math.nan
        label = f"{style.arm_name(str(arm))}, step {step}"
        if math.isfinite(share):
            label += f": 90 % done{_or_cut_off(run) if own.cut_off.iloc[0] else ''} after {100 * share:.0f} %"
        if run.header["engines"] > 1:
            axes.fill_between(own.t_s, own.low, own.high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            own.t_s,
            own["mean"],
            color=colour,
            linewidth=style.line_width(1.8),
            label=label,
            linestyle=looks[str(arm)].line,
        )
        if math.isfinite(done):
            axes.plot(done, np.interp(done, own.t_s, own["mean"]), "o", color=colour, markersize=style.line_width(8),
                      markeredgecolor="white")  # fmt: skip
    axes.set(xlabel="s from the start of the rollout", ylabel="rows that decode / slots", ylim=(0, 1.04))
    axes.set_xlim(left=0)
    style.title(axes, f"Batch through a rollout ({provenance(found)})")
    every, reasons = usable(runs, need_engine_records)
    words = left_out(reasons + beyond(list(by_arm(every)), MOST_ARMS, "arms")) + simulated_only(found)
    style.below(figure, *axes.get_legend_handles_labels(), 2, "\n".join(words))
    return figure


def _or_cut_off(run: Run) -> str:
    return " or at window" if (run.header["schedule"] or {}).get("window") else " or cut off"
