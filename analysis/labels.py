"""Names beside points, where they cover neither a point nor a line nor another name."""

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

PLACES = (
    (1, 1, "left", "bottom"), (1, -1, "left", "top"), (-1, 1, "right", "bottom"), (-1, -1, "right", "top"),
    (0, 1.6, "center", "bottom"), (0, -1.6, "center", "top"),
    (1, 3.5, "left", "bottom"), (1, -3.5, "left", "top"), (-1, 3.5, "right", "bottom"), (-1, -3.5, "right", "top"),
)  # fmt: skip
"""Right above a point, right below, left above, left below, above, below, and farther, until one of them is free."""
STEP_PIXELS = 3


Point = tuple[float, float]


def name_points(
    axes: Axes, named: Sequence[tuple[str, Sequence[Point]]], points: Sequence[Point] = (), *, away: float = 5
) -> None:
    """Write each text beside the point that it names, or where it has several the first with room.

    points: markers to stay clear of, besides the lines of the axes; away: points from a marker's middle to its edge.
    To be called last: it lays the figure out to see where things are.
    """
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    reach = away * 0.8 * figure.dpi / 72
    taken = [_around(place, reach) for place in axes.transData.transform(np.array(points, float).reshape(-1, 2))]
    taken += [_around(place, 1.0) for line in axes.lines for place in _along(line)]
    for text, places in named:
        found: list[tuple[float, Annotation]] = []
        for (x, y), (right, up, horizontally, vertically) in product(places, PLACES):
            own = axes.annotate(
                text, (x, y), xytext=(away * right, away * up * 0.7), textcoords="offset points", fontsize="x-small",
                ha=horizontally, va=vertically, zorder=6,
            )  # fmt: skip
            own.set_in_layout(False)
            box = own.get_window_extent()
            found.append((sum(_shared(box, other) for other in taken) + 2 * _outside(box, inside), own))
            if found[-1][0] == 0:
                break
        best = min(found, key=lambda pair: pair[0])[1]
        for _, own in found:
            if own is not best:
                own.remove()
        taken.append(best.get_window_extent())


def _around(place: np.ndarray, reach: float) -> Bbox:
    return Bbox.from_extents(place[0] - reach, place[1] - reach, place[0] + reach, place[1] + reach)


def _along(line: Line2D) -> np.ndarray:
    """Places on a line, at most STEP_PIXELS apart: (places, 2)."""
    corners = line.get_transform().transform(line.get_xydata())
    corners = corners[np.isfinite(corners).all(axis=1)]
    parts = [corners[:1]]
    for start, end in pairwise(corners):
        share = np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / STEP_PIXELS))[1:, None]
        parts.append(start + share * (end - start))
    return np.concatenate(parts)


def _shared(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else common.width * common.height


def _outside(box: Bbox, limits: Bbox) -> float:
    return box.width * box.height - _shared(box, limits)
