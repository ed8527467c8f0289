"""Starts the sampler beside a run and stops it."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0


class SamplerProcess:
    def __init__(self, directory: Path, *, interval_s: float, zero_s: float) -> None:
        self.directory = directory
        self._command = [
            sys.executable, "-m", "profiling.sampler",
            "--output", str(directory), "--interval", str(interval_s), "--zero", repr(zero_s),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str | None:
        """Start it and wait for its first sample. Returns a note for the trace: no GPU, or no sampler and why."""
        (self.directory / "sampler.json").unlink(missing_ok=True)
        try:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        except OSError as error:
            return f"no device samples: the sampler did not start: {error}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            report = self.report()
            if report is not None:
                return report["note"]
            if self._process.poll() is not None:
                return f"no device samples: the sampler ended with exit code {self._process.returncode}"
            time.sleep(0.01)
        return f"no device samples after {START_TIMEOUT_S:.0f} s"

    def stop(self) -> dict[str, Any] | None:
        """End it; its own account of what it did, or None when it left none."""
        if self._process is None:
            return None
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return self.report()

    def report(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.directory / "sampler.json").read_bytes())
        except (OSError, ValueError):
            return None
