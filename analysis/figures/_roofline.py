"""Achieved FLOP/s of decode, prefill and training phases under this machine's ceilings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.model_costs import roofline_points
from analysis.tables import by_arm, provenance
from profiling.errors import DataError
from profiling.reader import Run

MARKERS = {
    "decode": "o", "prefill": "s", "logprob_forward": "<", "reference_forward": ">", "value_forward": "v",
    "update_value": "D", "update_policy": "^",
}  # fmt: skip
CAPTION = (
    "Achieved FLOP/s against arithmetic intensity (FLOP per byte of weights, keys and values), summed over each run's "
    "training steps; a marker's area is its share of the points' time. Ceilings as labelled. The convention counts "
    "causal attention and every weight once a pass; a training phase's bytes leave out activations, so that its "
    "intensity is an upper bound. A small model on a CPU is far below its roof because each decode "
    "step is dominated by launching its operators."
)


def hardware_of(runs: Sequence[Run]) -> dict[str, Any]:
    """hardware.json beside the runs: peak_flops, memory_bytes_per_s, measured or not."""
    path = Path(runs[0].path).parent / "hardware.json"
    try:
        values = json.loads(path.read_bytes())
        return {"name": str(values["name"]), "peak_flops": float(values["peak_flops"]),
                "memory_bytes_per_s": float(values["memory_bytes_per_s"]),
                "measured": bool(values["measured"])}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; a roofline needs the machine's ceilings") from None


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """Points, with the roof above each. Raises DataError for a point above its roof: a formula or a clock is wrong."""
    hardware = hardware_of(runs)
    points = roofline_points(runs)
    roof = np.minimum(hardware["peak_flops"], points.intensity * hardware["memory_bytes_per_s"])
    points = points.assign(roof_flops_per_s=roof)
    for point in points[points.flops_per_s > roof].itertuples():
        raise DataError(
            f"{point.run}: {point.work} reaches {point.flops_per_s:.4g} FLOP/s, above the roof of "
            f"{point.roof_flops_per_s:.4g}; the ceilings in hardware.json are not this machine's"
        )
    return points


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    hardware = hardware_of(runs)
    figure, (axes,) = style.subplots(height=4.8)
    peak, bandwidth = hardware["peak_flops"], hardware["memory_bytes_per_s"]
    ridge = peak / bandwidth
    x = np.geomspace(min(table.intensity.min(), ridge) / 4, max(table.intensity.max(), ridge) * 4, 200)
    axes.loglog(x, np.minimum(peak, x * bandwidth), color="#333333", linewidth=1.6)
    kind = "measured" if hardware["measured"] else "data sheet"
    axes.text(x[-1], peak * 1.15, f"{peak / 1e9:.0f} GFLOP/s ({kind})", ha="right", fontsize=9)
    slope = f"{bandwidth / 1e9:.1f} GB/s ({kind})"
    axes.annotate(slope, (x[0], x[0] * bandwidth), xytext=(16, -4), textcoords="offset points", fontsize=9)
    axes.axvline(ridge, color="#999999", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"ridge {ridge:.1f} FLOP/byte", (ridge, peak), xytext=(4, 14), textcoords="offset points", fontsize=8
    )
    colours = style.arm_colours(list(by_arm(runs)))
    for (arm, work), rows in table.groupby(["arm", "work"], sort=False):
        axes.scatter(
            rows.intensity, rows.flops_per_s, s=30 + 220 * rows.time_share, marker=MARKERS[work], alpha=0.65,
            color=colours[arm], edgecolor="white", linewidth=0.6,
            label=f"{style.arm_name(arm)}, {work.replace('_', ' ')}",
        )  # fmt: skip
    axes.set(
        xlabel="arithmetic intensity, FLOP/byte",
        ylabel="achieved FLOP/s",
        ylim=(table.flops_per_s.min() / 3, peak * 3),
    )
    axes.set_title(f"Roofline of {hardware['name']} ({provenance(runs)})")
    style.legend(axes, columns=3)
    return figure
