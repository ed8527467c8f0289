"""Under which id a tracker knows the run: a resumed run goes on under the same one."""

import json
import secrets
from pathlib import Path

from profiling.writer import write_atomically


def remembered(run: Path, tracker: str) -> str | None:
    """The id of an earlier part of the run; None where there was none, or its file is damaged."""
    try:
        found = json.loads(_file(run, tracker).read_bytes())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def remember(run: Path, tracker: str, own: str) -> None:
    write_atomically(_file(run, tracker), json.dumps({"id": own}).encode())


def new_id() -> str:
    """From the system's randomness: no random state of the training is touched."""
    return secrets.token_hex(4)


def _file(run: Path, tracker: str) -> Path:
    return run / "tracking" / f"{tracker}.json"
