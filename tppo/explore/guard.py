"""Whom the server answers: this page in this user's browser, nobody else.

Another page that is open in the same browser may send requests here, and may even give its own name our address (DNS
rebinding). So every request has to come to a host that is us, and a request for data or work from us; a page elsewhere
may only link to ours. Beyond this machine a token has to be shown once; a cookie keeps it.
"""

import secrets
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """In front of the application. token: None on loopback, where the name of the host is checked instead."""

    def __init__(self, app: ASGIApp, port: int, token: str | None) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in LOOPBACK} | (set(LOOPBACK) if port == 80 else set())
        self._token = token
        self._cookie = f"tppo_explore_{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request = Request(scope)
        go_on = self._refused(request) or self._with_cookie(request) or self._app
        await go_on(scope, receive, send_with_headers)

    def _refused(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._token is None and host not in self._hosts:
            return _no(421, f"host {host[:80]!r}: this page is at {' or '.join(sorted(self._hosts))} only")
        if origin is not None and origin != f"http://{host}":
            return _no(403, f"origin {origin[:80]!r}: only the page itself may ask")
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and request.url.path != "/":
            return _no(403, "another page asks: only this page itself may")
        if self._token is not None and not self._shown(request):
            return _no(401, "a token is missing or wrong; open the address that tppo explore has printed")
        return None

    def _shown(self, request: Request) -> bool:
        assert self._token is not None
        in_address = request.query_params.get("token", "") if request.url.path == "/" else ""
        return any(secrets.compare_digest(own.encode(), self._token.encode())
                   for own in (request.cookies.get(self._cookie, ""), in_address))  # fmt: skip

    def _with_cookie(self, request: Request) -> Response | None:
        """Away from an address with the token in it: a link that is shared must not hold it."""
        if self._token is None or request.url.path != "/" or "token" not in request.query_params:
            return None
        rest = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
        answer = RedirectResponse(f"/?{urlencode(rest)}" if rest else "/", 303)
        answer.set_cookie(self._cookie, self._token, httponly=True, samesite="lax")
        return answer


def _no(status: int, message: str) -> Response:
    return JSONResponse({"faults": [{"field": None, "message": message}]}, status)
