"""What a server lets through: by token, by Host, by Origin and by size."""

import asyncio
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from rlhfjax.errors import ConfigError
from rlhfjax.web import access
from rlhfjax.web.guard import SECURITY_HEADERS, guarded, name_of
from rlhfjax.web.replies import error
from rlhfjax.web.server import Server

TOKEN = "0123456789abcdef"


async def echo(request: Request):
    return PlainTextResponse(await request.body() or b"empty")


def application(**options):
    routes = [
        Route("/", echo, methods=["GET", "POST"]),
        Route("/open", echo),
    ]
    return guarded(Starlette(routes=routes), **{"host": "127.0.0.1", **options})


@pytest.fixture
def ask():
    """Returns a function that sends one request to an application."""

    def send(app, method="GET", path="/", **options) -> httpx.Response:
        async def one():
            transport = httpx.ASGITransport(app)
            url = "http://127.0.0.1:8000"
            async with httpx.AsyncClient(transport=transport, base_url=url) as client:
                return await client.request(method, path, **options)

        return asyncio.run(one())

    return send


def test_a_request_passes_and_every_reply_has_the_security_headers(ask):
    reply = ask(application(), "POST", content=b"hello")
    assert (reply.status_code, reply.text) == (200, "hello")
    assert all(reply.headers[name] == x for name, x in SECURITY_HEADERS.items())
    refused = ask(application(token=TOKEN))
    assert refused.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        (f"Bearer {TOKEN}", 200),
        (f"Bearer {TOKEN}x", 401),
        (f"bearer {TOKEN}", 401),
        (TOKEN, 401),
        ("Bearer é", 401),
    ],
)
def test_token(ask, header, status):
    headers = {} if header is None else {"Authorization": header.encode()}
    reply = ask(application(token=TOKEN, open_paths={"/open"}), headers=headers)
    assert reply.status_code == status
    if status == 401:
        assert reply.json()["error"]["code"] == "invalid_api_key"


def test_an_open_path_needs_no_token_but_the_paths_below_it_do(ask):
    app = application(token=TOKEN, open_paths={"/open"})
    assert ask(app, path="/open").status_code == 200
    assert ask(app, path="/open/else").status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("127.0.0.2", 200),
        ("example.com", 403),
        ("127.0.0.1.example.com:80", 403),
        ("", 403),
    ],
)
def test_a_loopback_server_answers_to_names_of_this_machine_alone(ask, host, status):
    assert ask(application(), headers={"Host": host}).status_code == status


def test_a_server_with_a_public_address_answers_to_any_name(ask):
    headers = {"Host": "example.com", "Authorization": f"Bearer {TOKEN}"}
    app = application(host="0.0.0.0", token=TOKEN)
    assert ask(app, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://127.0.0.1:9000", 403),
        ("https://example.com", 403),
        ("null", 403),
    ],
)
def test_a_page_of_another_server_is_refused(ask, origin, status):
    reply = ask(application(), "POST", headers={"Origin": origin}, content=b"x")
    assert reply.status_code == status


def test_a_body_may_have_the_limit_and_no_byte_more(ask):
    app = application(most_bytes=4)
    assert ask(app, "POST", content=b"1234").text == "1234"
    assert ask(app, "POST", content=b"12345").status_code == 413


def test_a_body_without_announced_length_is_counted(ask):
    async def parts():
        yield b"123"
        yield b"45"

    assert ask(application(most_bytes=5), "POST", content=parts()).text == "12345"
    refused = ask(application(most_bytes=4), "POST", content=parts())
    assert refused.status_code == 413


def test_name_of():
    names = [name_of(x) for x in ("A.b:1", "[::1]:80", "[::1]", "", "h")]
    assert names == ["a.b", "::1", "::1", "", "h"]


def test_error_has_the_form_of_openai():
    reply = error(404, "no model x", code="model_not_found", param="model")
    assert reply.status_code == 404
    assert json.loads(bytes(reply.body)) == {
        "error": {
            "message": "no model x",
            "type": "not_found_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize(
    ("host", "port", "token", "words"),
    [
        ("0.0.0.0", 8000, "", "--host=0.0.0.0: other machines could reach"),
        ("example.com", 8000, "", "--host=example.com"),
        ("127.0.0.1", 70000, "", "--port=70000"),
        ("127.0.0.1", 8000, "short", "given 5"),
        ("127.0.0.1", 8000, "é" * 20, "ASCII"),
    ],
)
def test_an_address_that_is_not_safe_is_refused(host, port, token, words):
    with pytest.raises(ConfigError, match=words):
        access.validate(host, port, token)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_this_machine_alone_needs_no_token(host):
    access.validate(host, 0, "")


def test_a_missing_package_names_the_extra():
    with pytest.raises(ConfigError, match=r"no_such_package .*\[serve\]"):
        access.validate_installed("no_such_package")


def test_a_server_in_a_thread_answers_and_ends():
    with Server(application(), "127.0.0.1", 0) as server:
        assert httpx.get(server.url).text == "empty"
        with pytest.raises(ConfigError, match=r"--port=\d+: .*in use"):
            Server(application(), "127.0.0.1", server.port)
    server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)
