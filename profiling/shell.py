"""How every command of the toolkit ends: one line on standard error and an exit code, never a traceback unasked."""

import os
import sys
from collections.abc import Callable

from profiling.errors import ToolkitError

INTERRUPTED = 130


def exit_code_of(name: str, work: Callable[[], int], *, debug: bool = False) -> int:
    """Run `work`. 0 or what it returns; 2 for bad input and 1 for a failed run, with one line that starts with
    `name`; 130 on Ctrl-C. debug: raise instead."""
    try:
        return work()
    except ToolkitError as error:
        if debug:
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has gone
        return 0
    except Exception as error:
        if debug:
            raise
        reason = str(error).splitlines()[0] if str(error) else ""
        hint = "; run again with --debug for the traceback" if name == "tppo" else ""
        print(f"{name}: {type(error).__name__}: {reason}{hint}", file=sys.stderr)
        return 1
