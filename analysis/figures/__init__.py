"""One figure a file. `NAME(runs)` returns a matplotlib Figure; `FIGURES["NAME"].data(runs)` what it draws."""

from collections.abc import Callable, Sequence
from types import ModuleType

from matplotlib.figure import Figure

from analysis import style
from analysis.figures import (
    _accuracy_steps,
    _accuracy_time,
    _accuracy_tokens,
    _batch_occupancy,
    _cost_time,
    _energy,
    _engine_timeline,
    _idle_ledger,
    _idle_ledger_steps,
    _length_distribution,
    _predicted_measured,
    _response_length,
    _roofline,
    _speedup,
    _staleness,
)
from profiling.reader import Run

FIGURES: dict[str, ModuleType] = {
    "accuracy_time": _accuracy_time,
    "accuracy_steps": _accuracy_steps,
    "accuracy_tokens": _accuracy_tokens,
    "response_length": _response_length,
    "length_distribution": _length_distribution,
    "staleness": _staleness,
    "engine_timeline": _engine_timeline,
    "batch_occupancy": _batch_occupancy,
    "idle_ledger": _idle_ledger,
    "idle_ledger_steps": _idle_ledger_steps,
    "energy": _energy,
    "roofline": _roofline,
    "speedup": _speedup,
    "cost_time": _cost_time,
    "predicted_measured": _predicted_measured,
}
"""Name -> module with data(runs), draw(table, runs) and CAPTION."""


def first_line(name: str) -> str:
    """What a figure shows, in a line."""
    return (FIGURES[name].__doc__ or "").strip().splitlines()[0]


def _figure(module: ModuleType) -> Callable[[Sequence[Run]], Figure]:
    def draw(runs: Sequence[Run]) -> Figure:
        table = module.data(runs)
        with style.settings():
            return module.draw(table, runs)

    draw.__doc__ = module.__doc__
    return draw


accuracy_time = _figure(_accuracy_time)
accuracy_steps = _figure(_accuracy_steps)
accuracy_tokens = _figure(_accuracy_tokens)
response_length = _figure(_response_length)
length_distribution = _figure(_length_distribution)
staleness = _figure(_staleness)
engine_timeline = _figure(_engine_timeline)
batch_occupancy = _figure(_batch_occupancy)
idle_ledger = _figure(_idle_ledger)
idle_ledger_steps = _figure(_idle_ledger_steps)
energy = _figure(_energy)
roofline = _figure(_roofline)
speedup = _figure(_speedup)
cost_time = _figure(_cost_time)
predicted_measured = _figure(_predicted_measured)
