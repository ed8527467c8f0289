"""What holds for every file, whatever is in it: reading returns or refuses it with one of our exceptions, in one line
that names it, in bounded time and memory; nothing is written, and nothing in it is executed."""

import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from profiling.errors import ToolkitError

DEADLINE_S = 30.0
"""Of one case, on a machine that does other things too."""
MEMORY_MB = 700
"""By which a case may raise the peak of the process."""
LONGEST_MESSAGE = 2500
CANARY = "canary"
"""A file that data asks to be written, where it is executed."""


class Refused(Exception):
    """A command ended with an exit code above 0, and its message is as it has to be."""


class Hang(BaseException):
    """No reader catches it."""


@contextmanager
def deadline(seconds: float = DEADLINE_S) -> Iterator[None]:
    def late(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def content_of(folder: Path, writes: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Path -> size and time of change, of all files in a folder, but for those that may be written."""
    found = {}
    for path in folder.rglob("*"):
        facts = path.lstat()
        if not path.is_dir() and path.name not in writes:
            found[str(path.relative_to(folder))] = (facts.st_size, facts.st_mtime_ns)
    return found


def check_message(text: str, folder: Path, names: tuple[str, ...]) -> None:
    assert len(text.splitlines()) == 1, f"not one line: {text!r}"
    assert text.isprintable(), f"could steer a terminal: {text!r}"
    assert len(text) <= LONGEST_MESSAGE, f"{len(text)} characters: {text[:200]!r}"
    assert any(name in text for name in (str(folder), *names)), f"names no file: {text!r}"


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def judge(
    read: Callable[[Path], Any],
    folder: Path,
    files: Mapping[str, bytes],
    names: tuple[str, ...] = (),
    writes: tuple[str, ...] = (),
    deadline_s: float = DEADLINE_S,
) -> str:
    """Write the files into the empty `folder` and read them. "read" or "refused"; any other end is a fault."""
    write_files(folder, files)
    before, peak = content_of(folder, writes), peak_mb()
    try:
        with deadline(deadline_s):
            read(folder)
        end = "read"
    except Refused:
        end = "refused"
    except ToolkitError as error:
        check_message(str(error), folder, names)
        end = "refused"
    assert content_of(folder, writes) == before, "reading has written"
    assert not Path(CANARY).exists(), "data was executed"
    rise = peak_mb() - peak
    assert rise < MEMORY_MB, f"{rise:.0f} MB more"
    return end
