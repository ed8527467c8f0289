"""How lengths of responses are distributed, those that never finished included; window and longest allowed marked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis import style
from analysis.chosen import listed, simulated_only
from analysis.gather import gather, left_out_note
from analysis.lengths import limits, responses, survival
from analysis.tables import arm_of, by_arm, provenance
from profiling.reader import Run

BINS = 32
SPAN = 9
"""Least ratio of the ends of the axis."""
POINTS = 200
"""Of an arm's curve."""
CAPTION = (
    "Top: lengths of all responses of an arm's runs, in bins of about equal width on the logarithmic axis, as "
    "shares of all responses. Lines: responses that finished; filled: those that the run left unfinished (they "
    "carry over at its end, or were dropped), at the length that they had. Bottom: share of responses longer than "
    "so many tokens, by the Kaplan-Meier estimate, which counts an unfinished response as long as it is known to go "
    "on; ticks: unfinished ones. Verticals: dashed, the window; dotted, the longest response allowed, where a "
    "response ends, finished or not; dash-dotted, where these are one."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """By arm and `part`: `finished` and `unfinished` (a row per bin from tokens to tokens_end: rows, share of the
    arm's responses), `longer` (share of responses longer than tokens), `window` and `cap`."""
    lengths = gather(runs, lambda run: responses(run).assign(arm=arm_of(run)))
    edges = _edges(lengths.tokens)
    drawn = {name for name, _ in lengths.attrs["left_out"]}
    parts = []
    for arm, members in by_arm([run for run in runs if run.name not in drawn]).items():
        own = lengths[lengths.arm == arm]
        for part, chosen in (("finished", own[own.finished]), ("unfinished", own[~own.finished])):
            counts, _ = np.histogram(chosen.tokens, edges)
            if part == "finished" or counts.any():
                parts.append(pd.DataFrame({"arm": arm, "part": part, "tokens": edges[:-1], "tokens_end": edges[1:],
                                           "rows": counts, "share": counts / len(own)}))  # fmt: skip
        curve = survival(own.tokens.to_numpy(), own.finished.to_numpy())
        if len(curve) > POINTS:  # at these places the curve itself, not a mean of it
            grid = np.unique(np.geomspace(max(curve.tokens.iloc[0], 1), curve.tokens.iloc[-1], POINTS).astype(int))
            curve = curve.iloc[np.unique(np.clip(np.searchsorted(curve.tokens, grid, "right") - 1, 0, None))]
        start = pd.DataFrame({"tokens": [edges[0]], "share": [1.0]})
        parts.append(pd.concat([start, curve]).assign(arm=arm, part="longer"))
        found = {(name, value) for run in members for name, value in limits(run).items()}
        parts += [pd.DataFrame({"arm": [arm], "part": [name], "tokens": [value]}) for name, value in sorted(found)]
    table = pd.concat(parts, ignore_index=True)
    table.attrs.update(lengths.attrs)
    return table[["arm", "part", "tokens", "tokens_end", "rows", "share"]]


def _edges(tokens: pd.Series) -> np.ndarray:
    """Of bins of whole tokens that hold every length; a response of no token counts as one of one in the lowest."""
    least, most = max(1, int(tokens.min())), int(tokens.max()) + 1
    if most < SPAN * least:
        least, most = max(1, least // 3), SPAN * least
    edges = np.unique(np.round(np.geomspace(least, most, BINS + 1)))
    edges[0] = min(edges[0], tokens.min())
    return edges


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    figure, (upper, lower) = style.subplots(2, 1, height=6.4, sharex=True)
    looks = style.arm_looks(list(dict.fromkeys(table.arm)))
    for arm, look in looks.items():
        own = table[table.arm == arm].set_index("part")
        lines = {"color": look.colour, "linestyle": look.line, "linewidth": style.line_width(1.6)}
        bins = own.loc[["finished"]]
        upper.stairs(bins.share, [*bins.tokens, bins.tokens_end.iloc[-1]], label=style.arm_name(arm), **lines)
        if "unfinished" in own.index:
            bins = own.loc[["unfinished"]]
            upper.stairs(bins.share, [*bins.tokens, bins.tokens_end.iloc[-1]], fill=True, facecolor=look.colour,
                         alpha=0.35)  # fmt: skip
        if "longer" in own.index:
            curve = own.loc[["longer"]]
            x, y = curve.tokens.to_numpy(float), curve.share.to_numpy(float)
            lower.plot(x, y, drawstyle="steps-post", gid="longer", **lines)
            if "unfinished" in own.index:
                _ticks_of_unfinished(lower, own.loc[["unfinished"]], x, y, look.colour)
    marks = _mark_limits([upper, lower], table)
    if (table.tokens > 0).any():
        style.log_scale(upper, "x")
    upper.set(ylabel="share of responses", ylim=(0, None))
    lower.set(xlabel="response length, tokens", ylabel="share longer", ylim=(0, 1.02))
    drawn = [run for run in runs if arm_of(run) in looks]
    style.title(upper, f"Distribution of response lengths ({provenance(drawn)})")
    handles, labels = upper.get_legend_handles_labels()
    if (table.part == "unfinished").any():
        handles.append(Patch(facecolor=style.GREY, alpha=0.35))
        labels.append("unfinished")
    handles += marks
    labels += [str(mark.get_label()) for mark in marks]
    style.below(figure, handles, labels, 3, " ".join([left_out_note(table), *simulated_only(drawn)]).strip())
    return figure


def _ticks_of_unfinished(axes: Axes, bins: pd.DataFrame, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    """On the curve, at the middle of each bin that holds unfinished responses."""
    bins = bins[bins.rows > 0]
    at = np.sqrt(bins.tokens.clip(lower=0.5) * bins.tokens_end).to_numpy()
    place = np.searchsorted(x, at, "right") - 1
    height = np.where(place >= 0, y[np.clip(place, 0, None)], 1.0)
    axes.plot(at, height, "|", color=colour, markersize=style.line_width(8), gid="unfinished")


def _mark_limits(panels: Sequence[Axes], table: pd.DataFrame) -> list[Line2D]:
    """Draws them, and returns what names them in the legend."""
    found = {part: sorted(set(table[table.part == part].tokens)) for part in ("window", "cap")}
    both = [tokens for tokens in found["window"] if tokens in found["cap"]]
    kinds = (
        ("window", [tokens for tokens in found["window"] if tokens not in both], (0, (4, 2))),
        ("longest allowed", [tokens for tokens in found["cap"] if tokens not in both], (0, (1, 1.5))),
        ("window = longest allowed", both, (0, (4, 1.5, 1, 1.5))),
    )
    handles = []
    for name, places, line in kinds:
        look: dict[str, Any] = {"color": style.GREY, "linewidth": style.line_width(1.0), "linestyle": line}
        for axes in panels:
            for tokens in places:
                axes.axvline(tokens, **look)
        if places:
            numbers = listed([f"{tokens:,.0f}" for tokens in places])
            handles.append(Line2D([], [], label=f"{name}: {numbers}", **look))
    return handles
