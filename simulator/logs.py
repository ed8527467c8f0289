"""Costs from the logs of other trainers: verl (console, JSON lines, TensorBoard, wandb export) and TRL.

Their logs hold seconds by phase and mean and maximum lengths, not what each engine did: a rollout's seconds are fitted
to its longest response (steps that have to follow each other) and to its tokens (rows that share them).
"""

import ast
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from profiling.errors import ConfigError, DataError
from profiling.files import opened, read_json, read_whole
from simulator.calibrate import Calibration, Observations, fit, numbers_that_fit
from simulator.costs import PHASE_COSTS

LONGEST_LINE = 1 << 20
MOST_ROWS = 10**9
"""Of a step, and engines."""
LARGEST_BYTES = 1 << 28
"""Of a trainer_state.json or a table."""
MOST = 1e15
"""Seconds, tokens or steps: more is a broken log."""
KINDS = ("verl", "trl")
VERL_PHASES = {
    "timing_s/old_log_prob": "logprob_forward",
    "timing_s/ref": "reference_forward",
    "timing_s/values": "value_forward",
    "timing_s/update_critic": "update_value",
    "timing_s/update_actor": "update_policy",
}
"""verl's timers -> phase, which costs by processed tokens."""
OCCASIONS = ("timing_s/testing", "timing_s/save_checkpoint")
NUMBER = r"(?:np\.\w+\()?(-?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))\)?"
CONSOLE = re.compile(r"(?:^|\s)step:(\d+) - (.*)")
CONSOLE_ENTRY = re.compile(rf"([\w./@-]+):{NUMBER}(?=\s|$)")
NEEDED = {
    "verl": ("timing_s/gen", "response_length/mean", "response_length/max"),
    "trl": ("step_time", "completions/mean_length", "completions/max_length", "num_tokens"),
}


def read_log(kind: str, path: Path) -> pd.DataFrame:
    """A row a training step: `step`, and the metrics as that trainer names them, null where a step has none.

    Raises DataError naming the file and what it lacks.
    """
    if not path.exists():
        raise DataError(f"{path}: no such log")
    events = path.is_dir() and any(path.rglob("events.out.tfevents.*"))
    if path.is_dir() and not events:
        path = path / "trainer_state.json" if kind == "trl" else path
        if not path.is_file():
            raise DataError(f"{path}: holds no {'trainer_state.json' if kind == 'trl' else 'TensorBoard events'}")
    if events or path.name.startswith("events.out.tfevents."):
        records = list(_of_tensorboard(path))
    elif path.suffix == ".csv":
        records = _of_csv(path)
    elif path.name == "trainer_state.json":
        records = list(_of_trainer_state(path))
    else:
        records = list(_of_lines(kind, path))
    if not records:
        raise DataError(f"{path}: holds no step of a {kind} log (looked for {', '.join(NEEDED[kind])})")
    table = pd.DataFrame(records).groupby("step", as_index=False).last().sort_values("step")
    missing = [name for name in NEEDED[kind] if name not in table]
    if missing:
        raise DataError(f"{path}: its steps have no {', '.join(missing)}, which a {kind} calibration needs")
    return table


def _lines(path: Path) -> Iterator[str]:
    try:
        with os.fdopen(opened(path), encoding="utf-8", errors="replace") as file:
            while line := file.readline(LONGEST_LINE):
                yield line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        return {}
    found = {str(key): _number(value) for key, value in values.items()}
    return {key: number for key, number in found.items() if number is not None and key.isprintable()}


def _number(value: Any) -> float | None:
    """None for what is no number, or none that is finite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _of_lines(kind: str, path: Path) -> Iterator[dict[str, float]]:
    """verl's console (step:1 - timing_s/gen:3.2 - ...) and file logger (JSON lines); TRL's printed dicts."""
    place = 0
    for line in _lines(path):
        if kind == "verl" and (found := CONSOLE.search(line)):
            entries = {key: float(value) for key, value in CONSOLE_ENTRY.findall(found[2])}
            yield {"step": float(found[1]), **{k: v for k, v in entries.items() if math.isfinite(v)}}
        elif (start := line.find("{")) >= 0 and (values := _literal(line[start:].strip())):
            data = _numbers(values.get("data", values))
            place += 1
            step = _number(values.get("step", place))
            if step is not None and any(name in data for name in NEEDED[kind]):
                yield {**data, "step": step}


def _literal(text: str) -> dict[str, Any] | None:
    for read in (json.loads, ast.literal_eval):
        try:
            values = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(values, dict):
            return values
    return None


def _of_trainer_state(path: Path) -> Iterator[dict[str, float]]:
    try:
        history = read_json(path, LARGEST_BYTES)["log_history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not a trainer_state.json: {error}") from None
    for entry in history if isinstance(history, list) else []:
        data = _numbers(entry)
        if "step" in data and "step_time" in data:
            yield data


def _of_csv(path: Path) -> list[dict[str, float]]:
    """An export of wandb: columns are metrics, some with the run's name before (`run - timing_s/gen`)."""
    try:
        table = pd.read_csv(BytesIO(read_whole(path, LARGEST_BYTES)))
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from None
    table = table[[name for name in table.columns if not str(name).endswith(("__MIN", "__MAX"))]]
    table.columns = [str(name).split(" - ", 1)[-1] for name in table.columns]
    step = next((name for name in ("Step", "_step", "step", "training/global_step") if name in table), None)
    if step is None:
        raise DataError(f"{path}: has no column Step, _step or step")
    table = table.loc[:, ~table.columns.duplicated()].apply(pd.to_numeric, errors="coerce")
    rows = table.rename(columns={step: "step"}).dropna(subset=["step"]).to_dict("records")
    return [_numbers(row) for row in rows]


