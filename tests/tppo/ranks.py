"""Several ranks for a test, as torchrun would start them."""

import functools
import socket
import threading
import time

from tests.tppo import forked


def on_ranks(world, work):
    """`work(rank)` in a process each. Fails where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        forked.start(
            functools.partial(work, rank),
            {
                "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "RANK": str(rank), "LOCAL_RANK": str(rank),
            },
        )
        for rank in range(world)
    ]  # fmt: skip
    for rank in ranks:
        rank.join()
    codes = [rank.exitcode for rank in ranks]
    assert codes == [0] * world, codes


def when(path, act):
    """In a thread, as soon as `path` is there."""

    def watch():
        while not path.exists():
            time.sleep(0.01)
        act()

    threading.Thread(target=watch, daemon=True).start()
