"""Achieved FLOP/s of decode, prefill and, where counted, training under the machine's ceilings; how decode moves."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.chosen import Reasons, left_out, listed, need_engine_records, simulated_only, usable
from analysis.hardware import Ceilings, Hardware, hardware_of
from analysis.labels import name_points
from analysis.model_costs import MOST_STEPS, all_reduce_ceiling, decode_trajectory, model_of, roofline_points
from analysis.tables import arm_of, by_arm, provenance
from profiling.errors import DataError
from profiling.reader import Run

MARKERS = {
    "decode": "o", "prefill": "s", "logprob_forward": "<", "reference_forward": ">", "value_forward": "v",
    "update_value": "D", "update_policy": "^",
}  # fmt: skip
ROLLOUT = ("decode", "prefill")
ALLOWED = 1.01
"""Of the roof: the convention of FLOPs and bytes and a cost model's own count differ by so much."""
TRAJECTORIES = ("batch", "context")
"""What the decode spans are binned by."""
AREA, LEAST_SHARE = 300, 0.05
"""Of a marker that has all of the time, in points²; and the share that the smallest marker stands for."""
LINES = ("-", (0, (5, 2)))
"""Of the data sheet's ceilings and those in practice; of the first alone where one is known."""
CAPTION = (
    "Achieved FLOP/s of one GPU (or of the host) against arithmetic intensity (FLOP per byte of weights, keys and "
    "values). Left: each run's training steps summed; a marker's area is its share of the time of that run's points "
    f"(at least that of {LEAST_SHARE:.0%}); hollow: a synchronous rollout; numbers: decode, by run. Training phases "
    "are there where the run has counted their passes, as the trainer does and a simulation from data sheets; else "
    "the shares are of the rollout alone. Ceilings as labelled: the data sheet's, and what is reached in practice "
    "(measured here, or the simulator's efficiency factors); the all-reduce line is what the link allows if sending "
    "took all of the time of products with the weights. Right: the decode time of each arm's first run, split by how "
    "many rows ran and by how long their contexts were; arrows point to many and long. A simulated point follows from "
    "the cost model; "
    "it is not evidence about the GPU. FLOPs count causal attention and every weight once a pass; a training "
    f"phase's bytes leave out activations, so that its intensity is an upper bound. Longer runs: {MOST_STEPS} steps "
    "of them, evenly spaced."
)
COLUMNS = [
    "what", "run", "arm", "schedule", "work", "from", "to", "intensity", "flops_per_s", "roof_flops_per_s", "seconds",
    "time_share", "flops", "bytes", "tensor_activity", "dram_activity", "label",
]  # fmt: skip


def drawn_runs(runs: Sequence[Run]) -> tuple[list[Run], Reasons]:
    """Those on the first one's hardware, a roofline is of one machine; and the others. Raises DataError."""

    def need(run: Run) -> None:
        need_engine_records(run)
        model_of(run)
        hardware_of(run)

    found, reasons = usable(runs, need)
    first = hardware_of(found[0])
    elsewhere = [run for run in found if hardware_of(run).highest != first.highest]
    reasons += [(run.name, f"on other hardware than {first.name}") for run in elsewhere]
    return [run for run in found if run not in elsewhere], reasons


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """what: point (with the roof above), batch or context (a trajectory's bins), ceiling or all_reduce (their labels).

    Raises DataError for a point above its roof: a formula or a clock is wrong."""
    found, _ = drawn_runs(runs)
    hardware = hardware_of(found[0])
    schedules = {run.name: schedule_of(run) for run in found}
    points = roofline_points(found)
    roof = roof_of(hardware.highest, points.intensity)
    points = points.assign(what="point", roof_flops_per_s=roof)
    for point in points[points.flops_per_s > ALLOWED * roof].itertuples():
        raise DataError(
            f"{point.run}: {point.work} reaches {point.flops_per_s:.4g} FLOP/s, above the roof of "
            f"{point.roof_flops_per_s:.4g}; the ceilings in {hardware.path} are not this machine's"
        )
    parts = [points]
    for members in by_arm(found).values():
        run = members[0]
        for over in TRAJECTORIES:
            line = decode_trajectory(run, over)
            parts.append(line.assign(what=over, run=run.name, arm=arm_of(run), work="decode"))
    for ceilings in hardware.ceilings:
        parts.append(
            pd.DataFrame(
                {"what": "ceiling", "intensity": [ceilings.ridge], "flops_per_s": [ceilings.flops],
                 "label": [ceilings.source]}
            )
        )  # fmt: skip
    for run in {run.header["gpus_per_engine"]: run for run in reversed(found)}.values():
        gpus = run.header["gpus_per_engine"]
        if (between := all_reduce_ceiling(model_of(run), hardware, gpus)) is not None:
            label = f"all-reduce over {between[0]}, {gpus} GPUs"
            parts.append(pd.DataFrame({"what": "all_reduce", "flops_per_s": [between[1]], "label": [label]}))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(schedule=table.run.map(schedules)).reindex(columns=COLUMNS)