def _of_tensorboard(path: Path) -> Iterator[dict[str, float]]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise ConfigError(
            f"{path}: reading TensorBoard events needs the package tensorboard; pip install 'tppo[tensorboard]'"
        ) from None
    files = sorted(path.rglob("events.out.tfevents.*")) if path.is_dir() else [path]
    for file in files:  # the library would wait for a pipe
        if not file.is_file():
            raise DataError(f"{file}: not a regular file")
    folders = list(dict.fromkeys(file.parent for file in files)) if path.is_dir() else [path]
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                yield {"step": float(event.step), tag.removeprefix("train/"): float(event.value)}


def calibrate_logs(kind: str, paths: Sequence[Path], *, engines: int, rows_per_step: int | None = None) -> Calibration:
    """One cost model for logs of one kind. engines: rollout engines that shared the rows of a step.
    Raises ConfigError, DataError."""
    for name, given in (("--engines", engines), ("--rows-per-step", rows_per_step or 1)):
        if not 1 <= given <= MOST_ROWS:
            raise ConfigError(f"{name} {given}: must be from 1 to {MOST_ROWS:,}")
    tables = [read_log(kind, path) for path in paths]
    together = _verl if kind == "verl" else _trl
    parts = [
        together(table, engines, rows_per_step, place, str(path))
        for place, (table, path) in enumerate(zip(tables, paths, strict=True))
    ]
    names = dict.fromkeys(name for part in parts for name in part)
    with numbers_that_fit(", ".join(map(str, paths))):
        fits = {name: fit(_joined([part[name] for part in parts if name in part])) for name in names}
    decode = fits.get("decode")
    if decode is not None and decode.observations <= len(decode.coefficients) + 1:
        raise DataError(
            f"{paths[0]}: {decode.observations} steps are too few to tell {len(decode.coefficients)} costs apart; "
            "give a longer log"
        )
    if decode is not None and not decode.total_measured_s:
        raise DataError(f"{paths[0]}: its rollouts took no time")
    if decode is None:
        raise DataError(f"{paths[0]}: no step has all that the rollout's fit needs")
    costs = {key: value for own in fits.values() if own for key, value in own.coefficients.items()}
    tested = pd.concat([table["timing_s/testing"] for table in tables if "timing_s/testing" in table] or
                       [pd.Series(dtype=float)]).dropna()  # fmt: skip
    return Calibration(
        costs, fits, tuple(path.name for path in paths), None, float(tested.mean()) if len(tested) else None
    )


def _verl(
    table: pd.DataFrame, engines: int, rows_per_step: int | None, place: int, where: str
) -> dict[str, Observations]:
    prompts = table.get("prompt_length/mean", pd.Series(0.0, table.index))
    if rows_per_step is not None:
        rows = pd.Series(float(rows_per_step), table.index)
    elif "perf/total_num_tokens" in table:
        rows = table["perf/total_num_tokens"] / (prompts + table["response_length/mean"])
    else:
        raise DataError(f"{where}: without perf/total_num_tokens it does not tell its rows; give --rows-per-step")
    responses = rows * table["response_length/mean"]
    processed = rows * (prompts + table["response_length/mean"])
    found = {
        "decode": _observed(table, "timing_s/gen", ("decode_base_s", "decode_per_row_s"),
                            [table["response_length/max"], responses / engines], place)
    }  # fmt: skip
    one = pd.Series(1.0, table.index)
    for timer, phase in VERL_PHASES.items():
        if timer in table:
            names = (f"{PHASE_COSTS[phase]}_base_s", f"{PHASE_COSTS[phase]}_per_token_s")
            found[phase] = _observed(table, timer, names, [one, processed], place)
    if "timing_s/reward" in table:
        # The rows of a step hardly vary: a base could not be told from what each of them costs.
        found["reward"] = _observed(table, "timing_s/reward", ("reward_per_row_s",), [rows], place)
    known = ["timing_s/gen", "timing_s/reward", *VERL_PHASES]
    if "timing_s/step" in table:
        spent = sum(table[name].fillna(0.0) for name in known if name in table)
        for name in OCCASIONS:
            spent = spent + (table[name].fillna(0.0) if name in table else 0.0)
        rest = table.assign(rest=(table["timing_s/step"] - spent).clip(lower=0))
        found["step_other"] = _observed(rest, "rest", ("step_other_s",), [one], place)
    return found


def _trl(
    table: pd.DataFrame, engines: int, rows_per_step: int | None, place: int, where: str
) -> dict[str, Observations]:
    """TRL logs one time a step, the mean since the last entry: one fit tells decoding from updating."""
    steps = table.step.diff()
    tokens = table.num_tokens.diff() / steps
    one = pd.Series(1.0, table.index)
    names = ("decode_base_s", "policy_update_per_token_s", "step_other_s")
    return {"decode": _observed(table, "step_time", names, [table["completions/max_length"], tokens, one], place)}


def _observed(
    table: pd.DataFrame, timer: str, names: tuple[str, ...], work: Sequence[pd.Series], place: int
) -> Observations:
    """Steps where the timer and all of the work are known."""
    columns = pd.concat([table[timer], *work, table.step], axis=1).dropna().to_numpy(float)
    columns = columns[(columns >= 0).all(axis=1) & (columns < MOST).all(axis=1)]
    steps = columns[:, -1].astype(np.int64) + place * 10**9
    return Observations(names, columns[:, 1:-1], columns[:, 0], np.ones(len(columns)), steps)


def _joined(parts: Sequence[Observations]) -> Observations:
    fields = [
        np.concatenate([getattr(part, name) for part in parts]) for name in ("work", "seconds", "weight", "step")
    ]
    return Observations(parts[0].names, *fields)
