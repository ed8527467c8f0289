"""Several ranks for a test, as torchrun would start them."""

import functools
import signal
import threading
import time
from contextlib import contextmanager

import torch.distributed as dist

from tests.tppo import forked

CRASHES = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)


class RankCrashed(AssertionError):
    """A rank was ended by the machine, which no Python code asks for. Tests begin anew once where that happens
    (conftest.py): a thread of torch 2.13's own for gloo has crashed once where it allocates memory; what comes every
    time fails all the same."""


@contextmanager
def meeting(world):
    """The environment of each of so many ranks. Where they meet is this process's, as it is torchrun's: a port that is
    only looked for here could be another process's before the first rank has it."""
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    yield [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def on_ranks(world, work):
    """`work(rank)` in a process each. Fails where one of them fails; raises RankCrashed where one crashes."""
    with meeting(world) as environments:
        ranks = [forked.start(functools.partial(work, rank), own) for rank, own in enumerate(environments)]
        for rank in ranks:
            rank.join()
    codes = [rank.exitcode for rank in ranks]
    if set(codes) & set(CRASHES):
        raise RankCrashed(codes)
    assert codes == [0] * world, codes


def when(path, act):
    """In a thread, as soon as `path` is there."""

    def watch():
        while not path.exists():
            time.sleep(0.01)
        act()

    threading.Thread(target=watch, daemon=True).start()
