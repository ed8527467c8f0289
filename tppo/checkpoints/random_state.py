"""The random state of everything that draws without being given a generator."""

import random
from typing import Any

import numpy as np
import torch


def global_random_state() -> dict[str, Any]:
    """Of Python's `random`, numpy, torch on the CPU and on every GPU. Tensors, numbers and tuples only, so that it is
    read back without executing anything."""
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002
    key, position = numpy["state"]["key"], numpy["state"]["pos"]
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(key.astype(np.int64)), position, numpy["has_gauss"], numpy["gauss"]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def check_random_state(state: dict[str, Any]) -> None:
    """Raises what setting it would, and leaves everything as it was."""
    before = global_random_state()
    try:
        set_global_random_state(state)
    finally:
        set_global_random_state(before)


def set_global_random_state(state: dict[str, Any]) -> None:
    """GPUs beyond those of the saving machine keep what they have."""
    random.setstate(state["python"])
    key, *rest = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for device, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(own, device)
