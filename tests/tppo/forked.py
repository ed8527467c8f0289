"""Processes of a test, forked from a server that has imported what they need and does nothing else.

A fork of the tests' own process could inherit a lock that some thread of it holds, or a library's half-done state.
"""

import faulthandler
import multiprocessing
import os

import cloudpickle

from tppo.quiet import quieten_libraries

PRELOADED = [
    "tppo.start", "torch.distributed.checkpoint", "torch.distributed.fsdp", "transformers.models.qwen2.modeling_qwen2",
    "pytest", "pandas", "pyarrow.parquet",
]  # fmt: skip


def start(work, environment=None, crash_file=None):
    """`work()` in a process of its own, which is returned; its exit status is 0, or 1 where `work` raises.

    crash_file (Path): where the stacks of a process go that crashes; else they are in its standard error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server's environment is that of its start: since then a test may have set something.
    process = context.Process(
        target=_run, args=(cloudpickle.dumps(work), {**os.environ, **(environment or {})}, crash_file)
    )
    process.start()
    return process


def _run(code, environment, crash_file):
    os.environ |= environment
    quieten_libraries()
    if crash_file is None:
        faulthandler.enable()
        cloudpickle.loads(code)()
        return
    with crash_file.open("w") as file:
        faulthandler.enable(file)
        cloudpickle.loads(code)()