def schedule_of(run: Run) -> str | None:
    return (run.header["schedule"] or {}).get("kind")


def roof_of(ceilings: Ceilings, intensity: "pd.Series | np.ndarray") -> np.ndarray:
    return np.minimum(ceilings.flops, np.asarray(intensity) * ceilings.bytes_per_s)


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    found, reasons = drawn_runs(runs)
    hardware = hardware_of(found[0])
    points = table[table.what == "point"]
    figure, (left, upper, spare, lower) = style.subplots(2, 2, width=9.0, height=5.4)
    spare.remove()
    left.set_subplotspec(left.get_subplotspec().get_gridspec()[:, 0])  # type: ignore[union-attr]
    looks = style.arm_looks(list(by_arm(found)))
    ridges = [ceilings.ridge for ceilings in hardware.ceilings]
    x = np.geomspace(min(points.intensity.min(), *ridges) / 3, max(points.intensity.max(), *ridges) * 3, 200)
    top = _draw_ceilings(left, hardware, table, x)
    for row in points.itertuples():
        hollow, colour = row.schedule == "synchronous", looks[row.arm].colour
        left.scatter(
            row.intensity, row.flops_per_s, s=style.line_width(AREA * max(row.time_share, LEAST_SHARE)), alpha=0.75,
            marker=MARKERS[row.work], facecolor="none" if hollow else colour, edgecolor=colour if hollow else "white",
            linewidth=style.line_width(1.6 if hollow else 0.6), zorder=5 if hollow else 4,
        )  # fmt: skip
    low = np.log10(points.flops_per_s.min() / 3)
    left.set(ylim=(10**low, 10 ** (low + (np.log10(top) - low) * 1.35)), xlim=(x[0], x[-1]))
    left.set(xlabel="arithmetic intensity, FLOP/byte", ylabel="achieved FLOP/s")
    style.title(left, f"Roofline of {hardware.name} ({provenance(found)})")
    _draw_trajectory(upper, hardware, table[table.what == "batch"], looks, "rows that run", "{:.0f}")
    _draw_trajectory(lower, hardware, table[table.what == "context"], looks, "context of a row", "{:,.0f} tokens")
    lower.set(xlabel="arithmetic intensity, FLOP/byte")
    words = left_out(reasons)
    if without := [run.name for run in found if not set(points[points.run == run.name].work) - {*ROLLOUT}]:
        words.append(f"Training phases: not recorded by {listed(without)}; shares of time are of the rollout alone.")
    words += simulated_only(found)
    handles = _handles(found, looks, list(points.work))
    style.below(figure, handles, [str(handle.get_label()) for handle in handles], 5, "\n".join(words))
    if len(looks) > 1:
        number = {arm: str(place) for place, arm in enumerate(looks, start=1)}
        decode = points[points.work == "decode"]
        places = list(zip(decode.intensity, decode.flops_per_s, strict=True))
        named = [(number[arm], [place]) for arm, place in zip(decode.arm, places, strict=True)]
        name_points(left, named, places, away=style.line_width(9))
    return figure


