"""Starts the sampler beside a run, starts it again when it dies or hangs, and stops it."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiling.errors import ToolkitError
from profiling.hosts import device_of_host, folder_of_host

START_TIMEOUT_S = STOP_TIMEOUT_S = 30.0
"""For half a second of work, on a busy machine; a sampler that is killed loses up to a minute's samples."""
HANGS_AFTER_S = 20.0
"""Without a word from the sampler, which reports every five seconds: a driver call that never returns."""
WATCH_EVERY_S = 1.0
BACK_OFF_S = (1.0, 5.0, 25.0, 120.0)
"""Between restarts; after the last of them there is none."""
FORGIVEN_AFTER_S = 3600.0
"""Without a fault, restarts are counted anew."""


class SamplerProcess:
    """directory: of the run. host: this host's name where it is not the run's first (profiling.hosts). note: told of
    what happens, for the trace."""

    def __init__(
        self,
        directory: Path,
        *,
        interval_s: float,
        zero_s: float,
        links: bool = False,
        host: str | None = None,
        note: Callable[[str], None] = lambda text: None,
        hangs_after_s: float = HANGS_AFTER_S,
        back_off_s: tuple[float, ...] = BACK_OFF_S,
        forgiven_after_s: float = FORGIVEN_AFTER_S,
    ) -> None:
        self.directory = directory if host is None else folder_of_host(directory, host)
        self.restarts = 0
        self._command = [
            sys.executable, "-P", "-m", "profiling.sampler",  # -P: not the modules of the current directory
            "--output", str(self.directory), "--interval", str(interval_s), "--zero", repr(zero_s),
            *(["--links"] if links else []), *([] if host is None else ["--host", device_of_host(host)]),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._note = note
        self._hangs_after_s, self._back_off_s, self._forgiven_after_s = hangs_after_s, back_off_s, forgiven_after_s
        self._earlier: list[dict[str, Any]] = []
        """Reports of samplers that died."""
        self._last_report = 0, time.monotonic()
        """Time stamp of the newest report, and when it was first seen."""
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self) -> str | None:
        """Start it and wait for its first sample. Returns a note for the trace: no GPU, or no sampler and why."""
        note = self._launch()
        if self._process is not None:
            self._watcher = threading.Thread(target=self._watch, name="sampler watcher", daemon=True)
            self._watcher.start()
        return note

    def _launch(self) -> str | None:
        self._last_report = 0, time.monotonic()
        try:
            (self.directory / "sampler.json").unlink(missing_ok=True)
            # Our own interpreter and module, as words.
            self._process = subprocess.Popen(  # nosec B603
                self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
        except OSError as error:
            return f"no device samples: the sampler did not start: {error}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and not self._stop.is_set():
            report = self._report()
            if report is not None:
                return report["note"]
            if self._process.poll() is not None:
                return f"no device samples: the sampler ended with exit code {self._process.returncode}"
            time.sleep(0.01)
        return f"no device samples after {START_TIMEOUT_S:.0f} s"

    def _watch(self) -> None:
        """Replace the sampler until the run ends. Linux tells it that its parent died when the thread that started it
        does: this thread stays until it has ended."""
        try:
            self._replace()
        finally:
            self._end()

    def _replace(self) -> None:
        """A sampler that died or does not report any more, later every time."""
        faults, launched_s = 0, time.monotonic()
        while not self._stop.wait(min(WATCH_EVERY_S, self._hangs_after_s / 4)):
            fault = self._fault()
            if fault is None:
                continue
            self._kill()
            if (report := self._report()) is not None:
                self._earlier.append(report)
                (self.directory / "sampler.json").unlink(missing_ok=True)
            if time.monotonic() - launched_s >= self._forgiven_after_s:
                faults = 0
            if faults == len(self._back_off_s):
                self._say(f"the sampler {fault} again; no more device samples")
                return
            wait_s = self._back_off_s[faults]
            faults += 1
            self.restarts += 1
            self._say(f"the sampler {fault}; it is started again in {wait_s:g} s")
            if self._stop.wait(wait_s):
                return
            if (note := self._launch()) is not None:
                self._say(note)
            launched_s = time.monotonic()

    def _say(self, text: str) -> None:
        with contextlib.suppress(ToolkitError):  # a full disk: the run itself will say so
            self._note(text)

    def _fault(self) -> str | None:
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            return f"ended with exit code {code}"
        try:
            written = (self.directory / "sampler.json").stat().st_mtime_ns
        except OSError:
            written = 0  # it has not reported yet
        if written != self._last_report[0]:  # by our own clock: the host's may be set meanwhile
            self._last_report = written, time.monotonic()
        silent_s = time.monotonic() - self._last_report[1]
        return f"hung for {silent_s:.0f} s" if silent_s > self._hangs_after_s else None

    def _kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # inside a driver call, a kill may wait for its end
            self._process.wait(STOP_TIMEOUT_S)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _end(self) -> None:
        """Tell it to write what it has and end; kill it when it does not."""
        assert self._process is not None
        assert self._process.stdin is not None
        if not self._process.stdin.closed:  # else it was killed
            with contextlib.suppress(OSError):  # it has died
                self._process.stdin.write(b"stop")
                self._process.stdin.flush()
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def stop(self) -> dict[str, Any] | None:
        """End it; its own account of what it did, or None when it left none. With restarts, what all of them did."""
        if self._process is None:
            return None
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join(START_TIMEOUT_S + STOP_TIMEOUT_S)
        self._end()
        reports = [own for own in (*self._earlier, self._report()) if own is not None]
        if not reports or not self.restarts:
            return reports[-1] if reports else None
        names = ("ticks", "missed_ticks", "cpu_seconds", "start_cpu_seconds")
        sums: dict[str, Any] = {name: sum(own[name] for own in reports) for name in names}
        sums["devices"] = list({device["uuid"]: device for own in reports for device in own["devices"]}.values())
        first = min((own["first_sample_s"] for own in reports if own["first_sample_s"] is not None), default=None)
        return {**reports[-1], **sums, "first_sample_s": first, "restarts": self.restarts}

    def _report(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.directory / "sampler.json").read_bytes())
        except (OSError, ValueError):
            return None
