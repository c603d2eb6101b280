"""An OpenAI-compatible endpoint, against a server of this process."""

import pytest

from rlhfjax.endpoint import Endpoint, EndpointConfig, reply_of
from rlhfjax.errors import ConfigError, DataError
from tests.fake_endpoint import FakeEndpoint

KEY = "sk-abc123def456ghi789jkl"
ASKED = {"max_new_tokens": 5, "temperature": 0.5, "seed": 40}


@pytest.fixture
def server():
    with FakeEndpoint(
        lambda request: request["messages"][-1]["content"].upper()
    ) as fake:
        yield fake


def ask(server, texts=("hello",), **options):
    config = EndpointConfig(url=server.url, model="some-model", **options)
    questions = [[{"role": "user", "content": text}] for text in texts]
    return Endpoint(config).answer(questions, **ASKED)


def test_replies_come_in_order_and_requests_say_what_is_wanted(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    texts = [f"question {i}" for i in range(20)]
    replies = ask(server, texts, key="SOME_KEY")
    assert [reply["text"] for reply in replies] == [text.upper() for text in texts]
    assert {reply["model"] for reply in replies} == {"fake-1"}
    requests = sorted(server.requests, key=lambda one: one["seed"])
    assert requests[3] == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "question 3"}],
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 43,
    }
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_reply_that_was_cut_says_so(server):
    server.finish_reason = "length"
    assert ask(server)[0]["is_cut"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_request_that_fails_for_a_while_is_repeated(server, status):
    server.failures = [status, status]
    assert ask(server, retries=2)[0]["text"] == "HELLO"
    assert len(server.requests) == 3


def test_a_request_that_fails_for_good_is_an_error_of_one_line(server):
    server.failures = [400]
    with pytest.raises(
        DataError, match=r"127.0.0.1:\d+/v1: BadRequestError: .*400"
    ) as e:
        ask(server)
    assert "\n" not in str(e.value)
    assert len(server.requests) == 1


def test_the_key_is_in_no_error(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "plainword-secret")
    server.failures = [401]
    server.message = "invalid key plainword-secret"
    with pytest.raises(DataError) as caught:
        ask(server, key="SOME_KEY")
    assert "plainword" not in str(caught.value)
    assert "environment variable SOME_KEY" in str(caught.value)


def test_no_server_is_an_error():
    config = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", retries=0)
    with pytest.raises(DataError, match=r"127.0.0.1:9/v1: APIConnectionError"):
        Endpoint(config).answer([[{"role": "user", "content": "x"}]], **ASKED)


@pytest.mark.parametrize(
    "body, message",
    [
        (b"<html>busy</html>", "not JSON"),
        (b'{"choices": []}', "has no choices"),
        (b'{"choices": [{"message": {"content": 3}}]}', "choices"),
        (b'{"error": "x"}', "choices"),
    ],
)
def test_a_reply_of_another_form_is_an_error(server, body, message):
    server.body = body
    with pytest.raises(DataError, match=message):
        ask(server)


def test_a_reply_without_text_is_empty():
    body = b'{"choices": [{"message": {"content": null, "role": "assistant"}}]}'
    expected = {"text": "", "is_cut": False, "model": "m"}
    assert reply_of(body, "http://x", "m") == expected


def test_a_url_without_a_scheme_is_refused():
    with pytest.raises(
        ConfigError, match=r"endpoint.url='localhost:8000': expected http"
    ):
        EndpointConfig(url="localhost:8000", model="m")
