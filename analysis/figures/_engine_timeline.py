"""What every engine and the trainer do through two typical steps: full, under-filled, waiting, training, syncing."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis import style
from analysis.chosen import beyond, left_out, need_engine_records, simulated_only, step_bounds, typical_step, usable
from analysis.lanes import TRAINER, coarse, lanes, with_slots
from analysis.tables import by_arm, provenance, told_apart
from profiling.errors import DataError
from profiling.reader import Run

STEPS = 2
HEADING = 1.2
"""Height of a run's name, in lanes."""
MOST_ENGINES = 6
MOST_ARMS = 5
NARROW = 0.02
"""Of a lane's width."""
PIECES = 300
"""Of a lane; shorter ones are joined, each cause keeping its seconds."""
CAPTION = (
    "Two steps in a row of each arm's first run: the one of median duration (start-up steps left out) and the next, "
    "or the one before where it is the run's last; the first of them is named. A lane is an engine, or the trainer "
    "where it has GPUs of its own; engines that train between rollouts show that. In decode, dark is the share of "
    "the engine's slots that decode a row and light the rest (a decode step costs almost the same half full, so "
    "this is not time that could be won back). Many engines: some of them, from the one that is done first to the "
    "one that is done last."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """run, simulated, step (the first), lane, cause, rest (of a decode's slots), t_start, t_end (seconds from the
    step's start), fill (of a decode, the share of slots in use). Raises DataError."""
    parts = []
    for run in drawn_runs(runs):
        bounds = step_bounds(run)
        step = typical_step(run)
        if step + 1 not in bounds.index and step - 1 in bounds.index:
            step -= 1
        shown = [number for number in range(step, step + STEPS) if number in bounds.index]
        start, end = bounds.start[step], bounds.end[shown[-1]]
        spans = with_slots(run.steps_of("engine", range(max(step - 2, 1), step + STEPS + 2)))
        pieces = lanes(run, spans, start, end, some_engines(spans, step))
        if pieces.empty:
            raise DataError(f"{run.path}: no engine has a record of step {step}, the one that would be drawn")
        pieces = coarse(pieces, (end - start) / PIECES)
        pieces = pieces.assign(t_start=pieces.t_start - start, t_end=pieces.t_end - start)
        parts.append(pieces.assign(run=run.name, simulated=run.simulated, step=step))
    columns = ["run", "simulated", "step", "lane", "cause", "rest", "t_start", "t_end", "fill"]
    return pd.concat(parts, ignore_index=True)[columns]


def drawn_runs(runs: Sequence[Run]) -> list[Run]:
    found, _ = usable(runs, need_engine_records)
    return [members[0] for members in by_arm(found).values()][:MOST_ARMS]


def some_engines(spans: pd.DataFrame, step: int) -> list[int]:
    """All, or some, evenly spaced in the order in which they are done with the step's rollout."""
    done = spans[spans.step == step].groupby("engine").t_end.max().sort_values(kind="stable")
    order = [int(engine) for engine in done.index]
    if len(order) > MOST_ENGINES:
        order = [order[round(place * (len(order) - 1) / (MOST_ENGINES - 1))] for place in range(MOST_ENGINES)]
        return order
    return sorted(order)


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    found = drawn_runs(runs)
    groups = {run.name: list(dict.fromkeys(table[table.run == run.name].lane)) for run in found}
    rows = sum(len(names) for names in groups.values()) + HEADING * len(groups)
    figure, (axes,) = style.subplots(height=1.5 + 0.3 * rows)
    ticks, y = {}, 0.0
    for run in found:
        own = table[table.run == run.name]
        axes.text(0, y + 0.25, _heading(run, own, found), fontsize="small", va="center")
        y += HEADING
        for lane in groups[run.name]:
            _draw_lane(axes, own[own.lane == lane], y)
            ticks[y] = lane if lane == TRAINER else f"engine {lane}"
            y += 1
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize="small")
    axes.set(ylim=(y - 0.4, -0.2), xlim=(0, table.t_end.max()), xlabel="s from the start of the step")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    style.heading(figure, f"Engines and trainer ({provenance(found)})")
    seen = {*table.cause, *table.rest.dropna()}
    handles = [
        Patch(label=style.CAUSES[cause][1], **style.cause_bar(cause)) for cause in style.CAUSES if cause in seen
    ]
    every, reasons = usable(runs, need_engine_records)
    words = left_out(reasons + beyond(list(by_arm(every)), MOST_ARMS, "arms")) + simulated_only(found)
    style.below(figure, handles, [str(handle.get_label()) for handle in handles], 3, "\n".join(words))
    return figure


def _look(cause: str, narrow: bool) -> dict[str, Any]:
    """Of a lane's pieces: neighbours touch, without a hairline of background between them; narrow ones have no room
    for a hatch."""
    look = style.cause_bar(cause)
    if narrow or not look["hatch"]:
        look |= {"hatch": "", "edgecolor": look["facecolor"], "linewidth": 0.2}
    return {**look, "antialiased": False}


def _heading(run: Run, own: pd.DataFrame, runs: Sequence[Run]) -> str:
    engines = run.header["engines"]
    drawn = own[own.lane != TRAINER].lane.nunique()
    some = f", {drawn} of {engines} engines" if drawn < engines else ""
    return f"{style.short(run.name)}{told_apart(run, runs)}, from step {own.step.iloc[0]}{some}"


def _draw_lane(axes: Axes, own: pd.DataFrame, y: float) -> None:
    """From y - 0.4 to y + 0.4, downwards; a decode's share of filled slots from the bottom up."""
    width = own.t_end - own.t_start
    own = own.assign(rest=own.rest.fillna(""), width=width, narrow=width < NARROW * own.t_end.max())
    for (cause, rest, narrow), pieces in own.groupby(["cause", "rest", "narrow"], sort=False):
        left, width, fill = pieces.t_start, pieces.width, 0.8 * pieces.fill
        if rest:
            axes.bar(left, 0.8, width, y - 0.4, align="edge", **_look(rest, narrow))
        axes.bar(left, fill, width, y + 0.4 - fill, align="edge", **_look(cause, narrow))
