"""`tppo profile --adapter NAME -- COMMAND`: adapters patch what they know as soon as the program, or any Python
process that it starts, has imported it. Nothing in the program is changed.

Python imports `sitecustomize` from PYTHONPATH when it starts: tppo/adapters/site has one, which calls `start`.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from profiling.errors import ConfigError

VARIABLE = "TPPO_ADAPTERS"
NAMES = ("verl", "openrlhf", "nvtx")
SITE = Path(__file__).with_name("site")


def environment(names: Sequence[str], base: Mapping[str, str]) -> dict[str, str]:
    """`base` with what a program needs to load these adapters. Raises ConfigError for an unknown one."""
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--adapter {name}: not one of {', '.join(NAMES)}")
    if not names:
        return dict(base)
    path = os.pathsep.join([str(SITE), *filter(None, [base.get("PYTHONPATH")])])
    return {**base, "PYTHONPATH": path, VARIABLE: ",".join(names)}


def start(names: Sequence[str]) -> None:
    sys.meta_path.insert(0, _Finder([import_module(f"tppo.adapters.{name}") for name in names]))


class _Finder(MetaPathFinder):
    """Finds nothing itself; wraps the loaders of modules that an adapter wants to see."""

    def __init__(self, adapters: Sequence[Any]) -> None:
        self._adapters = adapters
        self._looking: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        wanted = [a for a in self._adapters if any(_within(fullname, prefix) for prefix in a.MODULES)]
        if not wanted or fullname in self._looking:
            return None
        self._looking.add(fullname)
        try:
            for finder in sys.meta_path:
                if finder is self:
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                        spec.loader = _Patching(spec.loader, wanted)
                    return spec
        finally:
            self._looking.discard(fullname)
        return None


class _Patching(Loader):
    def __init__(self, inner: Any, adapters: Sequence[Any]) -> None:
        self._inner, self._adapters = inner, adapters

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        for adapter in self._adapters:
            try:
                adapter.patch(module)
            except Exception as error:  # another module of that name, or another version: the program goes on
                print(f"tppo profile: {module.__name__} is not what the adapter knows: {error}", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:  # resources, source and the like
        if name == "_inner":  # not made yet
            raise AttributeError(name)
        return getattr(self._inner, name)


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
