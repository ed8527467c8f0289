"""What README and results page say is what docs/results holds."""

import re

import pandas as pd
import pytest

from benchmarks.claims import BLOCKS, README, with_claims
from benchmarks.everything import BENCHMARKS, INDEX, TABLE
from benchmarks.pages import RESULTS, ROOT, markdown, with_block


def test_the_readme_claims_what_the_results_hold():
    text = README.read_text()
    assert with_claims(text) == text, "run `python -m benchmarks.claims`"


def test_a_number_that_changes_in_the_results_changes_in_the_readme(monkeypatch):
    import benchmarks.claims as claims

    read = claims.table

    def faster(name, file=None):
        found = read(name, file)
        return found.assign(median=9.87) if file == "speedups" else found

    monkeypatch.setattr(claims, "table", faster)
    assert "**9.87 times as fast**" in with_claims(README.read_text())


def test_the_results_page_shows_the_table_of_what_was_recorded():
    rows = pd.read_csv(TABLE, dtype=str)
    text = INDEX.read_text()
    assert with_block(text, "recorded", markdown(rows)) == text
    assert set(rows.benchmark) <= set(BENCHMARKS)


def test_every_folder_of_results_is_written_by_a_benchmark_and_linked():
    text = INDEX.read_text()
    for page in RESULTS.glob("*/README.md"):
        name = page.parent.name
        assert name in BENCHMARKS or name == "fuzz", name
        assert f"]({name}/README.md)" in text, name


def test_every_benchmark_is_a_module_that_is_there():
    for commands in BENCHMARKS.values():
        for module, *_ in commands:
            assert module == "tppo" or (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.parametrize("name", BLOCKS)
def test_a_page_without_the_place_of_a_block_is_refused(name):
    text = re.sub(f"<!-- {name}:end -->", "", README.read_text())
    with pytest.raises(LookupError, match=f"no one place <!-- {name}:begin -->"):
        with_claims(text)
