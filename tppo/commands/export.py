"""`tppo export`: a run for other programs."""

import json
import re
from pathlib import Path

import pandas as pd

from profiling.attribution import device_estimates
from profiling.errors import ConfigError, DataError, InputError
from profiling.exports import chrome_trace
from profiling.reader import Run
from profiling.writer import write_atomically

FORMATS = ("chrome", "csv", "parquet", "tensorboard")
DEFAULTS = {"chrome": "trace.json", "csv": "export", "parquet": "export", "tensorboard": "tensorboard"}


def run_export(run_directory: Path, *, form: str, steps: str, output: Path | None) -> Path:
    """Write the run in one of FORMATS. Returns where. Raises ConfigError, DataError."""
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: not one of {', '.join(FORMATS)}")
    first, last = steps_of(steps)
    run, target = Run(run_directory), output or Path(DEFAULTS[form])
    if form == "chrome":
        write_atomically(target, json.dumps(chrome_trace(run, first, last)).encode())
    elif form == "tensorboard":
        write_scalars(run, target)
    else:
        write_tables(run, target, form)
    return target


def steps_of(text: str) -> tuple[int, int | None]:
    """`FIRST:LAST`, `FIRST:` or one step."""
    found = re.fullmatch(r"(\d+)(:(\d+)?)?", text)
    if not found or (found[3] and int(found[3]) < int(found[1])):
        raise InputError(f"--steps {text}: write FIRST:LAST, FIRST: or one step")
    first = int(found[1])
    return first, int(found[3]) if found[3] else None if found[2] else first


def write_tables(run: Run, directory: Path, form: str) -> None:
    """phases, metrics, rollouts, engine, devices, windows, ledger, and devices by phase; those that are not empty."""
    tables = {
        "phases": run.phases,
        "device_phases": run.device_phases,
        "metrics": run.metrics,
        "rollouts": run.rollouts,
        "engine": run.engine,
        "devices": run.devices,
        "windows": run.windows,
        "ledger": pd.DataFrame() if run.ledger is None else run.ledger,
        "devices_by_phase": device_estimates(run),
    }
    for name, table in tables.items():
        if table.empty:
            continue
        text = table.to_csv(index=False).encode() if form == "csv" else table.to_parquet(index=False)
        write_atomically(directory / f"{name}.{form}", text)


def write_scalars(run: Run, directory: Path) -> None:
    """metrics.jsonl by training step, devices by whole second of the run, as TensorBoard reads them."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("--format tensorboard: needs the package tensorboard; install it") from None
    if run.metrics.empty and run.devices.empty:
        raise DataError(f"{run.path}: has neither metrics nor device samples")
    if any(directory.glob("events.out.tfevents.*")):
        raise ConfigError(f"{directory}: already holds events; choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be created: {error.strerror}") from None
    zero = run.header["unix_time_s"] or 0.0
    with SummaryWriter(str(directory)) as writer:
        for row in run.metrics.to_dict("records"):
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float) and pd.notna(value):
                    writer.add_scalar(str(name), value, int(row["step"]), walltime=zero + float(row.get("time_s", 0)))
        seconds = run.devices.assign(second=run.devices.t.astype(int)).groupby(["device", "second"], sort=False)
        for (device, second), row in seconds.mean(numeric_only=True).drop(columns="t").iterrows():
            for name, value in row.dropna().items():
                writer.add_scalar(f"device/{device}/{name}", value, int(second), walltime=zero + float(second))
