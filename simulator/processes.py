"""Simulations side by side, each in a process of its own."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

Asked = TypeVar("Asked")
Found = TypeVar("Found")


def in_processes(
    work: Callable[[Asked], Found], waiting: Mapping[str, Asked], jobs: int | None
) -> Iterator[tuple[str, Callable[[], Found]]]:
    """(key, get) of every task, as it ends; get() gives what `work` gave of it, or raises what it raised. jobs:
    processes at once; None: the machine's cores. A single one is this process itself. What has not begun is dropped
    when the caller stops."""
    workers = min(jobs or os.cpu_count() or 1, len(waiting))
    if workers <= 1:
        for key, asked in waiting.items():
            yield key, partial(work, asked)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, asked): key for key, asked in waiting.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
