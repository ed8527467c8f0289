"""Processes that compute, so that the server always answers: a job that takes too long, or that nobody waits for any
more, ends with its process. A spare process stands ready to take the place."""

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from profiling.errors import RunError, ToolkitError, first_line
from profiling.shell import end_with_the_parent

GRACE_S = 1.0
"""For a job that nobody waits for any more: a new process takes longer to start than most jobs to end."""
MEMORY_BYTES = 8 * 2**30
"""Of a process."""

Found = TypeVar("Found")


class Worker:
    """One process. `ready_made`: a module that it imports before the first job."""

    def __init__(self, ready_made: str) -> None:
        context = get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, ready_made), daemon=True)
        self._process.start()
        far_end.close()

    def ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Blocks. Raises what the function raises, EOFError when the process has ended."""
        self._pipe.send((function, arguments))
        worked, found = self._pipe.recv()
        if not worked:
            raise found
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, ready_made: str) -> None:
    """Answer jobs until the other end closes. Ctrl-C is for the server, which then kills this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_the_parent()
    with contextlib.suppress(ValueError, OSError):  # a lower limit stands already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    import_module(ready_made)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except ToolkitError as error:
            answer = False, error
        except MemoryError:
            answer = False, RunError(f"this takes more than {MEMORY_BYTES // 2**30} GiB of memory; ask for less")
        except Exception as error:
            first = first_line(error)
            answer = False, RunError(f"a fault of ours: {type(error).__name__}: {first}; please report it")
        pipe.send(answer)


class Workers:
    """`run` from one event loop. `limit_s`: of a job."""

    def __init__(self, ready_made: str, *, limit_s: float, count: int | None = None) -> None:
        self._ready_made, self.limit_s = ready_made, limit_s
        self.count = count or max(2, min(8, os.cpu_count() or 1))
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        self._all = [Worker(ready_made) for _ in range(self.count)]
        for worker in self._all:
            self._idle.put_nowait(worker)
        self._spare = Worker(ready_made)
        self._threads = ThreadPoolExecutor(2 * self.count)
        self._abandoned: set[asyncio.Task[Any]] = set()

    async def run(self, function: Callable[..., Found], *arguments: Any) -> Found:
        """Raises what the function raises; RunError when it takes longer than limit_s. Cancelled while it waits for a
        process, it never starts; cancelled later, it has GRACE_S to end."""
        worker = await self._idle.get()
        job = asyncio.create_task(self._on(worker, function, arguments, time.monotonic()))
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            self._abandoned.add(job)
            job.add_done_callback(self._forget)
            asyncio.get_running_loop().call_later(GRACE_S, job.cancel)
            raise

    def _forget(self, job: asyncio.Task[Any]) -> None:
        self._abandoned.discard(job)
        if not job.cancelled():
            job.exception()  # nobody asks for it any more

    async def _on(self, worker: Worker, function: Callable[..., Any], arguments: tuple[Any, ...], began: float) -> Any:
        loop = asyncio.get_running_loop()
        answer = loop.run_in_executor(self._threads, worker.ask, function, arguments)
        try:
            return await asyncio.wait_for(asyncio.shield(answer), self.limit_s)
        except (TimeoutError, asyncio.CancelledError, EOFError, OSError) as error:
            worker = self._replaced(worker)
            answer.add_done_callback(lambda done: done.exception())
            if isinstance(error, asyncio.CancelledError):
                raise
            if isinstance(error, TimeoutError):
                raise RunError(
                    f"stopped after {self.limit_s:g} s; ask for fewer options, wider windows or smaller steps, or use "
                    "tppo plan, which has no limit"
                ) from None
            raise RunError(f"a simulation's process ended after {time.monotonic() - began:.0f} s; ask again") from None
        finally:
            self._idle.put_nowait(worker)

    def _replaced(self, worker: Worker) -> Worker:
        worker.kill()
        fresh, self._spare = self._spare, Worker(self._ready_made)
        self._all[self._all.index(worker)] = fresh
        return fresh

    def close(self) -> None:
        for worker in (*self._all, self._spare):
            worker.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)
