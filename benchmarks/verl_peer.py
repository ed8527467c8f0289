"""Imports verl's GAE, unchanged, from a folder that holds verl alone.

Importing verl loads its packages for clusters, configuration and logging, none of which GAE calls; stand-ins take
their place in this process. verl's own modules are never replaced.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

VERSION = "0.9.1"
UNUSED_BY_GAE = ("codetiming", "dill", "omegaconf", "orjson", "ray", "tensordict")


class _AnythingMeta(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Anything(metaclass=_AnythingMeta):
    """Any class, attribute or decorator of a stand-in; a decorator gives back what it decorates."""

    def __new__(cls, *arguments: object, **_: object) -> object:
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else cls


class _StandIn(ModuleType):
    __version__ = "0.10.0"  # verl reads tensordict's; this one is in the range that it supports

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _StandIns(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in UNUSED_BY_GAE else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def verl_gae(directory: Path) -> Callable:
    """`verl.trainer.ppo.core_algos.compute_gae_advantage_return` of the verl installed in `directory`."""
    sys.path.append(str(directory))
    sys.meta_path.insert(0, _StandIns())
    try:
        verl = importlib.import_module("verl")
        core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError as error:
        raise SystemExit(
            f"--verl {directory}: {error}; fill it by `pip install --no-deps --target {directory} verl=={VERSION}`"
        ) from error
    if verl.__version__ != VERSION:
        raise SystemExit(f"--verl {directory}: holds verl {verl.__version__}; the comparison is with {VERSION}")
    return core_algos.compute_gae_advantage_return
