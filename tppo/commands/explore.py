"""`tppo explore`."""

import ipaddress
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from pathlib import Path
from types import FrameType
from typing import NoReturn

from profiling.errors import ConfigError

TERMINATED = 143


def run_explore(*, port: int, bind: str, open_browser: bool) -> None:
    """Serve the page until Ctrl-C. Raises ConfigError where the address cannot be had or the extra is missing."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that simulate: there is one for each core
    try:
        import uvicorn

        from tppo.explore.server import make_app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise ConfigError(f'tppo explore: {error.name} is not installed; pip install "tppo[explore]"') from None
    listener = listen(bind, port)
    shown, own_port = listener.getsockname()[:2]
    token = None if is_loopback(shown) else secrets.token_urlsafe(24)
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{own_port}/{f'?token={token}' if token else ''}"
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    with tempfile.TemporaryDirectory(prefix="tppo-explore-", ignore_cleanup_errors=True) as folder:
        app = make_app(Path(folder), port=own_port, token=token)
        config = uvicorn.Config(
            app, log_level="critical", timeout_graceful_shutdown=1, server_header=False, ws="none", proxy_headers=False
        )
        if token:
            print(f"tppo explore: --bind {bind}: everyone on this network who has the address below can use this "
                  "page; without --bind only this machine can", file=sys.stderr)  # fmt: skip
        print(f"{address}\nCtrl-C ends it.", flush=True)
        if open_browser:
            threading.Timer(0.5, webbrowser.open, (address,)).start()
        uvicorn.Server(config).run(sockets=[listener])


def listen(bind: str, port: int) -> socket.socket:
    """A socket at the address; port 0: a free one. Raises ConfigError."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: is not between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"--bind {bind!r}: is no address of this machine; leave it out, or give one") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"--port {port}: cannot listen on {bind}: {reason}; choose another, or 0 for a free one"
        ) from None
    return listener


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends as Ctrl-C does, with what is temporary removed."""
    raise SystemExit(TERMINATED)
