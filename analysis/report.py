"""One self-contained report.html: headline, tables, figures with what they show and do not, and provenance."""

import base64
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from analysis import style
from analysis.figures import FIGURES
from analysis.figures._predicted_measured import read_predictions
from analysis.tables import (
    alarm_table,
    arm_of,
    by_arm,
    comparison_tables,
    device_table,
    paired_speedup,
    provenance,
    score_table,
    speed_table,
)
from profiling.errors import DataError, ToolkitError
from profiling.reader import Run
from profiling.writer import write_atomically


def write_report(
    runs: Sequence[Run],
    output: Path,
    *,
    predictions: Path | None = None,
    hardware: Path | None = None,
    target: float = 0.85,
) -> Path:
    """Write `output`, a page that needs no network and no script. What a run lacks is left out, with the reason.

    predictions, hardware: files beside the runs by default (predictions.csv, hardware.json).
    """
    if not runs:
        raise DataError("no runs to report on")
    beside = runs[0].path.parent
    predictions = predictions or beside / "predictions.csv"
    sections = [section for name in FIGURES for section in [_figure_section(name, runs)]]
    tables = [
        _table(
            "Speed", "Medians over the arm's runs; start-up steps left out of the rates.", lambda: speed_table(runs)
        ),
        _table(f"Time to {target:.0%}", "Mean of three consecutive evaluations.", lambda: score_table(runs, target)),
    ]
    if not all(run.simulated for run in runs):
        tables.append(_table("Devices by phase", _DEVICE_NOTE, lambda: device_table(runs)))
    if not (found := alarm_table(runs)).empty:
        tables.append(_table("Alarms", "What a run should be told about, worst first.", lambda: found))
    if predictions.exists():
        tables += _prediction_tables(predictions)
    page = (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        .from_string((files("analysis") / "report.html.jinja").read_text())
        .render(
            headline=_headline(runs, target, predictions),
            provenance=provenance(runs),
            simulated=[f"{run.name} ({run.kind})" for run in runs if run.simulated],
            tables=tables,
            figures=sections,
            runs=[_run_facts(run) for run in runs],
        )
    )
    write_atomically(output, page.encode())
    return output


_DEVICE_NOTE = (
    "The first measured run of each arm. Busy: share of a phase's time with a kernel running on the GPU, or of all of "
    "the host's cores; energy of GPUs. 95 % intervals; unresolved where the sensors are too slow to tell the phase "
    "from its neighbours."
)

_PREDICTION_NOTE = (
    "Medians over the target runs; error = (predicted - measured) / measured. Forecast: costs and lengths of the "
    "calibration runs only. Replay: the target's own lengths. Steps are given; the time to the target is measured "
    "steps times predicted seconds per step, so it is conditional on them. Drift-corrected: all costs scaled by the "
    "ratio of the drift probe's medians."
)


def _headline(runs: Sequence[Run], target: float, predictions: Path) -> list[str]:
    lines = []
    arms = by_arm(runs)
    for arm in ("tppo", "tppo-full"):
        if "ppo" in arms and arm in arms and not runs[0].simulated:
            try:
                lines.append(_speedup_line(runs, arm, target))
            except DataError as error:
                lines.append(str(error))
    if predictions.exists():
        table = read_predictions(predictions)
        for source, group in table[~table.drift_corrected.astype(bool)].groupby("calibrated_on", sort=False):
            for kind in ("forecast", "replay"):
                wall = group[(group.kind == kind) & (group.quantity == "training_seconds")]
                names = ", ".join(dict.fromkeys(style.arm_name(_arm(target_run)) for target_run in wall.target))
                lines.append(
                    f"Calibrated on {style.arm_name(str(source))} alone, a {kind} of {names} misses the training time "
                    f"by {wall.error.abs().median():.1%} on the median of {len(wall)} runs "
                    f"(from {wall.error.min():+.1%} to {wall.error.max():+.1%})."
                )
    return lines


def _speedup_line(runs: Sequence[Run], arm: str, target: float) -> str:
    ratio = paired_speedup(runs, "ppo", arm, target)
    name = style.arm_name(arm)
    if ratio["median"] is None:
        return f"{name} and PPO: no seed in which both reached {target:.0%}."
    interval = "" if ratio["low"] is None else f" (95 % interval {ratio['low']:.2f} to {ratio['high']:.2f})"
    unreached = "" if not ratio["unreached"] else f"; in {ratio['unreached']} more, one of the two did not reach it"
    return (
        f"{name} reaches {target:.0%} {ratio['median']:.2f} times as fast as PPO on the median of {ratio['pairs']} "
        f"seed{'s' if ratio['pairs'] != 1 else ''}{interval}, faster in {ratio['wins']} of them{unreached}."
    )


def _arm(name: str) -> str:
    return name.rsplit("-s", 1)[0]


def _prediction_tables(path: Path) -> list[dict[str, Any]]:
    found = comparison_tables(read_predictions(path))
    return [
        _table(
            f"{style.arm_name(arm)}, predicted from {style.arm_name(source)} alone",
            _PREDICTION_NOTE,
            lambda table=table: table,
        )
        for (source, arm), table in found.items()
    ]


def _table(title: str, note: str, make: Any) -> dict[str, Any]:
    try:
        frame = make()
    except ToolkitError as error:
        return {"title": title, "note": note, "missing": str(error), "columns": [], "rows": []}
    rows = [[_cell(column, value) for column, value in zip(frame.columns, row, strict=True)]
            for row in frame.itertuples(index=False)]  # fmt: skip
    return {"title": title, "note": note, "missing": None, "columns": list(frame.columns), "rows": rows}


def _cell(column: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:+.1%}" if "error" in column else f"{value:.4g}"
    return str(value)


def _figure_section(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    module = FIGURES[name]
    section = {"title": name.replace("_", " "), "caption": module.CAPTION, "image": None, "missing": None}
    try:
        buffer = io.BytesIO()
        with style.use("screen"):
            module.draw(module.data(runs), runs).savefig(buffer, format="png")
        section["image"] = base64.b64encode(buffer.getvalue()).decode()
    except ToolkitError as error:
        section["missing"] = str(error)
    return section


def _run_facts(run: Run) -> dict[str, Any]:
    header = run.header
    started = header["unix_time_s"]
    return {
        "name": run.name,
        "arm": style.arm_name(arm_of(run)),
        "kind": run.kind,
        "host": header["host"] or "–",
        "started": datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%d %H:%M UTC") if started else "–",
        "status": run.trailer["status"] if run.trailer else "live or killed",
        "versions": ", ".join(f"{name} {version}" for name, version in header.get("versions", {}).items()) or "–",
        "notes": [record["text"] for record in run.trace if record["type"] == "note"],
        "config": (run.path / "config.toml").read_text() if (run.path / "config.toml").exists() else "",
    }
