"""One self-contained report.html: headline, warnings, tables, figures with what they show and do not, provenance."""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from analysis import style
from analysis.figures import FIGURES
from analysis.figures._predicted_measured import read_predictions
from analysis.ledgers import ledger_table
from analysis.svg import alt_text, to_svg
from analysis.tables import (
    alarm_table,
    arm_named,
    arm_of,
    by_arm,
    comparison_tables,
    device_table,
    paired_speedup,
    provenance,
    score_table,
    speed_table,
)
from profiling.advice import CAVEAT, Advice, read_advice
from profiling.errors import DataError, ToolkitError
from profiling.reader import Run
from profiling.writer import write_atomically

MOST_CONFIG_CHARACTERS = 20_000
"""Of a run's configuration in the page."""
MOST_NUMBERS = 40
"""Rows of a figure's table in the page."""
MOST_RUNS = 60
"""Whose configurations are in the page: 3 MB are soon full."""


TITLES = {
    "accuracy_time": "Accuracy against wall-clock",
    "accuracy_steps": "Accuracy against steps",
    "accuracy_tokens": "Accuracy against tokens",
    "response_length": "Response lengths",
    "length_distribution": "Distribution of response lengths",
    "staleness": "Staleness and length bias",
    "engine_timeline": "Engines and trainer",
    "batch_occupancy": "Batch through a rollout",
    "idle_ledger_steps": "Idle ledger by step",
    "energy": "Energy by phase",
    "speedup": "Speed-up over the synchronous run",
    "cost_time": "Cost against time",
    "predicted_measured": "Predicted against measured",
}
"""Of figures whose names do not read as one."""


