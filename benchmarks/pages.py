"""What every page of docs/results is written with."""

import subprocess
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"


def markdown(frame: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    for row in frame.itertuples(index=False):
        lines.append("| " + " | ".join(_cell(str(c), v) for c, v in zip(frame.columns, row, strict=True)) + " |")
    return "\n".join(lines)


def _cell(column: str, value: object) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:+.1%}" if "error" in column else f"{value:.4g}"
    return str(value)


def commit() -> str:
    """Of this checkout; `-dirty` where something in it is not committed."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def with_block(text: str, name: str, block: str) -> str:
    """A page with what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` replaced. Raises LookupError where
    it has no such place, or two."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise LookupError(f"no one place {begin} ... {end} in the page")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
