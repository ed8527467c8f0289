"""How every command of the toolkit ends: one line on standard error and an exit code, never a traceback unasked."""

import ctypes
import errno
import io
import os
import signal
import sys
from collections.abc import Callable

from profiling.errors import InputError, ToolkitError, first_line

INTERRUPTED = 130
_PR_SET_PDEATHSIG = 1


def end_with_the_parent() -> None:
    """SIGTERM for this process when its parent dies, however that happens (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def exit_code_of(name: str, work: Callable[[], int], *, debug: bool = False) -> int:
    """Run `work`. 0 or what it returns; 2 for bad input and 1 for a failed run, with one line that starts with
    `name`; 130 on Ctrl-C. debug: raise instead."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text, and a terminal may know little
            stream.reconfigure(errors="backslashreplace")
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
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"{name}: {str(error.filename)[:60]}...: the name is too long for a file", file=sys.stderr)
            return InputError.exit_code
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print(f"{name}: standard output: {error.strerror}", file=sys.stderr)
            return 1
        reason = first_line(error) if str(error) else ""
        hint = "; run again with --debug for the traceback" if name == "tppo" else ""
        print(f"{name}: {type(error).__name__}: {reason}{hint}", file=sys.stderr)
        return 1
