"""How figures look: two styles, colours that the colour-blind tell apart, and what tells series apart in grey.

`screen` is for reading on a screen, `paper` for a column of a two-column paper. A figure asks for sizes as on a screen
and names its font sizes ("small", "x-small"); the style turns both into its own:

    with style.use("paper"):
        figure = figures.accuracy_time(runs)
"""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

RC: Any = {
    "text.parse_math": False,  # a `$` in a name begins no formula
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.titlesize": "medium",
    "figure.titleweight": "bold",
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.fontsize": "small",
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "tppo",
}
"""Of the screen style. Fonts in a PDF are embedded as TrueType, which publishers ask for."""

PAPER_RC: Any = RC | {
    "font.size": 8,
    "axes.titleweight": "normal",
    "figure.titleweight": "normal",
    "axes.linewidth": 0.6,
    "axes.labelpad": 2.0,
    "grid.linewidth": 0.4,
    "hatch.linewidth": 0.5,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "patch.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "savefig.dpi": 300,
}
SCREEN_WIDTH_IN = 7.0
"""A figure that asks for more takes both columns of a paper."""
SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
COLUMN_IN, DOUBLE_IN = 3.3, 6.9


@dataclass(frozen=True)
class Style:
    rc: Any
    column_in: float | None
    """Width of a column; None: as wide as a figure asks for."""
    double_in: float | None
    line: float
    """Factor of line widths and marker sizes that a figure gives as numbers."""
    height: float
    """Factor of heights."""
    double_height: float


STYLES = {
    "screen": Style(RC, None, None, line=1.0, height=1.0, double_height=1.0),
    "paper": Style(PAPER_RC, COLUMN_IN, DOUBLE_IN, line=0.65, height=0.62, double_height=0.8),
}
# Scoped like matplotlib's own settings, which `use` sets with it; a figure's functions would else all pass it on.
_style: ContextVar[Style] = ContextVar("style", default=STYLES["screen"])


@contextmanager
def use(name: str) -> Iterator[None]:
    """Figures made within have this style: `screen` or `paper`."""
    token = _style.set(STYLES[name])
    try:
        with rc_context(STYLES[name].rc):
            yield
    finally:
        _style.reset(token)


def settings() -> AbstractContextManager[None]:
    """matplotlib's settings of the style in use, for what is drawn outside of `use`."""
    return rc_context(_style.get().rc)


def is_paper() -> bool:
    return _style.get().column_in is not None


def line_width(screen: float) -> float:
    """Width of a line (or size of a marker) in points, from that on a screen."""
    return screen * _style.get().line


# Okabe and Ito's palette (2008).
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
GREY = "#555555"
"""Of what is no series: targets, notes."""

ARMS = {"ppo": VERMILION, "tppo": BLUE, "tppo-full": GREEN}
OTHERS = (ORANGE, PURPLE, SKY, BLACK)
LINES: tuple[Any, ...] = ("--", "-", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (9, 2)), (0, (2, 1)))
MARKERS = ("s", "o", "^", "D", "v", "P", "X")
HATCHES = ("", "..", "\\\\", "xx", "--", "++", "oo")
"""None is `//`: that always means "not measured" or "not resolved"."""
OTHER_PLACES = (1, 3, 4, 5, 6, 0, 2)
"""In LINES, MARKERS and HATCHES, of arms without a look of their own: the first of them is solid."""
ARM_NAMES = {
    "ppo": "PPO",
    "tppo": "T-PPO",
    "tppo-full": "T-PPO, window = maximum",
    "ppo-ewma": "PPO-EWMA",
    "geppo": "GePPO",
    "vapo": "VAPO",
    "dapo": "DAPO",
}

CAUSES = {
    "decode_useful": (BLUE, "decode, filled slots"),
    "decode_underfilled": (SKY, "decode, empty slots"),
    "kv_stall": ("#7fa8c9", "decode, waiting for KV blocks"),
    "decode_discarded": ("#23445e", "decode, discarded"),
    "prefill": (GREEN, "prefill"),
    "re_prefill": ("#66c2a5", "prefill of resumed rows"),
    "preempt_recompute": ("#b2e2d0", "prefill after preemption"),
    "reward": (PURPLE, "reward"),
    "logprob_forward": ("#d9a9c4", "log-prob forward"),
    "reference_forward": ("#e6c8da", "reference forward"),
    "value_forward": (YELLOW, "value forward"),
    "update_value": (ORANGE, "value update"),
    "update_policy": (VERMILION, "policy update"),
    "weight_sync": ("#8c564b", "weight sync"),
    "switch": ("#c49c94", "switch"),
    "evaluation": ("#9a9a9a", "evaluation"),
    "checkpoint": ("#6e6e6e", "checkpoint"),
    "down": (BLACK, "down"),
    "wait_tail": ("#d0d0d0", "waiting for the longest rows"),
    "wait_rollout": ("#bdbdbd", "trainer waiting for rollout"),
    "wait_train": ("#a8a8a8", "engine waiting for training"),
    "wait_other": ("#ececec", "other waiting"),
    "unresolved": ("#ffffff", "not resolved"),
}
"""Ledger cause -> colour and name."""

