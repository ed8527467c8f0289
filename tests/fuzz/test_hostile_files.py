"""Generated files, always the same ones: each is read, or refused as tests.fuzz.oracle says."""

import pytest

from tests.fuzz.reader import run_cases
from tests.fuzz.readers import FEWEST, FUZZ_CASES, READERS, TEST_CASES, cases_of

SLOW = ("tppo plan", "tppo report", "tppo plot")
"""They start processes, or draw."""


@pytest.mark.parametrize("name", [name for name in READERS if not name.startswith(SLOW)])
def test_a_hostile_file_is_read_or_refused_in_one_line(name):
    reader = READERS[name]
    ends = run_cases(reader, cases_of(reader, TEST_CASES))
    assert ends["read"] + ends["refused"] >= FEWEST, ends


def test_the_long_run_has_at_least_as_many_cases_as_it_says():
    assert sum(cases_of(reader, FUZZ_CASES) for reader in READERS.values()) >= 100_000
