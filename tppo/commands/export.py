"""`tppo export`: a run for other programs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from profiling.attribution import device_estimates
from profiling.errors import ConfigError, DataError, InputError
from profiling.exports import chrome_trace
from profiling.reader import Run
from profiling.writer import write_atomically
from tppo.tracking.packages import check_package
from tppo.tracking.scalars import scalars_of
from tppo.tracking.to_wandb import begin_wandb, end_wandb

DEFAULTS = {
    "chrome": "trace.json",
    "csv": "export",
    "huggingface": "huggingface",
    "parquet": "export",
    "tensorboard": "tensorboard",
    "wandb": "wandb-export",
}
"""Format -> where it goes if nothing is said."""


def run_export(
    run_directory: Path, *, form: str, steps: str, output: Path | None, checkpoint: str | None = None
) -> Path:
    """Write the run in a format of DEFAULTS. Returns where. Raises ConfigError, DataError, RunError."""
    if form not in DEFAULTS:
        raise ConfigError(f"--format {form}: not one of {', '.join(DEFAULTS)}")
    if checkpoint is not None and form != "huggingface":
        raise ConfigError(f"--checkpoint {checkpoint}: belongs to --format huggingface; leave it out")
    first, last = steps_of(steps)
    target = output or Path(DEFAULTS[form])
    if form == "huggingface":
        from tppo.commands.huggingface import export_huggingface  # torch: the other formats do not wait for it

        return export_huggingface(run_directory, target, checkpoint)
    run = Run(run_directory)
    if form == "chrome":
        write_atomically(target, json.dumps(chrome_trace(run, first, last)).encode())
    elif form == "tensorboard":
        write_tensorboard(run, target)
    elif form == "wandb":
        write_wandb(run, target)
    else:
        write_tables(run, target, form)
    return target


def steps_of(text: str) -> tuple[int, int | None]:
    """`FIRST:LAST`, `FIRST:` or one step. Raises InputError."""
    found = re.fullmatch(r"(\d{1,18})(:(\d{1,18})?)?", text)
    if not found or (found[3] and int(found[3]) < int(found[1])):
        raise InputError(f"--steps {text}: write FIRST:LAST, FIRST: or one step")
    first = int(found[1])
    return first, int(found[3]) if found[3] else None if found[2] else first


def write_tables(run: Run, directory: Path, form: str) -> None:
    """Every table of the run that is not empty, and devices by phase."""
    tables = {
        "phases": run.phases,
        "device_phases": run.device_phases,
        "metrics": run.metrics,
        "rollouts": run.rollouts,
        "engine": run.engine,
        "evaluations": run.evaluations,
        "samples": run.samples,
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


def write_tensorboard(run: Run, directory: Path) -> None:
    """metrics.jsonl by training step, devices by whole second of the run."""
    check_package("tensorboard", asked_by="--format tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    _prepare(run, directory, "events.out.tfevents.*")
    zero = run.header["unix_time_s"] or 0.0
    with SummaryWriter(str(directory)) as writer:
        for _, place, t, values in scalars(run):
            for name, value in values.items():
                writer.add_scalar(name, value, place, walltime=zero + t)


def write_wandb(run: Run, directory: Path) -> None:
    """The same as an offline run of wandb, which `wandb sync` uploads. Nothing is sent."""
    check_package("wandb", asked_by="--format wandb")
    _prepare(run, directory, "wandb")
    target = begin_wandb(directory, project="tppo", name=run.name)
    target.define_metric("device/*", step_metric="second", step_sync=False)
    for axis, place, _, values in scalars(run):
        target.log({axis: place, **values})
    end_wandb(target)


def scalars(run: Run) -> Iterator[tuple[str, int, float, dict[str, float]]]:
    """(axis, place on it, seconds from the start of the run, name -> value): rows of metrics by `step`, means of the
    devices' samples by `second`."""
    for row in run.metrics.to_dict("records"):
        yield "step", int(row["step"]), float(row.get("time_s") or 0.0), scalars_of(row)
    seconds = run.devices.assign(second=run.devices.t.astype(int)).groupby(["second", "device"])
    for (second, device), row in seconds.mean(numeric_only=True).drop(columns="t").iterrows():
        values = {f"device/{device}/{name}": float(value) for name, value in row.dropna().items()}
        yield "second", int(second), float(second), values


def _prepare(run: Run, directory: Path, taken: str) -> None:
    if run.metrics.empty and run.devices.empty:
        raise DataError(f"{run.path}: has neither metrics nor device samples")
    if any(directory.glob(taken)):
        raise ConfigError(f"{directory}: already holds events; choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be created: {error.strerror}") from None
