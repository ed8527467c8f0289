"""Processes that check answers, each with a time limit: one that takes longer is killed and replaced.

They are plain subprocesses that read JSON lines: nothing of the trainer's memory, modules or main program is in them,
and when the trainer dies their input ends.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from tppo.rewards.protocol import RewardError

START_TIMEOUT_S = 120.0
"""For the imports: a second on a quiet machine, and a user's function may import much."""
STOP_TIMEOUT_S = 1.0
TRIES = 3
"""Of starting a worker, and of giving a job to one that turns out to be dead."""

Job = Mapping[str, Any]
Result = dict[str, Any]
TIMED_OUT: Result = {"timed_out": True}


class _Worker:
    def __init__(self, setup: Job) -> None:
        # Our own interpreter and module, as words; a job comes as JSON.
        self.process = subprocess.Popen(  # nosec B603
            [sys.executable, "-P", "-c", _START.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # Ctrl-C is for the trainer, which ends the step under way first
        )
        self.buffer = b""
        self.job: int | None = None
        self.deadline = 0.0
        with contextlib.suppress(BrokenPipeError):
            self.send(setup)

    @property
    def out(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def send(self, value: Job) -> None:
        assert self.process.stdin is not None
        left = memoryview(json.dumps(value).encode() + b"\n")
        while left:
            left = left[self.process.stdin.write(left) or 0 :]

    def receive(self) -> Result | None:
        """A reply, if it is complete. Raises EOFError when the process has ended."""
        some = os.read(self.out, 1 << 16)
        if not some:
            raise EOFError
        self.buffer += some
        if not self.buffer.endswith(b"\n"):
            return None
        line, self.buffer = self.buffer, b""
        return json.loads(line)

    def end(self, *, kill: bool) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if kill:
            self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


_START = "import sys; sys.path[:] = {path!r}; from tppo.rewards.worker import main; main()"


class WorkerPool:
    """setup: what workers prepare (tppo.rewards.worker), less their limits. Starts no process before `start` or `run`.
    Not for several threads at once."""

    def __init__(self, setup: Job, *, workers: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._setup = {"sys_path": [], "limit_s": timeout_s, **setup}
        self._size = workers
        self._workers: list[_Worker] = []

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def start(self) -> None:
        """Start every worker and wait until all have prepared. Raises RewardError with a worker's own reason."""
        try:
            fresh = [_Worker(self._setup) for _ in range(self._size - len(self._workers))]
            self._workers += fresh
            for worker in fresh:
                _await_ready(worker)
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """A result per job, in order: the worker's reply, or TIMED_OUT where a check took too long or ended its
        process. After an exception no worker is left; the next call starts new ones."""
        if not self._workers:
            self.start()
        results: list[Result | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        try:
            with selectors.DefaultSelector() as selector:
                for place in range(len(self._workers)):
                    self._give(place, waiting, jobs, selector)
                while selector.get_map():
                    self._collect(selector, waiting, jobs, results)
        except BaseException:
            self.close()
            raise
        return [result for result in results if result is not None]

    def _give(self, place: int, waiting: deque[int], jobs: Sequence[Job], selector: selectors.BaseSelector) -> None:
        """The next job to the worker at `place`, if there is one; a worker that has died meanwhile is replaced."""
        if not waiting:
            return
        number = waiting.popleft()
        for _ in range(TRIES):
            worker = self._workers[place]
            try:
                worker.send(jobs[number])
            except OSError:
                self._replace(place)
                continue
            worker.job, worker.deadline = number, time.monotonic() + self.timeout_s
            selector.register(worker.out, selectors.EVENT_READ, place)
            return
        raise RewardError(f"reward: {TRIES} processes that check answers ended before they had one; is memory short?")

    def _collect(
        self,
        selector: selectors.BaseSelector,
        waiting: deque[int],
        jobs: Sequence[Job],
        results: list[Result | None],
    ) -> None:
        """Wait for a reply or a deadline, note what came, and hand out further jobs."""
        places = [key.data for key in selector.get_map().values()]
        nearest = min(self._workers[place].deadline for place in places)
        ready = {key.data for key, _ in selector.select(max(0.0, nearest - time.monotonic()))}
        now = time.monotonic()  # replacing one worker takes a while, in which another may still reply in time
        for place in places:
            worker = self._workers[place]
            assert worker.job is not None
            result: Result | None = None
            if place in ready:
                try:
                    result = worker.receive()
                except EOFError:
                    result = TIMED_OUT
            if result is None and now >= worker.deadline:
                result = TIMED_OUT
            if result is None:
                continue
            selector.unregister(worker.out)
            results[worker.job], worker.job = result, None
            if result is TIMED_OUT:
                self._replace(place)
            self._give(place, waiting, jobs, selector)

    def _replace(self, place: int) -> None:
        self._workers[place].end(kill=True)
        self._workers[place] = _Worker(self._setup)
        _await_ready(self._workers[place])

    def close(self) -> None:
        """End all workers; those that work on something are killed."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.end(kill=worker.job is not None)


def _await_ready(worker: _Worker) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        selector.register(worker.out, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            try:
                reply = worker.receive()
            except EOFError:
                code = worker.process.wait()
                raise RewardError(
                    f"reward: a process that checks answers ended with exit code {code} before it was ready"
                ) from None
            if reply is not None:
                if "error" in reply:
                    raise RewardError(reply["error"])
                return
    raise RewardError(f"reward: a process that checks answers was not ready after {START_TIMEOUT_S:.0f} s")
