"""What pages take from elsewhere instead of saying it a second time: sections of the README, lines of a result.

<!-- section README.md: Checkpoints -->            the text under that heading, without the heading
<!-- quote results/cost_model/README.md: Goal -->   the line that begins so, in quotation marks
"""

import posixpath
import re

from site_links import ROOT, for_the_site, outside_code

SECTION = re.compile(r"<!-- section (?P<file>\S+): (?P<title>.+?) -->")
QUOTE = re.compile(r"<!-- quote (?P<file>\S+): (?P<start>.+?) -->")


def section(text: str, title: str) -> str:
    """The lines under a heading, up to the next one that is not below it. Raises LookupError."""
    lines = list(outside_code(text))
    heading = re.compile(rf"#+ {re.escape(title)}\s*")
    place = next((i for i, (prose, line) in enumerate(lines) if prose and heading.fullmatch(line)), None)
    if place is None:
        raise LookupError(title)
    level = len(lines[place][1].split(" ")[0])
    taken = []
    for prose, line in lines[place + 1 :]:
        if prose and re.match(rf"#{{1,{level}}} ", line):
            break
        taken.append(line)
    return "".join(taken).strip()


def expanded(page: str, text: str) -> str:
    """The page (its path in the repository) with what it takes from elsewhere, links and all. Raises LookupError
    naming page, file and what is not there."""

    def insert_section(found: re.Match[str]) -> str:
        file = found["file"]
        try:
            taken = section((ROOT / file).read_text(), found["title"])
        except LookupError:
            raise LookupError(f"{page}: {file} has no section '{found['title']}'; name one that it has") from None
        return for_the_site(file, taken, at=page.removeprefix("docs/"))

    def insert_line(found: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page), found["file"]))
        for prose, line in outside_code((ROOT / file).read_text()):
            if prose and line.startswith(found["start"]):
                return f"“{for_the_site(file, line.strip(), at=page.removeprefix('docs/'))}”"
        raise LookupError(f"{page}: no line of {file} begins with '{found['start']}'; quote one that is there")

    return QUOTE.sub(insert_line, SECTION.sub(insert_section, text))
