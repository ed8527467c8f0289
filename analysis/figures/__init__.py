"""One figure a file. `NAME(runs)` returns a matplotlib Figure; `NAME.data(runs)` the table that it draws."""

from collections.abc import Callable, Sequence
from types import ModuleType

from matplotlib.figure import Figure

from analysis.figures import (
    _accuracy_time,
    _idle_ledger,
    _predicted_measured,
    _response_length,
    _roofline,
    _step_timeline,
)
from profiling.reader import Run

FIGURES: dict[str, ModuleType] = {
    "accuracy_time": _accuracy_time,
    "response_length": _response_length,
    "step_timeline": _step_timeline,
    "idle_ledger": _idle_ledger,
    "roofline": _roofline,
    "predicted_measured": _predicted_measured,
}
"""Name -> module with data(runs), draw(table, runs) and CAPTION."""


def _figure(module: ModuleType) -> Callable[[Sequence[Run]], Figure]:
    def draw(runs: Sequence[Run]) -> Figure:
        return module.draw(module.data(runs), runs)

    draw.__doc__ = module.__doc__
    return draw


accuracy_time = _figure(_accuracy_time)
response_length = _figure(_response_length)
step_timeline = _figure(_step_timeline)
idle_ledger = _figure(_idle_ledger)
roofline = _figure(_roofline)
predicted_measured = _figure(_predicted_measured)
