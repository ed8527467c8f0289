"""Measures a run: phases, device samples, the idle ledger. Never imports torch.

`Profiler` is imported when it is asked for: a profiled program that only marks phases stays as light as it was.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiling.phases import Profiler

__all__ = ["Profiler"]


def __getattr__(name: str) -> Any:
    if name == "Profiler":
        from profiling.phases import Profiler

        return Profiler
    raise AttributeError(f"module 'profiling' has no attribute '{name}'")
