"""Structured output over HTTP: names of OpenAI and vLLM, and what the engine is given."""

import httpx
import pytest

from rlhfjax import json_text
from rlhfjax.sampling.structured import Form
from rlhfjax.serve.fields import ChatFields, read
from rlhfjax.serve.prepare import form_of
from tests.serve.test_api_chat import HI, ask, client

SCHEMA = {
    "type": "object",
    "properties": {"tall": {"type": "boolean"}},
    "required": ["tall"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        (
            {"response_format": {"type": "json_object"}},
            Form("json", {"type": "object"}),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            Form("json", SCHEMA),
        ),
        ({"guided_json": SCHEMA}, Form("json", SCHEMA)),
        ({"guided_regex": "a+"}, Form("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, Form("choice", ["a", "b"])),
        ({"structured_outputs": {"json": SCHEMA}}, Form("json", SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, Form("regex", "a+")),
        ({"structured_outputs": {"choice": ["a"]}}, Form("choice", ["a"])),
    ],
)
def test_the_form_of_a_request(fields, form):
    body = json_text.encode({"messages": HI, **fields}, "").encode()
    assert form_of(read(body, ChatFields)) == form


def drawn(words):
    """Returns what writes a response of the least ids that may follow."""

    def write(request):
        constraint = request.constraint
        ids = []
        while not constraint.is_complete:
            ids.append(least(constraint.mask()))
            constraint.accept(ids[-1])
        return ids

    def least(mask):
        word = next(i for i, value in enumerate(mask) if value)
        value = int(mask[word])
        return 32 * word + (value & -value).bit_length() - 1

    return write


def test_a_schema_reaches_the_engine(served, serve, words):
    url = serve(served(drawn(words)))
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    reply = ask(url, response_format=form, n=2)
    for choice in reply.choices:
        assert json_text.parse(choice.message.content)["tall"] in (True, False)
    texts = [c.message.content for c in reply.choices]
    assert texts[0] == texts[1]  # each has its own constraint


def test_a_choice_for_plain_completions(served, serve, words):
    url = serve(served(drawn(words)))
    extra = {"guided_choice": ["a dog", "a cat"]}
    create = client(url).completions.create
    reply = create(model="tiny", prompt="a", extra_body=extra)
    assert reply.choices[0].text in ("a dog", "a cat")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_regex": "(a"}, "regex: error: unclosed group"),
        ({"guided_json": {"type": "strin"}}, "json: Invalid type: strin"),
        ({"guided_choice": []}, "guided_choice: list should have at least 1 item"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "response_format: several forms"),
    ],
)  # fmt: skip
def test_an_invalid_form_is_refused(served, serve, fields, message):
    body = {"messages": HI, **fields}
    reply = httpx.post(f"{serve(served())}/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(message)


def test_parse_of_the_official_client(served, serve, words):
    """`response_format` of a pydantic class, as OpenAI's helper sends it."""
    import pydantic

    class Person(pydantic.BaseModel):
        tall: bool

    http = client(serve(served(drawn(words))))
    parsed = http.chat.completions.parse(
        model="tiny", messages=HI, response_format=Person
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
