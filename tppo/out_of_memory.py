"""Memory that runs out in a step's training: one line that says what to lower. (The kernel's own way is SIGKILL.)"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from profiling.errors import RunError, first_line
from tppo.config import RunConfig

ON_A_CPU = "can't allocate memory"
"""Torch's allocator there raises a plain RuntimeError."""


@contextmanager
def saying_what_to_lower(config: RunConfig, step: int) -> Iterator[None]:
    """Turn what torch or Python raise without memory into a RunError. The step may have moved the weights in part, so
    nothing is saved. What engines raise is an EngineError before it comes here."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and ON_A_CPU not in str(error):
            raise
        reason = first_line(error).split("] ")[-1]
        instead = "" if config.model.activation_checkpointing else ", or set model.activation_checkpointing = true"
        raise RunError(
            f"step {step}: out of memory ({reason or type(error).__name__}); lower train.micro_batch_tokens = "
            f"{config.train.micro_batch_tokens}{instead}; nothing was saved after the last checkpoint: go on from it "
            f"with --resume {config.output}"
        ) from error
