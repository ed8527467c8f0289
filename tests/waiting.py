"""Waits for what happens in other processes or threads, for longer than a busy machine takes: how long it takes is not
what these tests are about."""

import time

import psutil


def until(condition, otherwise="what is waited for never came", seconds=500):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def until_gone(pid):
    until(lambda: not alive(pid), f"process {pid} is still there", seconds=200)


def alive(pid):
    """A zombie has ended; whether someone collects orphans is the machine's affair."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