CAUSE_HATCHES = {
    "kv_stall": "++",
    "re_prefill": "..",
    "preempt_recompute": "..",
    "reward": "..",
    "checkpoint": "..",
    "logprob_forward": "xx",
    "reference_forward": "xx",
    "evaluation": "xx",
    "weight_sync": "xx",
    "value_forward": "\\\\",
    "update_value": "\\\\",
    "update_policy": "\\\\",
    "switch": "--",
    "wait_rollout": "--",
    "wait_train": "oo",
    "unresolved": "//",
}
"""Cause -> hatch in the paper style; none for the others. Causes with one hatch differ in lightness."""


def cause_bar(cause: str) -> dict[str, Any]:
    """How a bar of a ledger cause (or phase) looks: arguments of Axes.bar and of Patch. Hatched in the paper style."""
    colour, _ = CAUSES.get(cause, CAUSES["wait_other"])
    hatch = CAUSE_HATCHES.get(cause, "") if is_paper() or cause == "unresolved" else ""
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "#ffffff" if not hatch else GREY, "linewidth": 0.0}


@dataclass(frozen=True)
class Look:
    """What tells an arm from the others: the colour, and in grey the line, the marker or the hatch."""

    colour: str
    line: Any
    marker: str
    hatch: str


def arm_looks(arms: Sequence[str]) -> dict[str, Look]:
    """Arm -> look; hatches in the paper style only.

    PPO and T-PPO always have the same; no two of up to 28 others share both colour and line.
    """
    looks, other = {}, 0
    for arm in arms:
        if arm in ARMS:
            place, colour = list(ARMS).index(arm), ARMS[arm]
        else:
            place, colour = OTHER_PLACES[other % len(OTHER_PLACES)], OTHERS[other % len(OTHERS)]
            other += 1
        looks[arm] = Look(colour, LINES[place], MARKERS[place], HATCHES[place] if is_paper() else "")
    return looks


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    return {arm: look.colour for arm, look in arm_looks(arms).items()}


def arm_name(arm: str) -> str:
    return short(ARM_NAMES.get(arm, arm))


def short(name: str, most: int = 36) -> str:
    """A long name without its middle: its start and its end are what tells runs apart."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def subplots(
    rows: int = 1, columns: int = 1, *, width: float = SCREEN_WIDTH_IN, height: float = 4.0, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of its own (no global state) and its axes, row by row. width, height: inches on a screen; in the paper
    style a column's, or both columns' for a figure wider than SCREEN_WIDTH_IN. options: of Figure.subplots."""
    now = _style.get()
    if now.column_in is not None and now.double_in is not None:
        double = width > SCREEN_WIDTH_IN
        width = now.double_in if double else now.column_in
        height *= now.double_height if double else now.height
    with rc_context(now.rc):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def log_scale(axes: Axes, which: str) -> None:
    """Make the axis, `x` or `y`, logarithmic, with plain numbers at 1, 2 and 5, at powers of ten if they are many, or
    at all of 1 to 9 if they are few. What is not above zero is not shown."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", nonpositive="mask")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else math.inf
    axis.set_major_locator(LogLocator(subs=range(1, 10) if decades < 0.5 else (1, 2, 5) if decades < 2.5 else (1,)))
    thousands(axis)
    axis.set_minor_formatter(NullFormatter())


def thousands(axis: Axis) -> None:
    """Label 25,000 as 25k."""
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:,.10g}k" if value >= 10_000 else f"{value:,.10g}")
    )


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers only, were it one."""
    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def powers(axis: Axis, base: int = 10) -> None:
    """Label a logarithmic axis' powers, 10³, and where it has less than two of them twice and five times one, 2×10³.
    matplotlib's own labels are formulas, which RC turns off."""

    def label(value: float, _: Any) -> str:
        if value <= 0:
            return ""
        power = math.floor(math.log(value, base) + 1e-9)
        times = value / float(base) ** power
        low, high = axis.get_view_interval()
        shown = (1, 2, 5) if high < base * low else (1,)
        if not any(math.isclose(times, own, rel_tol=1e-6) for own in shown):
            return ""
        return f"{'' if math.isclose(times, 1) else f'{times:.0f}×'}{base}{str(power).translate(SUPERSCRIPTS)}"

    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_formatter(FuncFormatter(label))


