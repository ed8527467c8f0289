"""Measures a run: phases, device samples, the idle ledger. Never imports torch."""

from profiling.phases import Profiler

__all__ = ["Profiler"]
