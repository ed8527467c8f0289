"""`tppo calibrate`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from profiling.console import PlainConsole, plain_table, table_console
from profiling.errors import ConfigError
from profiling.reader import Run
from profiling.settings import to_toml
from profiling.writer import write_atomically
from simulator.calibrate import Calibration, calibrate
from simulator.hardware import load_gpu
from simulator.hardware.efficiency import load_efficiency
from simulator.logs import KINDS, calibrate_logs
from simulator.models import load_model
from simulator.transfer import transfer


@dataclass(frozen=True)
class Target:
    """Efficiency factors to write, for costs of another model or GPU."""

    file: Path
    model: str
    gpu: str
    tensor_parallel: int | None
    """None: what the run's header says; so for the next."""
    trainer_gpus: int | None
    engine: str


def run_calibration(
    sources: Sequence[str],
    output: Path | None,
    *,
    as_json: bool,
    engines: int = 1,
    rows_per_step: int | None = None,
    target: Target | None = None,
) -> None:
    """sources: run directories, or logs of one other trainer (`verl:FILE`, `trl:FILE`). Raises ConfigError."""
    kinds = {kind for source in sources if (kind := source.partition(":")[0]) in KINDS}
    if kinds and not all(source.partition(":")[0] in kinds for source in sources):
        raise ConfigError("tppo calibrate: run directories and logs of other trainers need calibrations of their own")
    if len(kinds) > 1:
        raise ConfigError("tppo calibrate: verl's and TRL's logs need calibrations of their own")
    if kinds and target is not None:
        raise ConfigError("tppo calibrate: --transfer needs a run directory; a log does not say what its engines did")
    if engines < 1 or (rows_per_step is not None and rows_per_step < 1):
        raise ConfigError(f"tppo calibrate: --engines {engines}, --rows-per-step {rows_per_step}: must be at least 1")
    if kinds:
        (kind,) = kinds
        paths = [Path(source.partition(":")[2]) for source in sources]
        calibration = calibrate_logs(kind, paths, engines=engines, rows_per_step=rows_per_step)
        written = output or Path("calibration.json")
    else:
        paths = [Path(source) for source in sources]
        calibration = calibrate([Run(path) for path in paths])
        written = output or paths[0] / "calibration.json"
    if written.is_dir() or not written.name:
        raise ConfigError(f"--output {str(written)!r}: is not a file to write")
    calibration.save(written)
    if target is not None:
        write_transfer(Run(paths[0]), calibration, target)
    if as_json:
        print(json.dumps(calibration.as_dict(), indent=1))
        return
    print_fits(written, paths, calibration)


def write_transfer(run: Run, calibration: Calibration, target: Target) -> None:
    gpu, header = load_gpu(target.gpu), run.header
    start, _ = load_efficiency(gpu.family, target.engine)
    trained_on = header["trainer_gpus"] or header["gpus"]
    found = transfer(
        run, calibration, load_model(target.model), gpu, start,
        tensor_parallel=header["gpus_per_engine"] if target.tensor_parallel is None else target.tensor_parallel,
        trainer_gpus=trained_on if target.trainer_gpus is None else target.trainer_gpus,
    )  # fmt: skip
    write_atomically(target.file, to_toml(found.efficiency.model_dump(mode="json")).encode())
    training = "" if found.training_slower is None else f", training {found.training_slower:.2f} times"
    PlainConsole(stderr=True).print(
        f"{target.file}: the run's engines took {found.rollout_slower:.2f} times the seconds of the factors for "
        f"{start.family} and {start.engine}{training}; name this file as cost.efficiency or --efficiency",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def print_fits(target: Path, paths: Sequence[Path], calibration: Calibration) -> None:
    title = f"{target}: fitted to {', '.join(path.name for path in paths)}"
    columns = ("cost", "coefficient", "value", "95 % interval", "R²", "rows")
    table = plain_table(title, *columns, left=columns[:2])
    for cost, fit in calibration.as_dict()["fits"].items():
        if fit is None:
            table.add_row(cost, "not in these runs", "", "", "", "")
            continue
        for position, (name, value) in enumerate(fit["coefficients"].items()):
            low, high = fit["interval"][name]
            quality = ["", ""] if position else [_number(fit["r2"], ".3f"), str(fit["observations"])]
            table.add_row("" if position else cost, name, f"{value:.3g}", f"{low:.3g} to {high:.3g}", *quality)
    table_console().print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
