"""Predicts a measured run from other runs, and sets the prediction beside the measurement.

Two kinds, never mixed. A forecast uses costs and lengths of the calibration runs only. A replay takes the target's
own lengths and tests the cost model alone. Both take the number of steps as given.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from analysis.tables import DECODE, PREFILL, WAITING, seconds_by_cause, steps_to_score, time_to_score
from profiling.reader import Run
from simulator import load_experiment, simulate
from simulator.calibrate import Calibration

Kind = Literal["forecast", "replay"]

UNITS = {
    "training_seconds": "s",
    "rollout_seconds": "s",
    "decode_seconds": "s",
    "prefill_seconds": "s",
    "seconds_per_step": "s",
    "seconds_per_finished_row": "s",
    "seconds_per_trained_token": "s",
    "waiting_or_unfilled_share": "1",
    "seconds_to_target": "s, given the measured steps",
}


def quantities(summary: dict[str, Any], ledger: pd.DataFrame) -> dict[str, float]:
    """The compared quantities of steps 1 and later, evaluation and checkpoints left out, measured or simulated."""
    seconds = seconds_by_cause(ledger)

    def total(causes: Sequence[str]) -> float:
        return float(sum(seconds.get(cause, 0.0) for cause in causes))

    training = float(seconds.sum())
    return {
        "training_seconds": training,
        "rollout_seconds": summary["rollout_seconds"],
        "decode_seconds": total(DECODE),
        "prefill_seconds": total(PREFILL),
        "seconds_per_step": summary["seconds_per_step"],
        "seconds_per_finished_row": summary["seconds_per_finished_row"],
        "seconds_per_trained_token": summary["seconds_per_trained_token"],
        "waiting_or_unfilled_share": total(WAITING) / training,
    }


def experiment_for(target: Run, lengths_of: Run, calibration_file: Path) -> dict[str, Any]:
    """The simulated twin of `target`: its schedule, rows and steps, with the lengths of `lengths_of`."""
    assert target.summary is not None
    config = target.config
    rows = config["rollout"]["prompts_per_step"] * config["rollout"]["samples_per_prompt"]
    schedule = dict(target.header["schedule"])
    if schedule["kind"] == "truncated":
        schedule["trailing_tokens"] = config["algorithm"]["trailing_tokens"]
    return {
        "workload": {
            "steps": target.summary["steps"],
            "prompts_per_step": config["rollout"]["prompts_per_step"],
            "samples_per_prompt": config["rollout"]["samples_per_prompt"],
            "max_response_tokens": config["rollout"]["max_response_tokens"],
            "response_tokens": {"kind": "run", "path": str(lengths_of.path.resolve())},
        },
        "schedule": schedule,
        "cluster": {
            "engines": 1,
            "gpus_per_engine": 1,
            "max_rows_per_engine": config["rollout"].get("max_rows_per_engine", rows),
            "trainer": "colocated",
        },
        "cost": {"kind": "calibrated", "file": str(calibration_file.resolve())},
    }


def predict(
    target: Run,
    *,
    lengths_of: Run,
    calibration_file: Path,
    calibrated_on: str,
    kind: Kind,
    drift_corrected: bool,
    target_accuracy: float,
) -> list[dict[str, Any]]:
    """One row per quantity: predicted, measured and the relative error (predicted - measured) / measured."""
    assert target.summary is not None
    assert target.ledger is not None
    result = simulate(load_experiment(experiment_for(target, lengths_of, calibration_file)))
    predicted = quantities(result.summary(), result.ledger)
    measured = quantities(target.summary, target.ledger)
    steps = steps_to_score(target, target_accuracy)
    seconds = time_to_score(target, target_accuracy)
    if steps is not None and seconds is not None:
        predicted["seconds_to_target"] = steps * predicted["training_seconds"] / target.summary["steps"]
        measured["seconds_to_target"] = seconds - (target.summary["pretrain_seconds"] or 0.0)
    return [
        {
            "target": target.name,
            "calibrated_on": calibrated_on,
            "kind": kind,
            "drift_corrected": drift_corrected,
            "quantity": name,
            "unit": UNITS[name],
            "predicted": predicted[name],
            "measured": measured[name],
            "error": (predicted[name] - measured[name]) / measured[name] if measured[name] else None,
        }
        for name in predicted
        if predicted[name] is not None and measured[name] is not None
    ]


def predict_all(
    targets: Sequence[Run], calibration_runs: Sequence[Run], calibration: Calibration, *,
    name: str, directory: Path, target_accuracy: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Forecast and replay of every target, with and without the drift probe's correction.

    A forecast takes the lengths of the calibration run with the target's place in the list: the same seed.
    """
    rows = []
    for place, target in enumerate(targets):
        for corrected in (False, True):
            factor = drift_factor(target, calibration) if corrected else 1.0
            if factor is None:
                continue
            kind_file = directory / f"calibration-{name}{f'-as-{target.name}' if corrected else ''}.json"
            calibration.scaled(factor).save(kind_file)
            sources: list[tuple[Kind, Run]] = [("forecast", calibration_runs[place]), ("replay", target)]
            for kind, lengths_of in sources:
                rows += predict(
                    target, lengths_of=lengths_of, calibration_file=kind_file, calibrated_on=name,
                    kind=kind, drift_corrected=corrected, target_accuracy=target_accuracy,
                )  # fmt: skip
    return rows


def drift_factor(target: Run, calibration: Calibration) -> float | None:
    """How much slower the machine was during `target` than during calibration, by the probe's medians."""
    if calibration.probe_seconds is None or target.probes.empty:
        return None
    return float(target.probes.seconds.median()) / calibration.probe_seconds
