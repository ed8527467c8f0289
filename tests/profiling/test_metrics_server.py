"""The metrics endpoint, asked through raw sockets: what a well-behaved client would never send."""

import socket
import threading
import time

import pytest

from profiling.metrics_server import MOST_CONNECTIONS, MetricsServer
from tests.waiting import until


@pytest.fixture
def make_server():
    servers = []

    def make(render=lambda: ("text/plain", b"up 1\n"), **options):
        server = MetricsServer("127.0.0.1", 0, render, **options)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def connect(server):
    return socket.create_connection(server.server_address, timeout=10)


def everything(connection):
    """What arrives until the other side closes."""
    got = b""
    try:
        while piece := connection.recv(65536):
            got += piece
    except ConnectionResetError:
        pass  # it closed with some of our bytes unread
    return got


def ask(server, request):
    with connect(server) as connection:
        connection.sendall(request)
        return everything(connection)


def status(answer):
    return int(answer.split(b" ", 2)[1])


def test_metrics_come_by_get_and_their_headers_by_head(make_server):
    server = make_server()
    head, _, body = ask(server, b"GET /metrics?name=up HTTP/1.1\r\nHost: 127.0.0.1:9\r\n\r\n").partition(b"\r\n\r\n")
    assert (status(head), body) == (200, b"up 1\n")
    assert b"Content-Length: 5" in head
    assert b"X-Content-Type-Options: nosniff" in head
    head, _, body = ask(server, b"HEAD /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").partition(b"\r\n\r\n")
    assert (status(head), body) == (200, b"")
    assert b"Content-Length: 5" in head


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(make_server, method):
    answer = ask(make_server(), f"{method} /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert status(answer) == 405
    assert b"Allow: GET, HEAD" in answer
    assert b"up 1" not in answer


@pytest.mark.parametrize(
    "path", ["/", "/metrics/", "/metrics/../metrics", "/../../etc/passwd", "http://localhost/metrics", "*"]
)
def test_there_is_one_path(make_server, path):
    answer = ask(make_server(), f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert status(answer) == 404
    assert b"only /metrics is here" in answer


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.:9464", "127.0.0.1", "[::1]:9464", "10.1.2.3:80", "gpu-7"])
def test_an_address_this_machine_and_allowed_names_may_be_asked(make_server, host):
    server = make_server(names=["gpu-7"])
    assert status(ask(server, f"GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())) == 200


@pytest.mark.parametrize(
    "headers",
    [
        "Host: rebound.example\r\n",
        "Host: localhost.rebound.example\r\n",
        "Host: 127.0.0.1.rebound.example\r\n",
        "Host: localhost:rebound.example\r\n",
        "Host: localhost@rebound.example\r\n",
        "Host: [::1\r\n",
        "Host: \r\n",
        "Host: localhost\r\nHost: rebound.example\r\n",
        "",
    ],
)
def test_a_name_that_a_page_made_to_point_here_is_refused(make_server, headers):
    answer = ask(make_server(), f"GET /metrics HTTP/1.1\r\n{headers}\r\n".encode())
    assert status(answer) == 403
    assert b"ask by address, or allow the name with --host" in answer
    assert b"up 1" not in answer


def test_a_request_that_a_page_sent_is_refused(make_server):
    answer = ask(make_server(), b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n")
    assert status(answer) == 403
    assert b"pages may not ask" in answer


@pytest.mark.parametrize(
    "request_bytes",
    [b"\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x00\xa5\x01\r\n\r\n",
     b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
     b"GET /metrics HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(200)) + b"\r\n",
     b"GET /metrics HTTP/1.1\r\nHost: " + b"a" * 70_000 + b"\r\n\r\n", b"GET /metrics\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_request_gets_no_metrics_and_the_server_goes_on(make_server, request_bytes, capfd):
    server = make_server()
    assert b"up 1" not in ask(server, request_bytes)
    assert status(ask(server, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")) == 200
    assert capfd.readouterr().err == ""


def test_a_client_that_says_nothing_and_one_that_trickles_are_cut_off(make_server):
    server = make_server(timeout_s=0.3)
    with connect(server) as silent:
        assert everything(silent) == b""
    sent = 0
    with connect(server) as trickling, pytest.raises(OSError):  # a byte every 50 ms never reaches its end
        for byte in b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200:
            trickling.sendall(bytes([byte]))
            sent += 1
            time.sleep(0.05)
    assert sent < 60  # about six; by a clock, a busy machine would count too


def test_a_client_that_does_not_listen_is_cut_off(make_server):
    asked = threading.Event()

    def render():
        asked.set()
        return "text/plain", bytes(64 * 2**20)

    server = make_server(render, timeout_s=0.3)
    with connect(server) as deaf:
        deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert asked.wait(60)
        until(lambda: server._free._value == MOST_CONNECTIONS)  # nobody is answered any more
        assert len(everything(deaf)) < 64 * 2**20


def test_one_connection_too_many_is_told_so_and_others_come_again_when_one_ends(make_server):
    server = make_server(timeout_s=60.0)
    waiting = [connect(server) for _ in range(MOST_CONNECTIONS)]
    try:
        with connect(server) as extra:
            assert status(everything(extra)) == 503
    finally:
        for connection in waiting:
            connection.close()
    request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    until(lambda: ask(server, request).startswith(b"HTTP/1.0 200"))  # a refusal may get lost on its way


def test_a_fault_of_ours_is_an_answer_and_no_traceback(make_server, capfd):
    def render():
        raise KeyError("secret")

    answer = ask(make_server(render), b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status(answer) == 500
    assert b"secret" not in answer
    assert capfd.readouterr().err == ""