def write_report(
    runs: Sequence[Run],
    output: Path,
    *,
    predictions: Path | None = None,
    target: float = 0.85,
    advice: Callable[[], Mapping[Path, Advice]] | Mapping[Path, Advice] | None = None,
    command: str | None = None,
) -> Path:
    """Write `output`, a page that needs no network and no script. What a run lacks is left out, with the reason.

    predictions: a table; predictions.csv beside the runs by default.
    advice: by path of the run, or what gives it, asked last; default: advice.json of each, where it is there.
    command: what was typed.
    Raises DataError.
    """
    if not runs:
        raise DataError("no runs to report on; name at least one run directory")
    beside = runs[0].path.parent
    predictions = predictions or beside / "predictions.csv"
    script = (files("analysis") / "report.js").read_text()
    tables = _tables(runs, target, predictions)
    figures = [_figure_section(name, place, runs) for place, name in enumerate(FIGURES)]
    for section in (*tables, *figures):
        section["missing"] = _without_folders(section["missing"], runs)
    page = (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        .from_string((files("analysis") / "report.html.jinja").read_text())
        .render(
            title=_title(runs),
            headline=_headline(runs, target, predictions),
            provenance=provenance(runs),
            simulated=[f"{run.name} ({run.kind})" for run in runs if run.simulated],
            warnings=_warnings(runs, advice() if callable(advice) else advice),
            caveat=CAVEAT,
            command=command,
            tables=tables,
            figures=figures,
            runs=[_run_facts(run) for run in runs[:MOST_RUNS]],
            runs_left_out=max(0, len(runs) - MOST_RUNS),
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            style=Markup((files("analysis") / "report.css").read_text()),  # our own files # nosec B704
            script=Markup(script),  # nosec B704
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    write_atomically(output, page.encode(errors="backslashreplace"))
    return output


def _without_folders(reason: str | None, runs: Sequence[Run]) -> str | None:
    """A report is sent to others: where its runs lay on this machine is nothing to them."""
    for folder in {str(run.path.parent) for run in runs} - {"."}:
        reason = reason.replace(f"{folder}/", "") if reason else None
    return reason


def _title(runs: Sequence[Run]) -> str:
    arms = list(by_arm(runs))
    return f"Run report: {', '.join(arms[:3])}{f' and {len(arms) - 3} more' if len(arms) > 3 else ''}"


def _tables(runs: Sequence[Run], target: float, predictions: Path) -> list[dict[str, Any]]:
    tables = [
        _table("Speed", _SPEED_NOTE, lambda: speed_table(runs)),
        _table("Ledger by cause", _LEDGER_NOTE, lambda: ledger_table(runs, style.CAUSES)),
        _table(f"Time to {target:.0%}", "Mean of three consecutive evaluations.", lambda: score_table(runs, target)),
    ]
    if not all(run.simulated for run in runs):
        tables.append(_table("Devices by phase", _DEVICE_NOTE, lambda: device_table(runs)))
    return [*tables, *(_prediction_tables(predictions) if predictions.exists() else [])]


def _warnings(runs: Sequence[Run], given: Mapping[Path, Advice] | None) -> list[dict[str, Any]]:
    """By run that has something to say: its alarms, and what a simulation says of its window."""
    alarms = alarm_table(runs)
    found = []
    for run in runs:
        lines = [{"kind": "Alarm", "text": text, "table": None} for text in alarms[alarms.run == run.name].alarm]
        try:
            advice = read_advice(run.path) if given is None else given.get(run.path)
            if advice is not None:
                found_table = None if advice.withheld else _advice_table(advice)
                lines.append({"kind": "Window", "text": advice.sentence(), "table": found_table})
        except DataError as error:
            lines.append({"kind": "Window", "text": f"Left out: {error}", "table": None})
        if lines:
            found.append({"run": run.name, "lines": lines})
    return found


def _advice_table(advice: Advice) -> dict[str, Any]:
    assert advice.own is not None
    rows = [
        {
            "schedule": f"{option.kind}, {option.name}",
            "s per finished response": option.seconds_per_finished_row,
            "saving, %": 100 * option.saving,
            "± (95 %)": None if option.margin is None else 100 * option.margin,
        }
        for option in (advice.own, *advice.others)
    ]
    error = ""
    if advice.replay_error is not None:
        error = f"; a replay of the run itself misses its measured seconds by {advice.replay_error:+.1%}"
    note = (
        f"First row: the run's own schedule. Replays of {advice.steps} steps with {advice.basis}; the interval from "
        f"{advice.resamples} replays of resampled prompts{error}."
    )
    return _table("What other windows would cost (simulated)", note, lambda: pd.DataFrame(rows))


_SPEED_NOTE = (
    "Medians over the arm's runs; start-up steps left out of the rates. Rollout, decode and prefill are of a step. "
    "Rollout: by the clock, without what training beside it hides. Decode and prefill: summed over the GPUs, so with "
    "several of them they exceed the rollout."
)

_LEDGER_NOTE = (
    "GPU-seconds of a training step by what the GPU did or waited for: causes exclude each other and add up to all of "
    "it. Start-up steps, evaluation and checkpoints left out; means over the arm's runs. –: the run cannot tell. "
    "Empty slots of a decode step are no time that could be won back: a step half full takes nearly as long."
)

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
                names = " and ".join(dict.fromkeys(style.arm_name(arm_named(own)) for own in wall.target))
                missed = f"by {wall.error.abs().median():.1%} on the median of {len(wall)} runs "
                missed += f"(from {wall.error.min():+.1%} to {wall.error.max():+.1%})"
                if len(wall) == 1:
                    missed = f"by {wall.error.iloc[0]:+.1%}"
                lines.append(
                    f"Calibrated on {style.arm_name(str(source))} alone, a {kind} of {names} misses the training time "
                    f"{missed}."
                )
    return lines


def _speedup_line(runs: Sequence[Run], arm: str, target: float) -> str:
    ratio = paired_speedup(runs, "ppo", arm, target)
    name = style.arm_name(arm)
    if ratio["median"] is None:
        return f"{name} and PPO: no seed in which both reached {target:.0%}."
    interval = "" if ratio["low"] is None else f" (95 % interval {ratio['low']:.2f} to {ratio['high']:.2f})"
    unreached = "" if not ratio["unreached"] else f"; in {ratio['unreached']} more, one of the two did not reach it"
    often = f" on the median of {ratio['pairs']} seeds{interval}, faster in {ratio['wins']} of them"
    if ratio["pairs"] == 1:
        often = " in the one seed in which both did"
    return f"{name} reaches {target:.0%} {ratio['median']:.2f} times as fast as PPO{often}{unreached}."


def _prediction_tables(path: Path) -> list[dict[str, Any]]:
    found = comparison_tables(read_predictions(path))
    return [
        _table(
            f"{style.arm_name(arm)}, predicted from {style.arm_name(source)} alone",
            _PREDICTION_NOTE,
            table.copy,
        )
        for (source, arm), table in found.items()
    ]


def _table(title: str, note: str, make: Callable[[], pd.DataFrame]) -> dict[str, Any]:
    try:
        frame = make()
    except ToolkitError as error:
        return {"title": title, "note": note, "missing": str(error), "columns": [], "rows": []}
    rows = [[_cell(column, value) for column, value in zip(frame.columns, row, strict=True)]
            for row in frame.itertuples(index=False)]  # fmt: skip
    return {"title": title, "note": note, "missing": None, "columns": list(frame.columns), "rows": rows}


def _cell(column: object, value: Any) -> dict[str, str]:
    """What is shown, and what sorts it: a number where it is one, nothing where it is not known."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return {"text": "–", "sort": "", "kind": "number"}
    if isinstance(value, float):
        name = str(column)
        shown = f"{value:+.1%}" if "error" in name else f"{value:.1%}" if name.endswith("share") else f"{value:.4g}"
        return {"text": shown, "sort": f"{value:.9g}", "kind": "number"}
    kind = "number" if isinstance(value, int) else "text"
    return {"text": str(value), "sort": str(value), "kind": kind}


def title_of(name: str) -> str:
    return TITLES.get(name, name.replace("_", " ").capitalize())


def _figure_section(name: str, place: int, runs: Sequence[Run]) -> dict[str, Any]:
    module = FIGURES[name]
    section = {"id": f"figure-{name}", "title": title_of(name), "caption": module.CAPTION, "svg": None,
               "alt": "", "numbers": None, "missing": None}  # fmt: skip
    try:
        table = module.data(runs)
        with style.use("screen"):
            figure = module.draw(table, runs)
            section["svg"] = Markup(to_svg(figure, f"f{place}-"))  # matplotlib escapes texts # nosec B704
        section["alt"] = alt_text((module.__doc__ or name).strip().splitlines()[0], table, provenance(runs))
        note = "" if len(table) <= MOST_NUMBERS else f"The first {MOST_NUMBERS} of {len(table):,} rows."
        section["numbers"] = _table(f"Numbers of {section['title']}", note, lambda: table.head(MOST_NUMBERS))
    except ToolkitError as error:
        section["missing"] = str(error)
    except Exception as error:  # one figure's fault is no reason for no report
        section["missing"] = f"it cannot be drawn of these runs ({type(error).__name__}: {error})"
    return section


def _run_facts(run: Run) -> dict[str, Any]:
    header = run.header
    path = run.path / "config.toml"
    config = path.read_text(errors="replace") if path.exists() else ""
    cut = len(config) > MOST_CONFIG_CHARACTERS
    return {
        "name": run.name,
        "arm": style.arm_name(arm_of(run)),
        "kind": run.kind,
        "started": _started(header["unix_time_s"], header["host"]),
        "status": run.trailer["status"] if run.trailer else "live or killed",
        "versions": ", ".join(f"{name} {version}" for name, version in (header.get("versions") or {}).items()) or "–",
        "gpus": f"{header['gpus']} GPUs, {header['engines']} engines of {header['gpus_per_engine']}",
        "devices": _devices(run),
        "notes": [record["text"] for record in run.outline if record["type"] == "note"],
        "config": config[:MOST_CONFIG_CHARACTERS] + ("\n# ... the rest is in config.toml" if cut else ""),
    }


def _devices(run: Run) -> str:
    """Names, each once."""
    names = (str(device.get("name", "?")) for device in run.header["devices"])
    return ", ".join(dict.fromkeys(names)) or "–"


def _started(unix_s: float | None, host: str | None) -> str:
    """Nothing of what is not known: a simulated run has neither."""
    where = f" on {host}" if host else ""
    try:
        when = "" if unix_s is None else datetime.fromtimestamp(unix_s, UTC).strftime(" %Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        when = ""
    return f", started{when}{where}" if when or where else ""
