"""`make reliability`: runs every test that provokes a fault, and writes docs/reliability.md from those that passed.

A test says what it has withstood, once it has: withstood("SIGKILL at a random moment", times=3, lost="nothing").
"""

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

OPTION = "--reliability"
SHOWN = pytest.StashKey[list[tuple[str, str, int, str]]]()
"""(fault, what is lost, times, test)"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, type=Path, metavar="FILE", help="write the table of faults, if every test passes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SHOWN] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "withstood" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.fault)


@pytest.fixture
def withstood(request: pytest.FixtureRequest) -> Callable[..., None]:
    """withstood(what, times=1, lost="nothing"): this test has provoked it so often, and nothing else was lost."""

    def shown(what: str, *, times: int = 1, lost: str = "nothing") -> None:
        request.config.stash[SHOWN].append((what, lost, times, request.node.nodeid.split("[")[0]))

    return shown


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption(OPTION)
    shown = session.config.stash[SHOWN]
    if path is None or not shown:
        return
    if exitstatus != 0:
        print(f"\n{path}: left as it is, because a test failed")
        return
    path.write_text(page(shown))
    print(f"\n{path}")


def page(shown: list[tuple[str, str, int, str]]) -> str:
    times: Counter[tuple[str, str, str]] = Counter()
    for what, lost, count, test in shown:
        times[what, lost, test] += count
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [
        "# Faults that were tried",
        "",
        f"Written by `make reliability` on {datetime.now(UTC):%Y-%m-%d}, commit {commit or 'unknown'}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}. Every line is a test that provoked the fault so "
        "often and passed. A step that is done again gives the same rows and weights, to the last bit on a CPU.",
        "",
        "| fault | times | what was lost | test |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {what} | {count} | {lost} | `{test}` |" for (what, lost, test), count in sorted(times.items())
    ]  # fmt: skip
    return "\n".join([*lines, ""])
