"""Which packages trackers need, and what they may not touch. All of them are optional."""

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from random import SystemRandom

from profiling.errors import ConfigError

EXTRAS = ("tensorboard", "wandb", "mlflow")
"""Names of the packages, and of the extras of this one that install them."""


def check_package(name: str, *, asked_by: str) -> None:
    """Raises ConfigError, one line with the remedy, when a package of EXTRAS is not installed. Imports nothing."""
    if find_spec(name) is None:
        raise ConfigError(f"{asked_by}: needs the package {name}; pip install 'tppo[{name}]', or leave it out")


def keep_random_state(*modules: str) -> None:
    """Have these modules, where they exist, draw from the system's randomness. They draw ids, or pauses before another
    attempt, from Python's global random state, and that is the training's: rewards may draw from it, and a run that
    goes on must draw the same again, whenever a tracker's thread has drawn."""
    for name in modules:
        with suppress(ModuleNotFoundError):
            vars(import_module(name))["random"] = SystemRandom()