def _handles(found: Sequence[Run], looks: dict[str, style.Look], work: Sequence[str]) -> list[Line2D]:
    arms = []
    for place, (arm, members) in enumerate(by_arm(found).items(), start=1):
        hollow, look = schedule_of(members[0]) == "synchronous", looks[arm]
        name = f"{place} {style.arm_name(arm)}" if len(looks) > 1 else style.arm_name(arm)
        arms.append(Line2D([], [], linestyle=look.line, marker="o", label=name, color=look.colour,
                           markerfacecolor="white" if hollow else look.colour))  # fmt: skip
    kinds = [kind for kind in MARKERS if kind in set(work)]
    return arms + [
        Line2D([], [], linestyle="none", marker=MARKERS[kind], color="#666666", label=kind.replace("_", " "))
        for kind in kinds
    ]


def _draw_ceilings(axes: Axes, hardware: Hardware, table: pd.DataFrame, x: np.ndarray) -> float:
    """Lines, named in a legend above the roof, where nothing can lie. Returns the highest."""
    for ceilings, line in zip(hardware.ceilings, LINES, strict=False):
        label = (
            f"{ceilings.source}: {si(ceilings.flops)}FLOP/s, {si(ceilings.bytes_per_s)}B/s,\n"
            f"ridge {ceilings.ridge:.3g} FLOP/byte"
        )
        axes.loglog(x, roof_of(ceilings, x), color="#333333", linewidth=1.4, linestyle=line, label=label)
        axes.plot([ceilings.ridge] * 2, [0, ceilings.flops], color="#999999", linewidth=0.8, linestyle=":")
    style.powers(axes.xaxis)
    style.powers(axes.yaxis)
    reduced = table[table.what == "all_reduce"]
    for row in reduced.itertuples():
        axes.axhline(
            row.flops_per_s, color=style.PURPLE, linewidth=1.4, linestyle="-.",
            label=f"{row.label}: {si(row.flops_per_s)}FLOP/s",
        )  # fmt: skip
    axes.legend(loc="upper left", frameon=False, fontsize="x-small")
    return max(hardware.highest.flops, *reduced.flops_per_s, 0.0)


def _draw_trajectory(
    axes: Axes, hardware: Hardware, lines: pd.DataFrame, looks: dict[str, style.Look], over: str, unit: str
) -> None:
    """Bins of decode time, joined from few to many; the arrow points to many."""
    if lines.empty:
        axes.text(0.5, 0.5, "no decode spans", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    x = np.geomspace(lines.intensity.min() / 1.6, lines.intensity.max() * 1.6, 100)
    for ceilings, line in zip(hardware.ceilings, LINES, strict=False):
        axes.loglog(x, roof_of(ceilings, x), color="#333333", linewidth=1.2, linestyle=line)
    for arm, own in lines.groupby("arm", sort=False):
        colour = looks[str(arm)].colour
        fill = "white" if (own.schedule == "synchronous").iloc[0] else colour
        axes.plot(own.intensity, own.flops_per_s, marker="o", linestyle=looks[str(arm)].line, color=colour,
                  linewidth=style.line_width(1.2), markersize=style.line_width(5), markerfacecolor=fill)  # fmt: skip
        if len(own) > 1:
            tail, head = own.iloc[-2], own.iloc[-1]
            axes.annotate(
                "", (head.intensity, head.flops_per_s), (tail.intensity, tail.flops_per_s), zorder=5,
                arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 0.8, "mutation_scale": 12},
            )  # fmt: skip
    axes.set(xlim=(x[0], x[-1]), ylim=(lines.flops_per_s.min() / 2, roof_of(hardware.highest, x).max() * 1.5))
    style.log_scale(axes, "x")  # often less than a power of ten
    style.powers(axes.yaxis)
    few, many = (unit.format(value) for value in (lines["from"].min(), lines["to"].max()))
    style.title(axes, f"Decode by {over}, {few.split()[0]} to {many}")


def si(value: float) -> str:
    """Three figures with a prefix: 3.35e12 -> "3.35 T"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
