"""Replies: errors in OpenAI's form, and pages that are files of the package."""

import functools
import importlib.resources
import mimetypes
from typing import Any

from starlette.responses import JSONResponse, Response

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Returns an error object of OpenAI's API.

    Args:
      status: of HTTP, 400 to 599.
      message: one line for people.
      code: a word for programs, such as "context_length_exceeded".
      param: the field of the request that is wrong.
    """
    about: dict[str, Any] = {"message": message, "type": kind(status)}
    return JSONResponse(
        {"error": about | {"param": param, "code": code}}, status, headers
    )


def kind(status: int) -> str:
    """Returns OpenAI's `type` of an error with a status of HTTP."""
    default = "invalid_request_error" if status < 500 else "server_error"
    return TYPES.get(status, default)


@functools.cache
def content(package: str, name: str) -> bytes:
    """Returns a file of a package, such as content("rlhfjax.serve.pages", "chat.html")."""
    return importlib.resources.files(package).joinpath(name).read_bytes()


def page(package: str, name: str) -> Response:
    """Returns a reply with a file of a package; browsers ask for it anew each time."""
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    headers = {"Cache-Control": "no-cache"}
    return Response(content(package, name), media_type=media_type, headers=headers)
