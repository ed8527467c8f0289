"""Runs the tutorials: `python docs/hooks/site_tutorials.py` prints what differs, `--write` writes the outputs anew.

    ```toml title="pilot.toml"       a file of the reader's: written
    ```diff title="tppo/config.py"   a change to a file that is there: lines with -, +, or a space; @@ between places
    ```sh                            run, in a folder that has the checkout's configs/ and docs/
    ```text title="prints"           what the command before it printed; numbers within a hundredth
    ```text title="prints, here"     the same of a command that measures this machine: only its tables' columns compare

A line `*Not run by the tests: REASON*` before a block says that it is not run, to the reader too.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL
)
REASON = re.compile(r"^\*Not run by the tests: (?P<reason>.+?)\*$", re.DOTALL)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
CLOSE = 0.01
"""Relative difference of numbers that do not depend on the machine: the last printed digit may."""


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str
    reason: str
    """Why it is not run; empty: it is."""
    place: slice
    """Of its text in the page."""

    @property
    def is_output(self) -> bool:
        return self.title in ("prints", "prints, here")

    @property
    def is_file(self) -> bool:
        return "." in self.title


@dataclass(frozen=True)
class Output:
    shown: Block
    printed: str

    @property
    def agrees(self) -> bool:
        same = agree if self.shown.title == "prints" else have_the_same_columns
        return same(self.shown.text, self.printed)


def blocks(page: str) -> Iterator[Block]:
    for found in BLOCK.finditer(page):
        before = page[: found.start()].rstrip().rsplit("\n\n", 1)[-1]
        reason = REASON.match(before)
        yield Block(
            found["language"], found["title"] or "", found["text"], reason["reason"] if reason else "",
            slice(found.start("text"), found.end("text")),
        )  # fmt: skip


def run(page: str, folder: Path, code: Path = ROOT) -> list[Output]:
    """Writes and changes the page's files and runs its commands in `folder`, with the packages of the checkout `code`.
    Raises RuntimeError for a command that fails and a change that does not fit."""
    outputs, printed = [], ""
    for block in blocks(page):
        if block.is_output:
            outputs.append(Output(block, printed))
        elif block.is_file and not block.reason:
            file = folder / block.title
            file.write_text(changed(file.read_text(), block.text) if block.language == "diff" else block.text)
        elif block.language in ("sh", "python") and not block.reason:
            printed = run_block(block, folder, code)
    return outputs


def changed(text: str, diff: str) -> str:
    """The text after a change without line numbers: what stands in each of its places must be there once."""
    for place in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = place.splitlines(keepends=True)
        old = "".join(line[1:] or line for line in lines if line[0] in " -\n")
        new = "".join(line[1:] or line for line in lines if line[0] in " +\n")
        if text.count(old) != 1:
            raise RuntimeError(f"to be changed, and there {text.count(old)} times:\n{old}")
        text = text.replace(old, new)
    return text


def run_block(block: Block, folder: Path, code: Path = ROOT) -> str:
    shell = ["bash", "-e", "-o", "pipefail", "-c"]
    words = [*shell, block.text] if block.language == "sh" else [sys.executable, "-c", block.text]
    ended = subprocess.run(words, cwd=folder, env=environment(code), capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"exit code {ended.returncode}:\n{block.text}\n{ended.stdout}\n{ended.stderr}")
    return "".join(f"{line.rstrip()}\n" for line in ended.stdout.splitlines())


def environment(code: Path) -> dict[str, str]:
    """Of a reader in a terminal whose environment is active, on a checkout's code."""
    here = {"PYTHONPATH": str(code), "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    return {**os.environ, **here, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def agree(shown: str, printed: str) -> bool:
    """Whether both say the same, with the same numbers, whatever the widths of columns."""
    if skeleton(shown) != skeleton(printed):
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(math.isclose(value(a), value(b), rel_tol=CLOSE, abs_tol=1e-9) for a, b in pairs)


def skeleton(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[━─]+", "-", NUMBER.sub("#", text))).strip()


def have_the_same_columns(shown: str, printed: str) -> bool:
    return heads(shown) == heads(printed) != []


def heads(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.startswith("┃")]


def value(number: str) -> float:
    return float(number.replace(",", ""))


def prepare(folder: Path) -> None:
    """A folder in which the tutorials' relative paths work as in a checkout."""
    for name in ("configs", "docs"):
        (folder / name).symlink_to(ROOT / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the outputs anew")
    write, wrong = parser.parse_args().write, 0
    for path in PAGES:
        page = path.read_text()
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name))
            outputs = run(page, Path(name))
        stale = [output for output in outputs if not output.agrees]
        wrong += len(stale)
        for output in stale:
            print(f"{path.name}: printed now:\n{output.printed}")
        for output in reversed(stale if write else []):
            page = page[: output.shown.place.start] + output.printed + page[output.shown.place.stop :]
        path.write_text(page)
    return 1 if wrong and not write else 0


if __name__ == "__main__":
    sys.exit(main())
