"""What this machine reaches at best: the ceilings of a roofline, measured."""

import platform
import time
from typing import Any

import torch

MATRIX = 1024
COPY_BYTES = 256 * 2**20
REPEATS = 5


def measure_ceilings(threads: int) -> dict[str, Any]:
    """Best of REPEATS: float32 matrix product (FLOP/s) and copy (bytes read and written per second)."""
    torch.set_num_threads(threads)
    left, right = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.empty_like(source)
    torch.mm(left, right)
    target.copy_(source)
    multiply = min(_seconds(lambda: torch.mm(left, right)) for _ in range(REPEATS))
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(REPEATS))
    return {
        "name": f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}",
        "peak_flops": 2 * MATRIX**3 / multiply,
        "memory_bytes_per_s": 2 * COPY_BYTES / copy,
        "measured": True,
        "how": f"best of {REPEATS}: float32 product of {MATRIX} x {MATRIX} matrices; "
        f"copy of {COPY_BYTES // 2**20} MiB, bytes read and written",
    }


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
