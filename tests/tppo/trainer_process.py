"""A trainer in a process that a test watches and harms from outside."""

import contextlib
import signal
import time
from dataclasses import dataclass, field

import psutil

from tests.tppo import forked
from tests.tppo.killing import train_seeded


@dataclass
class TrainerProcess:
    """A trainer in a process of its own, and what was seen of it from outside."""

    config: object
    resume: bool = False
    memory: list[tuple[int, int]] = field(default_factory=list)
    """(steps done, resident bytes)"""

    def start(self):
        def work():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            outcome = train_seeded(self.config, resume=self.resume)
            raise SystemExit(0 if outcome.signal is None else 128 + outcome.signal)

        self.process = forked.start(work)
        self.pid = self.process.pid
        return self

    def status(self):
        """Exit status, or None while it runs."""
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    def run_until(self, steps):
        """True when so many steps are done, False when it has ended before."""
        while (done := steps_of(self.config)) < steps:
            if self.status() is not None:
                return False
            with contextlib.suppress(psutil.Error):  # it has just ended
                self.memory.append((done, resident_and_mapped(self.pid)[0]))
            time.sleep(0.05)
        return True

    def child_named(self, module):
        found = [own for own in psutil.Process(self.pid).children() if module in " ".join(own.cmdline())]
        return found[0] if found else None


def steps_of(config):
    path = config.output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def resident_and_mapped(pid):
    """Bytes in memory, and of address space."""
    memory = psutil.Process(pid).memory_info()
    return memory.rss, memory.vms
