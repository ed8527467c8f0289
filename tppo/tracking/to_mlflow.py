"""An MLflow run, in the run directory or on a tracking server. Needs no more than mlflow-skinny."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from profiling.settings import flattened
from tppo.tracking.identity import remember, remembered
from tppo.tracking.packages import keep_random_state
from tppo.tracking.protocol import About

EXPERIMENT = "tppo"
PARAMETER_CHARACTERS = 500
"""Longest value of a parameter that servers take."""
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}

ENVIRONMENT = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder, without it MLflow 3 asks for a database
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a dead server is noticed within a minute, not after many
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Set where the user has not; read by MLflow when it is used."""
DRAWS = (
    "mlflow.utils.name_utils", "mlflow.utils.request_utils", "mlflow.utils.rest_utils", "urllib3.util.retry",
)  # fmt: skip
"""Modules that draw random numbers: for one id of an experiment in ten, and pauses before another attempt."""


class MlflowSink:
    def __init__(self, about: About) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        keep_random_state(*DRAWS)
        self._client = MlflowClient(tracking_uri=about.settings.mlflow_uri or str(about.path / "mlflow"))
        known = remembered(about.path, "mlflow")
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self._run = known
            return
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        place = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
        self._run = self._client.create_run(place, run_name=about.name).info.run_id
        remember(about.path, "mlflow", self._run)
        for name, value in flattened(about.config).items():
            self._client.log_param(self._run, metric_name(name), str(value)[:PARAMETER_CHARACTERS])

    def metrics(self, step: int, unix_s: float, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        batch = [Metric(metric_name(name), value, int(1000 * unix_s), step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=batch)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._client.log_dict(self._run, {"samples": [dict(row) for row in rows]}, f"samples/step-{step:06d}.json")

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run, STATUS[status])


def metric_name(name: str) -> str:
    """What MLflow does not take in a name becomes an underscore: val/pass@4 is val/pass_4."""
    return re.sub(r"[^\w\-. :/]", "_", name)
