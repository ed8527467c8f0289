"""CONTRIBUTING.md, followed to the letter: each of its ways to add something, in a copy of this checkout."""

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "hooks"))

import site_shared  # noqa: E402
import site_tutorials  # noqa: E402

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
HOW_TOS = re.findall(r"^## (How to add .+)$", PAGE, re.MULTILINE)
NEEDED = ("tppo", "simulator", "profiling", "analysis", "tests", "benchmarks", "configs", "pyproject.toml")
A_PAGE = 150
"""Lines, code included."""


@pytest.fixture
def checkout(tmp_path):
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "baseline"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("title", HOW_TOS)
def test_what_a_page_says_can_be_done_and_its_tests_pass(title, checkout):
    site_tutorials.run(site_shared.section(PAGE, title), checkout, code=checkout)


def test_there_is_a_page_for_each_thing_that_is_added_most_and_none_is_long():
    assert [title.rsplit(" ", 1)[1] for title in HOW_TOS] == ["algorithm", "schedule", "figure", "GPU"]
    assert all(len(site_shared.section(PAGE, title).splitlines()) <= A_PAGE for title in HOW_TOS)


def test_a_change_is_made_where_its_lines_stand_once():
    text = "a\nb\nc\nb\n"
    assert site_tutorials.changed(text, " a\n-b\n+x\n@@\n c\n+y\n") == "a\nx\nc\ny\nb\n"
    with pytest.raises(RuntimeError, match="there 2 times:\nb"):
        site_tutorials.changed(text, "-b\n+x\n")
    with pytest.raises(RuntimeError, match="there 0 times"):
        site_tutorials.changed(text, " b\n-a\n")


def test_every_step_of_the_trace_rule_is_there():
    rule = PAGE[PAGE.index("## The trace rule") :]
    files = re.findall(r"(?:tppo|simulator|tests)/[\w/]+\.py", rule[: rule.index("A field without")])
    assert len(files) == 6
    text = "".join((ROOT / file).read_text() for file in files)
    for name in (
        "window:",
        "def plan_step",
        "mask: Bool",
        "training/truncated_share",
        "def test_truncated_runs_carried",
    ):
        assert name in text
