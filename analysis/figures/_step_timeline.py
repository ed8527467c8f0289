"""One typical step of each arm: how full the engine is, and what follows the rollout."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis import style
from analysis.tables import by_arm, provenance
from profiling.errors import DataError
from profiling.reader import Run

CAPTION = (
    "The step of median duration of each arm's first run. Rollout: blue is the share of the engine's slots that "
    "decode "
    "a row, light blue the empty rest (a decode step costs almost the same half full, so this is not time that "
    "could be won back); then what the step does after its rollout."
)
COLUMNS = ["run", "step", "cause", "t_start", "t_end", "fill"]


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """Bars of the chosen steps; t in seconds from the step's start; fill: share of slots in use."""
    rows: list[tuple] = []
    for members in by_arm(runs).values():
        run = members[0]
        phases = run.phases[(run.phases.step >= 1) & ~run.phases.name.isin(("evaluation", "checkpoint"))]
        spans = run.engine[run.engine.step >= 1]
        if spans.empty or phases.empty:
            raise DataError(f"{run.path}: has no phases or engine records of training steps")
        bounds = phases.groupby("step").agg(start=("t_start", "min"), end=("t_end", "max"))
        durations = (bounds.end - bounds.start).sort_values()
        step = int(durations.index[len(durations) // 2])
        zero = bounds.start[step]
        for phase in phases[(phases.step == step) & (phases.name != "rollout")].itertuples():
            rows.append((run.name, step, phase.name, phase.t_start - zero, phase.t_end - zero, 1.0))
        own = spans[(spans.step == step) & (spans.engine == 0)]
        slots = own.slots.max() or own.batch.max()
        for span in own.itertuples():
            cause = "prefill" if span.kind == "prefill" else "decode_useful"
            fill = 1.0 if span.kind == "prefill" else span.batch / slots
            rows.append((run.name, step, cause, span.t_start - zero, span.t_end - zero, fill))
    return pd.DataFrame(rows, columns=COLUMNS)


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    names = list(table.run.unique())
    figure, (axes,) = style.subplots(height=1.3 + 0.95 * len(names))
    seen: dict[str, None] = {}
    for place, name in enumerate(names):
        for bar in table[table.run == name].itertuples():
            width = bar.t_end - bar.t_start
            colour, _ = style.CAUSES.get(bar.cause, style.CAUSES["wait_other"])
            if bar.cause == "decode_useful":
                empty, _ = style.CAUSES["decode_underfilled"]
                axes.bar(bar.t_start, 0.8, width, place - 0.4, align="edge", color=empty, linewidth=0)
                seen["decode_underfilled"] = None
            axes.bar(bar.t_start, 0.8 * bar.fill, width, place - 0.4, align="edge", color=colour, linewidth=0)
            seen[bar.cause] = None
    axes.set_yticks(range(len(names)), [f"{n}, step {table[table.run == n].step.iloc[0]}" for n in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="s from the start of the step")
    axes.set_title(f"A typical step ({provenance(runs)})")
    known = [cause for cause in style.CAUSES if cause in seen]
    handles = [Patch(color=style.CAUSES[cause][0], label=style.CAUSES[cause][1]) for cause in known]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
