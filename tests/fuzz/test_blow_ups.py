"""Small files that would take the machine's memory, or hours. `make fuzz` tries all of them, and with a gigabyte."""

import pytest

from tests.fuzz.blow_ups import BLOW_UPS, apart

MEGABYTES = 24
MOST_MB, MOST_S = 600, 30.0
"""By which one may raise the peak of the process, and its time on a machine that does other things too."""
LEFT_OUT = (": one long line", ": nested")
NOT_LEFT_OUT = ("trace.jsonl: one long line", "lengths CSV: one long line", "summary.json: nested",
                "experiment TOML: nested")  # fmt: skip


@pytest.mark.slow
def test_no_file_takes_the_memory_or_the_time_of_the_machine():
    names = [name for name in BLOW_UPS if name in NOT_LEFT_OUT or not name.endswith(LEFT_OUT)]
    found = apart(MEGABYTES, names)
    assert [own["name"] for own in found] == names
    assert [own for own in found if own["mb"] > MOST_MB or own["seconds"] > MOST_S] == []
