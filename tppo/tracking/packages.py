"""Which packages trackers need. All of them are optional."""

from importlib.util import find_spec

from profiling.errors import ConfigError

EXTRAS = ("tensorboard", "wandb", "mlflow")
"""Names of the packages, and of the extras of this one that install them."""


def check_package(name: str, *, asked_by: str) -> None:
    """Raises ConfigError, one line with the remedy, when a package of EXTRAS is not installed. Imports nothing."""
    if find_spec(name) is None:
        raise ConfigError(f"{asked_by}: needs the package {name}; pip install 'tppo[{name}]', or leave it out")
