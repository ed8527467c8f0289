"""Joins a Ray cluster, or starts one on this machine, and leaves it as it was."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from profiling.errors import ConfigError, first_line

LOCAL, AUTO = "local", "auto"
CONNECT_TIMEOUT_S = 10
LAUNCHED_ON = "TPPO_RANK_OF_CLUSTER"
"""In a rank's environment: address of the cluster that it was started on (launch.py), which is the one it joins."""


@contextmanager
def joined_cluster(address: str) -> Iterator[Any]:
    """Ray's module, connected. address: local (a cluster of this machine alone, ended afterwards), auto (the one that
    runs here), HOST:PORT or ray://HOST:PORT. A connection that this process has already is used and left open. Raises
    ConfigError where Ray is not installed or nobody answers."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get(LAUNCHED_ON, address)
    host, colon, port = address.removeprefix("ray://").partition(":")
    try:
        if colon:  # Ray itself tries for two minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        options = {"include_dashboard": False} if address == LOCAL else {}
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # RuntimeError, ConnectionError, ValueError and more, by the version
        reason = first_line(error)
        if reason.startswith("Failed to connect"):  # something listens there: Ray does not tell the two apart
            reason += " (not Ray, or it asks for a token: set RAY_AUTH_MODE=token)"
        raise ConfigError(
            f'--ray {address}: no Ray cluster answers there: {reason}; write "local" for one on this machine'
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray: Ray is not installed; install the extra `ray`, or leave --ray out") from None
    return ray
