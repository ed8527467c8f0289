"""The results page: a card for every folder of docs/results, from what is there."""

import re
from pathlib import Path

from site_links import ROOT

RESULTS = ROOT / "docs" / "results"


def folders() -> list[Path]:
    return sorted(path.parent for path in RESULTS.glob("*/README.md"))


def titles() -> dict[str, str]:
    """Folder -> the heading of its page."""
    return {folder.name: heading(folder / "README.md") for folder in folders()}


def heading(page: Path) -> str:
    found = re.search(r"^# (.+)$", page.read_text(), re.MULTILINE)
    if found is None:
        raise LookupError(f"{page.relative_to(ROOT)}: has no heading; begin it with '# Title'")
    return found[1]


def cards() -> str:
    """A grid: title, how it was made, and the page's first picture."""
    lines = ['<div class="grid cards" markdown>', ""]
    for name, title in titles().items():
        text = (RESULTS / name / "README.md").read_text()
        picture = re.search(r"!\[(?P<alt>[^]]*)\]\((?P<path>[^)]+)\)", text)
        command = re.search(r"Written by (`[^`]+`)", text)
        lines += [f"-   **[{title}]({name}/README.md)**", ""]
        if picture:
            lines += [f"    ![{picture['alt']}]({name}/{picture['path']}){{ loading=lazy }}", ""]
        if command:
            lines += [f"    {command[1]}", ""]
    return "\n".join([*lines, "</div>", ""])


def with_cards(index: str) -> str:
    """docs/results/README.md, its table of folders below the cards."""
    top, gap, rest = index.partition("\n\n")
    return f"{top}{gap}{cards()}\n{rest}"
