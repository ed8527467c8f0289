"""Serves /metrics to Prometheus and to nobody else: a small HTTP server for an address that a browser can reach too.

A page that a browser shows can make it ask any address of this machine, also under a name of the page's own that was
made to point here (DNS rebinding). So a request must name an address, this machine, or a name that was allowed, and
must not say that a page sent it. One path, two methods, no body is read, no file is opened; a client that is slow to
ask or to listen is cut off, and so is the one too many.
"""

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

PATH = "/metrics"
MOST_CONNECTIONS = 8
"""At once. Prometheus needs one; each is a thread."""
LAST_PORT = 2**16 - 1
TIMEOUT_S = 5.0
"""For a whole request to arrive, and again for the whole answer to be taken."""
BUSY = b"HTTP/1.0 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
OTHER_METHODS = ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


class MetricsServer(ThreadingMixIn, TCPServer):
    """Listens from the moment it is made; `serve_forever` answers. Raises OSError or OverflowError where it cannot.

    render: gives the answer's type and bytes, and is called by one request at a time. names: under which it may be
    asked besides addresses and this machine's own names.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, host: str, port: int, render: Callable[[], tuple[str, bytes]], *, names: Iterable[str] = (),
        timeout_s: float = TIMEOUT_S,
    ) -> None:  # fmt: skip
        self.render, self.timeout_s = render, timeout_s
        self.names = {name.lower().rstrip(".") for name in (*names, host, "localhost", socket.gethostname())}
        self.rendering = threading.Lock()
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if not 0 <= port <= LAST_PORT:  # getaddrinfo takes what is left after a division
            raise OverflowError(f"ports end at {LAST_PORT}")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = found[0][0], found[0][4]
        super().__init__(address, _Handler)  # type: ignore[arg-type]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        request.settimeout(0)
        with suppress(OSError):  # it has gone already
            request.send(BUSY)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; what `render` raises is answered with 500."""

    def is_asked_by_name(self, host: str) -> bool:
        """Whether the Host header is one under which this server may be asked: a name needs to be known, an address
        cannot be made to point elsewhere. The port may be another one: tunnels change it."""
        if host.startswith("["):
            name, closed, port = host[1:].partition("]")
            port = port.removeprefix(":") if closed else "none"
        else:
            name, _, port = host.partition(":")
        if not (port == "" or (port.isascii() and port.isdigit())):
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower().rstrip(".") in self.names
        return True


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    server_version = "tppo"
    sys_version = ""
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.timeout_s)

    def handle(self) -> None:
        """The socket's own limit starts anew at every byte, so a clock of its own ends a request that trickles in."""
        self._patience = threading.Timer(self.server.timeout_s, self._cut_off)
        self._patience.daemon = True
        self._patience.start()
        try:
            super().handle()
        finally:
            self._patience.cancel()

    def _cut_off(self) -> None:
        with suppress(OSError):  # it has gone already
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        self._patience.cancel()  # it has arrived; a long run takes a while to read
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self.server.is_asked_by_name(hosts[0].strip()):
            self.send_error(403, "this name is not known here: ask by address, or allow the name with --host")
        elif "Origin" in self.headers:
            self.send_error(403, "pages may not ask")
        elif self.path.partition("?")[0] != PATH:
            self.send_error(404, f"only {PATH} is here")
        else:
            self._answer()

    do_HEAD = do_GET

    def _answer(self) -> None:
        try:
            with self.server.rendering:
                kind, body = self.server.render()
        except Exception:
            self.send_error(500, "the run cannot be read")
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in (
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        super().end_headers()

    def _refuse_method(self) -> None:
        self.send_response(405)
        self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal shows the run."""


for _method in OTHER_METHODS:
    setattr(_Handler, f"do_{_method}", _Handler._refuse_method)