def title(axes: Axes, text: str) -> None:
    """Above the axes, in as many lines as it needs."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    across = axes.get_subplotspec()
    panels = across.get_gridspec().ncols if across is not None else 1
    with settings():
        share = 0.92 if panels == 1 else 0.84 / panels  # the rest is the tick labels'
        axes.set_title(wrapped(text, figure, share, weight="axes.titleweight"), loc="left")


def heading(figure: Figure, text: str) -> None:
    """Above the whole figure, from its left edge: for several panels, or tick labels that leave the axes no width."""
    with settings():
        figure.suptitle(wrapped(text, figure, 0.97, weight="figure.titleweight"), x=0.01, ha="left")


def legend(axes: Axes, columns: int = 1, note: str = "") -> None:
    """Below the axes, where it covers nothing, in at most so many columns. note: see `below`."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    handles, labels = axes.get_legend_handles_labels()
    if len(figure.axes) == 1 or note:
        below(figure, handles, labels, columns, note)
    elif handles:
        rc = _style.get().rc
        down = ScaledTranslation(0, -3.6 * rc["font.size"] / 72, figure.dpi_scale_trans)
        fitting = _columns_that_fit(figure, labels, columns, "small")
        with rc_context(rc):
            axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=fitting,
                        bbox_transform=axes.transAxes + down)  # fmt: skip


def below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], columns: int = 3, note: str = "") -> None:
    """A legend below the whole figure, in at most so many columns, under a line or two of `note`: what was left out,
    and why. Smaller where else it would be a long single column. The figure grows by the lines that it has beyond
    three."""
    if not handles and not note:
        return
    size = "small"
    if len(handles) > 3 and _columns_that_fit(figure, labels, columns, size) == 1:
        size = "x-small"
    fitting = _columns_that_fit(figure, labels, columns, size) if handles else 1
    note = wrapped(note, figure, 0.97, "x-small")
    lines = -(-len(handles) // fitting) + (note.count("\n") + 1 if note else 0)
    if lines > 3:
        figure.set_figheight(figure.get_figheight() + (lines - 3) * 1.35 * _points(size) / 72)
    with rc_context(_style.get().rc):
        figure.legend(
            handles, labels, loc="outside lower center", ncols=fitting, fontsize=size, title=note or None,
            title_fontsize="x-small",
        )  # fmt: skip


def _points(size: str) -> float:
    return _style.get().rc["font.size"] * {"x-small": 0.694, "small": 0.833, "medium": 1.0}[size]


def _width_points(text: str, size: str, weight: str = "normal") -> float:
    """Of one line; a little more than its outlines, since letters on a screen are set to whole pixels."""
    font = FontProperties(family=_style.get().rc["font.family"], size=_points(size), weight=weight)
    return 1.04 * float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def wrapped(text: str, figure: Figure, share: float, size: str = "medium", weight: str = "") -> str:
    """In lines that fit into a share of the figure's width. weight: the setting that it has."""
    if not text:
        return ""
    letter = _width_points(text.replace("\n", " "), size, _style.get().rc.get(weight, "normal")) / len(text)
    most = max(20, int(share * figure.get_figwidth() * 72 / letter))
    return "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, most))


def _columns_that_fit(figure: Figure, labels: Sequence[str], most: int, size: str) -> int:
    """Filled one after the other, as a legend does it: each is as wide as its own longest label."""
    rc, em = _style.get().rc, _points(size)
    handle, gap = em * (rc["legend.handlelength"] + 0.8), em * rc.get("legend.columnspacing", 2.0)
    widths = np.array([_width_points(label, size) for label in labels])
    for columns in range(min(most, len(labels)), 1, -1):
        width = sum(part.max() + handle + gap for part in np.array_split(widths, columns)) - gap + em
        if width <= figure.get_figwidth() * 72:
            return columns
    return 1
