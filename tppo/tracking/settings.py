"""The `[logging]` section of a training run."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from profiling.settings import Settings


class LoggingConfig(Settings):
    tensorboard: bool = False
    """Also write TensorBoard events, to tensorboard/ in the run directory. metrics.jsonl is written always."""
    wandb: bool = False
    """Also write a wandb run, to wandb/ in the run directory."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """offline: `wandb sync` sends it when you ask for it. online: it is sent as it grows; needs an API key that is
    there already."""
    wandb_project: str = "tppo"
    """Project of the wandb run."""
    mlflow: bool = False
    """Also write an MLflow run."""
    mlflow_uri: str = ""
    """Tracking server or folder of MLflow; left out: mlflow/ in the run directory."""
    samples_every: NonNegativeInt = 10
    """Steps between tables of sample generations (samples/ in the run directory); 0: none."""
    samples: PositiveInt = 8
    """Responses in such a table."""
