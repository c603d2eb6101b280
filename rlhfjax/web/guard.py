"""Checks that every request passes before an application sees it.

A server on 127.0.0.1 is reached by every web page that is open in the same browser: by a form that
is sent to it, or by a name that is made to point to it. So a request's Host must be a name of this
machine, and a request that a browser sends for a page must come from a page of this server.
"""

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhfjax.web.access import LOOPBACK, is_loopback
from rlhfjax.web.replies import error

MIB = 2**20
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self';"
    " frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def guarded(
    app: ASGIApp,
    *,
    host: str,
    token: str = "",
    most_bytes: int = MIB,
    open_paths: Collection[str] = (),
) -> ASGIApp:
    """Returns the application behind all checks of this file.

    Args:
      host: the address that the server is bound to.
      token: what a client sends as `Authorization: Bearer TOKEN`; "" asks for none.
      most_bytes: of a request's body.
      open_paths: paths that need no token, such as the page that asks for it.
    """
    app = BodyLimit(app, most_bytes)
    if token:
        app = Token(app, token, open_paths)
    app = Origin(app)
    if is_loopback(host):
        app = Host(app)
    return WithHeaders(app)


class BodyLimit:
    """Refuses a body that is too long with 413, also where its length is not announced."""

    def __init__(self, app: ASGIApp, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or int(announced) > self._most:
            return await self._refusal()(scope, receive, send)
        messages, size = [], 0
        while True:  # the whole body first: an application never sees half of one
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._most:
                return await self._refusal()(scope, receive, send)
            if not message.get("more_body", False):
                break

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, again, send)

    def _refusal(self):
        return error(413, f"the request is larger than {self._most} bytes")


class Token:
    """Answers 401 to a request without the token."""

    def __init__(self, app: ASGIApp, token: str, open_paths: Collection[str]):
        self._app, self._open = app, frozenset(open_paths)
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                headers = {"WWW-Authenticate": "Bearer"}
                message = "expected the header Authorization: Bearer TOKEN"
                reply = error(401, message, code="invalid_api_key", headers=headers)
                return await reply(scope, receive, send)
        await self._app(scope, receive, send)


class Origin:
    """Refuses requests that a browser sends for a page of another server."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin, host = headers.get("origin"), headers.get("host", "")
            if origin is not None and origin.partition("://")[2] != host:
                reply = error(403, "requests from pages of other servers are refused")
                return await reply(scope, receive, send)
        await self._app(scope, receive, send)


class Host:
    """Refuses requests to a name that is none of this machine's."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = name_of(Headers(scope=scope).get("host", ""))
            if host not in LOOPBACK and not is_loopback(host):
                reply = error(403, f"expected a Host of {', '.join(LOOPBACK)}")
                return await reply(scope, receive, send)
        await self._app(scope, receive, send)


def name_of(host: str) -> str:
    """Returns the name in a Host header, without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


class WithHeaders:
    """Adds SECURITY_HEADERS to every reply."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with)
