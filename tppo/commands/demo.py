"""`tppo demo`: train PPO and T-PPO on this machine, calibrate on the one, predict the other, report."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from analysis.report import write_report
from analysis.tables import comparison_tables, score_table, speed_table
from profiling.console import PlainConsole, plain_table, table_console
from profiling.errors import ConfigError, DataError
from profiling.reader import Run
from profiling.settings import parse_toml, to_toml, with_overrides
from profiling.writer import write_atomically
from simulator.calibrate import calibrate
from tppo.checkpoints.store import checkpoints_of
from tppo.commands.predict import predict_all
from tppo.commands.report import advice_of
from tppo.config import RunConfig
from tppo.hardware import measure_ceilings
from tppo.quiet import quieten_libraries
from tppo.regimes import ARMS, Regime, load_regime
from tppo.start import train
from tppo.warmstart import warm_start


def run_demo(output: Path, *, regime: str, seeds: Sequence[int], arms: Sequence[str] = ARMS) -> list[Run]:
    """The whole loop. Runs that are finished are kept, so a second call is quick and an interrupted one goes on.

    Returns the runs, arm by arm. Everything it wrote, report.html first, lies under `output`. Raises ConfigError.
    """
    quieten_libraries()
    console = table_console()
    settings = load_regime(regime)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be created: {error.strerror}; choose another --output") from None
    if not (output / "hardware.json").exists():
        ceilings = measure_ceilings(settings.train.threads)
        write_atomically(output / "hardware.json", (json.dumps(ceilings, indent=1) + "\n").encode())
    model = warm_model(settings, output)
    runs: dict[str, list[Run]] = {arm: [] for arm in arms}
    for place, seed in enumerate(seeds):
        turn = place % len(arms)
        for arm in (*arms[turn:], *arms[:turn]):  # interleaved and rotated: the machine drifts
            runs[arm].append(train_config(settings.run_config(arm, seed, model, output / f"{arm}-s{seed}")))
    predictions = predict_each_from_the_other(runs, output, settings.target_accuracy)
    everything = [run for arm in arms for run in runs[arm]]
    report = write_report(
        everything,
        output / "report.html",
        predictions=output / "predictions.csv",
        advice=advice_of(everything),
    )
    print_frame(console, "Speed, medians over seeds", speed_table(everything))
    print_frame(console, f"Time to {settings.target_accuracy:.0%}", score_table(everything, settings.target_accuracy))
    for (source, arm), table in comparison_tables(predictions).items():
        print_frame(console, f"Predicted against measured: {arm}, from {source} alone, medians", table)
    console.print(f"Report: {report}")
    return everything


def warm_model(settings: Regime, output: Path) -> Path:
    """The regime's starting point, trained now or found in `output`."""
    console = PlainConsole()
    console.print("Warm start: supervised training on a careless pupil's solutions (cached)")
    return warm_start(
        settings.warm_start, settings.data, settings.task(settings.data.seed), output,
        lambda step, loss: console.print(f"  step {step} of {settings.warm_start.steps}, loss {loss:.3f}", end="\r"),
    )  # fmt: skip


def train_config(config: RunConfig) -> Run:
    """The finished run of a configuration: found, resumed or trained."""
    assert config.output is not None
    directory = config.output
    if directory.exists():
        check_it_is_that_run(directory, config)
        if (directory / "summary.json").exists() and (Run(directory).trailer or {}).get("status") == "finished":
            return Run(directory)
    resumable = bool(checkpoints_of(directory))
    if directory.exists() and not resumable:
        shutil.rmtree(directory)  # this very run, killed before its first checkpoint
    outcome = train(config, resume=resumable)
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    return Run(directory)


def check_it_is_that_run(directory: Path, config: RunConfig) -> None:
    """Raises ConfigError when `directory` holds anything but a run with these settings (train.steps may differ)."""

    def settings(values: dict[str, Any]) -> dict[str, Any]:
        name = Path(values["model"]["path"]).name  # as seen from wherever the command was started
        return with_overrides(values, {"output": None, "train.steps": None, "model.path": name})

    wanted = to_toml(config.model_dump(mode="json"))
    if not (directory / "trace.jsonl").exists() or not (directory / "config.toml").exists():
        raise ConfigError(f"{directory}: exists and is not a run; choose another --output, or move it away")
    try:
        same = settings(Run(directory).config) == settings(parse_toml(wanted))
    except (DataError, TypeError, KeyError):  # not even of the right form
        same = False
    if not same:
        raise ConfigError(f"{directory}: holds a run with other settings; choose another --output, or move it away")


def predict_each_from_the_other(runs: dict[str, list[Run]], output: Path, target_accuracy: float) -> pd.DataFrame:
    """Calibrate on the PPO runs alone and predict both T-PPO arms, which it has not seen; and the other way."""
    rows = []
    for source, targets in (("ppo", ("tppo", "tppo-full")), ("tppo", ("ppo",))):
        calibration = calibrate(runs[source])
        calibration.save(output / f"calibration-{source}.json")
        for target in (name for name in targets if name in runs):
            rows += predict_all(
                runs[target], runs[source], calibration,
                name=source, directory=output, target_accuracy=target_accuracy,
            )  # fmt: skip
    frame = pd.DataFrame(rows)
    write_atomically(output / "predictions.csv", frame.to_csv(index=False).encode())
    return frame


def print_frame(console: Console, title: str, frame: pd.DataFrame) -> None:
    text = [str(column) for column in frame if not pd.api.types.is_numeric_dtype(frame[column])]
    table = plain_table(title, *map(str, frame.columns), left=text)
    for row in frame.itertuples(index=False):
        cells = zip(frame.columns, row, strict=True)
        table.add_row(
            *("-" if pd.isna(v) else number(str(c), v) if isinstance(v, float) else str(v) for c, v in cells)
        )
    console.print(table)


def number(column: str, value: float) -> str:
    return f"{value:+.1%}" if "error" in column else f"{value:.4g}"
