"""Runs and their synchronous twins: the same settings in everything but the schedule.

A run's settings are its config.toml, flat ("cluster.engines"). Left out of the comparison: where it was written, and
what belongs to the schedule. What the speed-up is drawn against (window, GPUs, tail weight) is read from the run too.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from profiling.reader import Run
from profiling.settings import flattened

NOT_SETTINGS = ("output", "workload.steps", "train.steps", "train.stop_at_accuracy")
"""Rates are per step and response, whatever their number."""
OF_THE_SCHEDULE = (
    "schedule.", "algorithm.", "rollout.window", "rollout.schedule", "rollout.oversample_factor",
    "rollout.max_staleness",
)  # fmt: skip
"""Prefixes: of a simulated run the section, of a measured one the recipe and the rollout's fields."""
SEEDS = ("workload.seed", "train.seed", "data.seed")
FIELDS_OF = {
    "window": (),
    "gpus": ("cluster.engines", "cluster.trainer_gpus", "ray.engines"),
    "sigma": ("workload.response_tokens.sigma", "data.sigma"),
}
"""What a speed-up is drawn against -> the settings that it stands for."""


def flat_settings(run: Run) -> dict[str, Any]:
    """Every setting by its dotted name; lists as text."""
    own = flattened(run.config)
    return {name: str(value) if isinstance(value, list) else value for name, value in own.items()}


def schedule_kind(run: Run) -> str | None:
    return (run.header["schedule"] or {}).get("kind")


def settings_but_schedule(run: Run) -> dict[str, Any]:
    own = flat_settings(run).items()
    return {name: value for name, value in own if name not in NOT_SETTINGS and not name.startswith(OF_THE_SCHEDULE)}


def twin_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """The synchronous run with the same settings, seed included; None for one that is synchronous itself."""
    if schedule_kind(run) == "synchronous":
        return None
    wanted = settings_but_schedule(run)
    return next(
        (
            other for other in runs
            if schedule_kind(other) == "synchronous" and other.simulated == run.simulated
            and settings_but_schedule(other) == wanted
        ),
        None,
    )  # fmt: skip


def speedups(runs: Sequence[Run]) -> pd.DataFrame:
    """Of every run that has a twin: run, twin, simulated, schedule, window, gpus, sigma (null where it has none),
    setting (everything else but seeds), per_response and per_step: seconds of the twin / seconds of the run."""
    rows = []
    for run in runs:
        twin = twin_of(run, runs)
        if twin is None or not run.summary or not twin.summary:
            continue
        settings = settings_but_schedule(run)
        varied = {name for names in FIELDS_OF.values() for name in names} | set(SEEDS)
        rows.append(
            {
                "run": run.name,
                "twin": twin.name,
                "simulated": run.simulated,
                "schedule": schedule_kind(run),
                "window": (run.header["schedule"] or {}).get("window"),
                "gpus": run.header["gpus"],
                "sigma": next((settings[name] for name in FIELDS_OF["sigma"] if name in settings), None),
                "setting": ", ".join(f"{k} = {v}" for k, v in sorted(settings.items()) if k not in varied),
                "per_response": _ratio(twin, run, "seconds_per_finished_row"),
                "per_step": _ratio(twin, run, "seconds_per_step"),
            }
        )
    columns = ["run", "twin", "simulated", "schedule", *FIELDS_OF, "setting", "per_response", "per_step"]
    table = pd.DataFrame(rows, columns=columns)
    numbers = ["window", "gpus", "sigma", "per_response", "per_step"]
    return table.astype(dict.fromkeys(numbers, float))


def _ratio(twin: Run, run: Run, rate: str) -> float | None:
    before, after = (found.summary.get(rate) if found.summary else None for found in (twin, run))
    return before / after if before and after else None
