"""Phases around another trainer's methods: `with_phases(PPOTrainer, {"ppo_train": "update_policy"}, steps)`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from profiling.markers import phase


class Steps:
    """Counts the steps of a trainer that does not tell them: one begins with each call of a method named `first`."""

    def __init__(self, first: str) -> None:
        self.first = first
        self.now = 0

    def of(self, method: str) -> int:
        self.now += method == self.first
        return self.now


def with_phases(owner: Any, phases: Mapping[str, str], steps: Steps) -> int:
    """Replace methods of a class, or of one object, by ones that also mark phases. Those that it lacks are left out.
    Returns how many were replaced; twice on the same owner does nothing."""
    found = 0
    for method, name in phases.items():
        original = getattr(owner, method, None)
        if callable(original) and not hasattr(original, "_tppo"):
            setattr(owner, method, _marked(original, method, name, steps))
            found += 1
    return found


def _marked(original: Callable[..., Any], method: str, name: str, steps: Steps) -> Callable[..., Any]:
    @functools.wraps(original)
    def marked(*positional: Any, **named: Any) -> Any:
        with phase(name, steps.of(method)):
            return original(*positional, **named)

    marked._tppo = True  # type: ignore[attr-defined]
    return marked
