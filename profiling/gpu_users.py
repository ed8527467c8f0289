"""Which of the sampled GPUs a profiled program is on: energy of one that it leaves alone is not its own."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from profiling.files import read_json
from profiling.hosts import DEVICE
from profiling.markers import VARIABLE

LOOK_EVERY_S = 2.0
"""The sampler names the processes that it sees every five seconds; they are looked up while they live."""
CUDA_VARIABLE = "CUDA_VISIBLE_DEVICES"


class GpuUsers:
    """Looks up the processes on the sampled GPUs, from a thread, while it is entered. is_ours: whether a process is
    the program's."""

    def __init__(self, directory: Path, is_ours: Callable[[psutil.Process], bool]) -> None:
        self._path = directory / "sampler.json"
        self._is_ours = is_ours
        self._known: dict[int, bool] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="GPU users", daemon=True)

    def __enter__(self) -> "GpuUsers":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            for seen in self._report()[1].values():
                self._look_up({process["pid"] for process in seen})

    def _look_up(self, pids: set[int]) -> None:
        for pid in pids - set(self._known):
            with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
                self._known[pid] = self._is_ours(psutil.Process(pid))

    def note(self) -> str | None:
        """Where the program was seen on some of the sampled GPUs, but never on others."""
        devices, processes = self._report()
        gpu_of = {device["uuid"]: device["part_of"] or device["uuid"] for device in devices}  # of a MIG instance: its
        used = {
            gpu_of.get(device)
            for device, seen in processes.items()
            if any(self._known.get(process["pid"]) for process in seen)
        }
        unused = sorted(set(gpu_of.values()) - used - {DEVICE})
        if not used or not unused:
            return None
        return (
            f"no process of the program was seen on {', '.join(unused)}; energy, and GPU-seconds, are of all sampled "
            f"GPUs: set {CUDA_VARIABLE} to those that it uses"
        )

    def _report(self) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
        """Devices, and the processes that were seen on each; nothing where no sampler has reported."""
        try:
            report = read_json(self._path)
            return report["devices"], report["processes"]
        except (OSError, ValueError):
            return [], {}


def marked_for(directory: Path) -> Callable[[psutil.Process], bool]:
    """Whether a process comes from the command that is profiled into the directory: children inherit the variable,
    also those that outlive their parents."""
    return lambda process: process.environ().get(VARIABLE) == str(directory.resolve())


def of_tree(root: psutil.Process) -> Callable[[psutil.Process], bool]:
    return lambda process: process == root or root in process.parents()


@contextlib.contextmanager
def seeing_what(process: psutil.Process) -> Iterator[None]:
    """Meanwhile our own environment, which the sampler inherits, shows the GPUs that the process was started with.
    Where that cannot be read, nothing changes."""
    before = dict(os.environ)
    with contextlib.suppress(psutil.Error, OSError):
        theirs = process.environ().get(CUDA_VARIABLE)
        os.environ.pop(CUDA_VARIABLE, None)
        if theirs is not None:
            os.environ[CUDA_VARIABLE] = theirs
    try:
        yield
    finally:
        os.environ.pop(CUDA_VARIABLE, None)
        if CUDA_VARIABLE in before:
            os.environ[CUDA_VARIABLE] = before[CUDA_VARIABLE]
