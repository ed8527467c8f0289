"""Every way in, and how many generated cases each gets: in `make test` always the same few, in `make fuzz` many."""

from tests.fuzz import checkpoint_files, commands, foreign_files, run_files, settings_files, trained_files
from tests.fuzz.reader import Reader

TEST_CASES = 2_000
"""Of all readers together, in `make test`."""
FUZZ_CASES = 100_000
"""In `make fuzz`, at least."""
FEWEST = 5
"""Of a reader."""

READERS: dict[str, Reader] = {
    reader.name: reader
    for module in (settings_files, run_files, foreign_files, checkpoint_files, commands, trained_files)
    for reader in module.READERS
}


def cases_of(reader: Reader, together: int) -> int:
    """Of `together`, rounded up, so that all of them are at least as many."""
    shares = sum(own.share for own in READERS.values())
    return max(FEWEST, -int(-together * reader.share // shares))
