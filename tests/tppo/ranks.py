"""Several ranks for a test, as torchrun would start them.

They are forked from a server that has imported what they need and does nothing else: a fork of the tests' own process
could inherit a lock that some thread of it holds.
"""

import multiprocessing
import os
import socket
import threading
import time

import cloudpickle

PRELOADED = ["tppo.start", "torch.distributed.checkpoint", "torch.distributed.fsdp", "pytest", "pandas"]


def on_ranks(world, work):
    """`work(rank)` in a process each. Fails where one of them fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = cloudpickle.dumps(work)
    asked = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **asked}  # the server's is that of its start: since then Ray may have set a token's
    ranks = [context.Process(target=run_rank, args=(rank, environment, code)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    codes = [rank.exitcode for rank in ranks]
    assert codes == [0] * world, codes


def run_rank(rank, environment, code):
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    cloudpickle.loads(code)(rank)


def when(path, act):
    """In a thread, as soon as `path` is there."""

    def watch():
        while not path.exists():
            time.sleep(0.01)
        act()

    threading.Thread(target=watch, daemon=True).start()
