"""Links between the documentation, the README and the sources, which work on a git forge and on the site alike.

On a forge a link is a path in the repository. On the site, a link out of `docs/` goes to a page that shows the file.
"""

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
OWN_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Files above `docs/` whose sections stand on a page of the site."""
LEXERS = {".py": "python", ".toml": "toml", ".sh": "sh", ".json": "json", ".c": "c", ".jsonl": "json"}


def outside_code(text: str) -> Iterator[tuple[bool, str]]:
    """The lines of a page, each with whether it stands outside fenced blocks; the fences themselves do not."""
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if not fence:
            fence = mark[1] if mark else ""
            yield not mark, line
        else:
            yield False, line
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = ""


def rewritten(text: str, change: Callable[[re.Match[str]], str]) -> str:
    """The page with every link's target (`path`, `anchor`) replaced by what `change` says."""
    return "".join(LINK.sub(change, line) if prose else line for prose, line in outside_code(text))


def in_repository(page: str, target: str) -> str | None:
    """The path in the repository that a link on `page` (a path in the repository) means; None for one on the web."""
    if ":" in target or target.startswith("/"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def page_of(path: str) -> str:
    """Where a file of the repository stands on the site, relative to `docs/`."""
    if path in OWN_PAGES:
        return OWN_PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def is_source(path: str) -> bool:
    """Whether a link to it needs a page that shows the file."""
    return path not in OWN_PAGES and not path.startswith(("docs/", "../")) and (ROOT / path).is_file()


def sources_in(page: str, text: str) -> set[str]:
    """Paths of the files outside of `docs/` that a page links to."""
    found: set[str] = set()

    def look(link: re.Match[str]) -> str:
        path = in_repository(page, link["path"])
        if path is not None and is_source(path):
            found.add(path)
        return link[0]

    rewritten(text, look)
    return found


def for_the_site(page: str, text: str, at: str) -> str:
    """Links of `page` (a path in the repository) as the page `at` (relative to `docs/`) needs them.

    What leads nowhere stays as it is, so that the build complains about it.
    """

    def change(link: re.Match[str]) -> str:
        path = in_repository(page, link["path"])
        if path is None or path.startswith("../") or not (path.startswith("docs/") or (ROOT / path).is_file()):
            return link[0]
        return posixpath.relpath(page_of(path), posixpath.dirname(at) or ".") + (link["anchor"] or "")

    return rewritten(text, change)


def source_page(path: str) -> str:
    """A page that shows a file of the repository."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    lexer = LEXERS.get(Path(path).suffix, "text")
    search = "---\nsearch:\n  exclude: true\n---\n"
    return f"{search}\n# {path}\n\n{fence}{lexer}\n{text.rstrip()}\n{fence}\n"
