"""`tppo calibrate`."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from profiling.reader import Run
from simulator.calibrate import calibrate


def run_calibration(paths: Sequence[Path], output: Path | None, *, as_json: bool) -> None:
    calibration = calibrate([Run(path) for path in paths])
    target = output or paths[0] / "calibration.json"
    calibration.save(target)
    if as_json:
        print(json.dumps(calibration.as_dict(), indent=1))
        return
    table = Table(title=f"{target}: fitted to {', '.join(path.name for path in paths)}", title_justify="left")
    for name, justify in (("cost", "left"), ("coefficient", "left"), ("value", "right"), ("95 % interval", "right"),
                          ("R²", "right"), ("rows", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for cost, fit in calibration.as_dict()["fits"].items():
        if fit is None:
            table.add_row(cost, "not in these runs", "", "", "", "")
            continue
        for position, (name, value) in enumerate(fit["coefficients"].items()):
            low, high = fit["interval"][name]
            quality = ["", ""] if position else [_number(fit["r2"], ".3f"), str(fit["observations"])]
            table.add_row("" if position else cost, name, f"{value:.3g}", f"{low:.3g} to {high:.3g}", *quality)
    Console().print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
