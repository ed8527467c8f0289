"""A figure as an SVG that stands in a page: small however many points it has, with a text that says what it shows."""

import base64
import io
import re
from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis import style

FONTS: dict = {"svg.fonttype": "path"}
"""Letters as outlines: a figure's layout was made for this font, which a reader need not have."""
MOST_POINTS = 2000
"""Of an artist's outlines, and most patches of an axes: more become pixels inside the SVG."""
MOST_PATCHES = 400
PIXELS_PER_INCH = 130
MOST_BYTES = 200_000
"""Of an SVG; a larger one becomes a picture as a whole."""


def to_svg(figure: Figure, prefix: str) -> str:
    """`<svg ...>`, or an `<image>` inside one, without title, comments and declarations. Its ids begin with `prefix`,
    so that several figures can stand in one page."""
    for axes in figure.axes:
        lines_and_clouds: list[Artist] = [*axes.lines, *axes.collections]
        crowd = len(axes.patches) > MOST_PATCHES
        for artist in [*lines_and_clouds, *(axes.patches if crowd else ())]:
            if crowd or _points(artist) > MOST_POINTS:
                artist.set_rasterized(True)
    text = _saved(figure)
    if len(text) > MOST_BYTES:
        return _picture(figure)
    return _with_ids(text[text.index("<svg") :], prefix)


def _saved(figure: Figure) -> str:
    buffer = io.StringIO()
    with rc_context(style.RC | FONTS):
        figure.savefig(buffer, format="svg", dpi=PIXELS_PER_INCH, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
    return re.sub(r"\n\s*", "\n", text)


def _picture(figure: Figure) -> str:
    buffer = io.BytesIO()
    with rc_context(style.RC):
        figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH)
    width, height = (72 * inches for inches in figure.get_size_inches())
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" style="min-width: {width:g}pt">'
        f'<image width="{width:g}" height="{height:g}" href="data:image/png;base64,{data}"/></svg>'
    )


def _points(artist: Artist) -> int:
    if isinstance(artist, Line2D):
        return int(np.shape(artist.get_xydata())[0])
    if isinstance(artist, Collection):
        outlines = sum(int(np.shape(path.vertices)[0]) for path in artist.get_paths())
        return max(outlines, int(np.shape(artist.get_offsets())[0]))
    return int(np.shape(artist.get_path().vertices)[0]) if isinstance(artist, Patch) else 0


def _with_ids(text: str, prefix: str) -> str:
    """Ids begin with `prefix`; an outline that matplotlib defines again (a letter, a marker) stands there once."""
    seen: set[str] = set()

    def first_only(found: re.Match[str]) -> str:
        again = found.group(1) in seen
        seen.add(found.group(1))
        return "" if again else found.group(0)

    text = re.sub(r'<path id="([^"]+)"[^>]*/>', first_only, text)
    text = re.sub(r"<svg [^>]*>", lambda found: _resizable(found.group(0)), text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to a group, and figures name several alike
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'((?:xlink:)?href)="#', rf'\1="#{prefix}', text)
    return re.sub(r"url\(#", f"url(#{prefix}", text)


def _resizable(tag: str) -> str:
    """As wide as there is room, and not narrower than it was drawn: its small letters are 8 pt then, 11 pixels."""
    tag = re.sub(r' height="[\d.]+pt"', "", tag)
    return re.sub(r' width="([\d.]+pt)"', r' style="min-width: \1"', tag)


def alt_text(what: str, table: pd.DataFrame, data: str) -> str:
    """What a figure shows, of which data, and its key numbers: from least to greatest by column, and the largest
    values by name where the table has a few named rows."""
    parts = [what.rstrip(".") + ".", f"Data: {data}."]
    numbers = [name for name in table.select_dtypes("number") if table[name].notna().any()]
    names = [name for name in table if name not in table.select_dtypes("number") and table[name].nunique() <= 24]
    for name in numbers[:6]:
        low, high = float(table[name].min()), float(table[name].max())
        label = str(name).replace("_", " ")
        parts.append(f"{label}: {low:.4g}." if low == high else f"{label} from {low:.4g} to {high:.4g}.")
    if numbers and 0 < len(table) <= 24 and names:
        value = "share" if "share" in numbers else numbers[-1]
        largest = table[table[value].notna()].nlargest(3, value)
        shown = [f"{_named(row, names)} {float(row[value]):.3g}" for _, row in largest.iterrows()]
        parts.append(f"Largest {str(value).replace('_', ' ')}: {'; '.join(shown)}.")
    return " ".join(parts)


def _named(row: pd.Series, names: Iterable[str]) -> str:
    return " ".join(str(row[name]) for name in names if isinstance(row[name], str) and row[name])
