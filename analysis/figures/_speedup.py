"""How many times as fast as its synchronous twin a run is: against window, GPUs and tail weight."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.chosen import left_out, simulated_only, usable
from analysis.labels import name_points
from analysis.tables import provenance
from analysis.twins import FIELDS_OF, schedule_kind, speedups, twin_of
from profiling.errors import DataError
from profiling.files import read_whole
from profiling.reader import Run

NAMES = {"window": "window, tokens", "gpus": "GPUs", "sigma": "tail weight (sigma of log length)"}
RATES: dict[str, tuple[str, Any, str]] = {
    "per_response": ("per finished response", "-", "o"),
    "per_step": ("per step", ":", "s"),
}
PALETTE = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE, style.SKY, style.BLACK)
PUBLISHED = "published.csv"
CAPTION = (
    "Seconds of the synchronous run over seconds of the run, all other settings equal (the twin is looked for among "
    "the given runs; seed by seed, median over seeds), per finished response and per step, start-up steps left out. "
    "A truncated step finishes fewer responses than a synchronous one, so that it is faster per step than per "
    "response; what a step or a response teaches is in neither. Horizontals: a schedule without a window. Below 1: "
    "slower. Dashed, where published.csv lies beside the runs: a number from the literature, for reference; it is "
    "of another quantity if its label says so."
)
COLUMNS = [
    "what", "schedule", "window", "gpus", "sigma", "setting", "per_response", "per_step", "runs", "simulated", "label",
    "source",
]  # fmt: skip


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """what: speedup (a row per schedule and setting) or published (value in per_response, with label and source).
    Raises DataError."""
    if not any(schedule_kind(run) == "synchronous" for run in runs):
        raise DataError(
            f"{_place(runs)}: none of {len(runs)} runs is synchronous; a speed-up needs one to compare with"
        )
    pairs = speedups(runs)
    pairs = pairs[pairs.per_response.notna() | pairs.per_step.notna()]
    if pairs.empty:
        for run in runs:
            need_twin(run, runs)
        raise DataError(f"{runs[0].path}: all runs are synchronous; nothing to compare")
    keys = ["schedule", *FIELDS_OF, "setting", "simulated"]
    grouped = pairs.groupby(keys, dropna=False, sort=False)
    table = grouped[list(RATES)].median().assign(runs=grouped.size()).reset_index().assign(what="speedup")
    table = table.sort_values(["schedule", *FIELDS_OF], kind="stable")
    published = read_published(Path(runs[0].path).parent / PUBLISHED)
    return pd.concat([table, published] if len(published) else [table], ignore_index=True).reindex(columns=COLUMNS)


def _place(runs: Sequence[Run]) -> str:
    return str(Path(runs[0].path).parent) if runs else "no runs"


def need_twin(run: Run, runs: Sequence[Run]) -> None:
    """Of one that is not synchronous, for its speed-up. Raises DataError."""
    if schedule_kind(run) == "synchronous":
        return
    twin = twin_of(run, runs)
    if twin is None:
        raise DataError(f"{run.path}: has no synchronous partner with all else equal")
    if not (run.summary and twin.summary):
        raise DataError(f"{run.path}: it or its synchronous partner has not ended")


def read_published(path: Path) -> pd.DataFrame:
    """figure, label, value, source of the lines about this figure; none without the file. Raises DataError."""
    if not path.exists():
        return pd.DataFrame()
    try:
        table = pd.read_csv(BytesIO(read_whole(path)))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if missing := {"figure", "label", "value", "source"} - set(table.columns):
        raise DataError(f"{path}: column '{min(missing)}' is missing")
    if not pd.api.types.is_numeric_dtype(table.value):
        raise DataError(f"{path}: column 'value' has something that is not a number")
    own = table[table.figure == "speedup"]
    return pd.DataFrame(
        {"what": "published", "per_response": own.value.astype(float), "label": own.label, "source": own.source}
    )


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    points, published = table[table.what == "speedup"], table[table.what == "published"]
    facets = [name for name in FIELDS_OF if points[name].nunique() > 1]
    compared, reasons = usable(runs, lambda run: need_twin(run, runs))
    words = left_out(reasons)
    if not facets:
        facets = ["window" if points.window.notna().any() else "gpus"]
        words.append("Neither window nor GPUs nor tail weight vary among these runs: one point a schedule.")
    figure, panels = style.subplots(1, len(facets), width=6.0 if len(facets) == 1 else 9.0, height=4.6)
    shades: dict[str, str] = {}
    drawn: set[Any] = set()
    for axes, name in zip(panels, facets, strict=True):
        drawn |= _draw_lines(axes, points, name, shades)
        axes.axhline(1, color="#555555", linewidth=style.line_width(0.9))
        for row in published.itertuples():
            axes.axhline(row.per_response, color="#555555", linewidth=style.line_width(1.1), linestyle=(0, (6, 3)))
        axes.set(xlabel=NAMES[name])
    alone = _draw_alone(panels[0], points[~points.index.isin(drawn)], facets, shades)
    highest = max(points[list(RATES)].max().max(), published.per_response.max() if len(published) else 0.0, 1.0)
    for axes in panels:
        axes.set_ylim(0, 1.12 * highest)
    panels[0].set_ylabel("times as fast as synchronous")
    style.heading(
        figure, f"Speed-up over synchronous ({provenance(compared)}{', published' if len(published) else ''})"
    )
    handles = [
        Line2D([], [], color="#666666", linestyle=line, marker=marker, label=label)
        for label, line, marker in RATES.values()
    ]
    handles += [Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in shades.items()]
    handles += [
        Line2D([], [], color="#555555", linestyle=(0, (6, 3)), label=f"published {row.per_response:g}: {row.label}")
        for row in published.itertuples()
    ]
    words += simulated_only(compared)
    style.below(figure, handles, [str(handle.get_label()) for handle in handles], 2, "\n".join(words))
    if alone:
        name_points(panels[0], alone, away=style.line_width(4))
    return figure


def _draw_lines(axes: Axes, points: pd.DataFrame, name: str, shades: dict[str, str]) -> set[Any]:
    """Lines along `name` with all else equal, of more than one point. Returns the rows of `points` in them."""
    others = [other for other in (*FIELDS_OF, "setting", "schedule") if other != name]
    lines = [own for _, own in points[points[name].notna()].groupby(others, dropna=False, sort=False)]
    lines = [own.sort_values(name) for own in lines if own[name].nunique() > 1]
    for own in lines:
        varied = [other for other in FIELDS_OF if other != name and points[other].nunique() > 1]
        label = _label(own.iloc[0], varied if len(lines) > 1 else [])
        for rate, (_, line, marker) in RATES.items():
            axes.plot(own[name], own[rate], linestyle=line, marker=marker, color=_shade(label, shades),
                      markersize=style.line_width(6), linewidth=style.line_width(1.6))  # fmt: skip
    values = sorted(set(points[name].dropna()))
    if name in ("window", "gpus") and len(values) > 1 and values[0] > 0:
        axes.set_xscale("log", base=2)
        style.powers(axes.xaxis, base=2)
    if len(values) <= 6:
        axes.set_xticks(values, [_short(value) for value in values], fontsize="small")
        axes.minorticks_off()
    return {place for own in lines for place in own.index}


def _draw_alone(
    axes: Axes, rows: pd.DataFrame, facets: Sequence[str], shades: dict[str, str]
) -> list[tuple[str, list[tuple[float, float]]]]:
    """What is in no line: a point, or where it has none of what the axes are against (a schedule without a window),
    a horizontal. Returns what to write beside which of several places."""
    named = []
    for _, row in rows.iterrows():
        varied = [name for name in FIELDS_OF if name != facets[0] and (rows[name].nunique() > 1 or name in facets)]
        label = _label(row, varied)
        level = pd.isna(row[facets[0]])
        for rate, (_, line, marker) in RATES.items():
            look: dict[str, Any] = {
                "color": _shade(label, shades),
                "linewidth": style.line_width(1.4),
                "gid": f"{label}, {rate}",
            }
            if level:
                axes.axhline(row[rate], linestyle=line, **look)
            else:
                axes.plot(row[facets[0]], row[rate], marker=marker, markersize=style.line_width(6), **look)
        left, right = axes.get_xlim()
        along = [right - share * (right - left) for share in (0, 0.2, 0.4, 0.6, 0.8)]
        if pd.notna(row.per_response):
            named.append((label, [(x, float(row.per_response)) for x in (along if level else [row[facets[0]]])]))
    return named


def _label(row: pd.Series, varied: Sequence[str]) -> str:
    return ", ".join([row.schedule, *(f"{name} {row[name]:g}" for name in varied if pd.notna(row[name]))])


def _shade(label: str, shades: dict[str, str]) -> str:
    return shades.setdefault(label, PALETTE[len(shades) % len(PALETTE)])


def _short(value: float) -> str:
    """4096 -> 4K."""
    return f"{value / 1024:g}K" if value >= 1024 and value % 1024 == 0 else f"{value:g}"
