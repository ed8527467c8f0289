"""Waits for what happens in other processes, for longer than a busy machine takes."""

import time

import psutil


def until(condition, otherwise, seconds=500):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def until_gone(pid):
    until(lambda: not alive(pid), f"process {pid} is still there", seconds=200)


def alive(pid):
    """A zombie has ended; whether someone collects orphans is the machine's affair."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
