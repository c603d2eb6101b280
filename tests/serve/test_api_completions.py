"""Plain completions with the official client: prompts of all kinds, echo, log-probabilities."""

import math

import httpx
import openai
import pytest

from tests.serve.test_api_chat import client


def ask(url, prompt, **options):
    return client(url).completions.create(model="tiny", prompt=prompt, **options)


def test_a_text_and_its_tokens_are_one_prompt(served, serve, words):
    model = served("a dog")
    url = serve(model)
    assert ask(url, "the cat").choices[0].text == "a dog"
    assert ask(url, words.encode("the cat")).choices[0].text == "a dog"
    first, second = model.engine.requests
    assert first.tokens == (words.bos_id, *words.encode("the cat"))
    assert second.tokens == tuple(words.encode("the cat"))
    assert first.max_tokens == second.max_tokens == 16


def test_lists_of_prompts_have_choices_in_order(served, serve, words):
    model = served(lambda request: f" {len(request.tokens)}")
    url = serve(model)
    ids = [words.encode("the cat"), words.encode("the cat ran under it")]
    expected = [f" {len(one)}" for one in ids]
    assert [c.text for c in ask(url, ids).choices] == expected
    reply = ask(url, ids, n=2)
    assert [c.text for c in reply.choices] == [
        text for text in expected for _ in (1, 2)
    ]
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.prompt_tokens == sum(map(len, ids))
    texts = [c.text for c in ask(url, ["a", "b c d"]).choices]
    assert texts == [" 2", f" {1 + len(words.encode('b c d'))}"]


def test_echo_begins_with_the_prompt(served, serve):
    url = serve(served(" ran"))
    assert ask(url, "the cat", echo=True).choices[0].text == "the cat ran"
    chunks = list(ask(url, "the cat", echo=True, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "the cat ran"


def test_log_probabilities_of_prompt_and_response(served, serve, words):
    prompt = words.encode("the cat")
    n = len(prompt)
    model = served(" ran")
    url = serve(model)
    (choice,) = ask(url, prompt, echo=True, logprobs=2, max_tokens=1).choices
    found = choice.logprobs
    assert len(found.tokens) == n + 1
    expected = [None, *(-(j + 1) / 4 for j in range(1, n)), -0.25]
    assert found.token_logprobs == expected
    assert found.top_logprobs[0] is None
    for logprob, top in zip(expected[1:], found.top_logprobs[1:], strict=True):
        assert max(top.values()) == logprob and len(top) == 2
    lengths = [len(words.decode(prompt[:i])) for i in range(n + 1)]
    assert found.text_offset == lengths
    assert "".join(found.tokens) == choice.text
    request = model.engine.requests[0]
    assert (request.prompt_logprobs, request.logprobs, request.max_tokens) == (
        *(True, 2, 1),
    )


def test_the_log_probabilities_hold_the_end_of_a_response(served, serve, words):
    """lm-evaluation-harness leaves out the last one, whatever it is."""
    prompt = words.encode("the cat")
    (choice,) = ask(serve(served("")), prompt, echo=True, logprobs=1).choices
    assert choice.text == "the cat"
    assert len(choice.logprobs.token_logprobs) == len(prompt) + 1
    assert choice.logprobs.tokens[-1] == "</s>"


def test_a_stream_has_the_same_log_probabilities(served, serve, words):
    url = serve(served(" ran é"))
    options = {"echo": True, "logprobs": 3}
    (whole,) = ask(url, "the cat", **options).choices
    columns = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    text = ""
    for chunk in ask(url, "the cat", stream=True, **options):
        (choice,) = chunk.choices
        text += choice.text
        for name in columns if choice.logprobs else ():
            columns[name] += getattr(choice.logprobs, name)
    assert text == whole.text
    for name, values in columns.items():
        assert values == getattr(whole.logprobs, name)


def test_a_prompt_alone_is_scored_without_a_response(served, serve, words):
    model = served()
    (choice,) = ask(
        serve(model), "the cat", echo=True, logprobs=0, max_tokens=0
    ).choices
    assert (choice.text, choice.finish_reason) == ("the cat", "length")
    assert len(choice.logprobs.tokens) == 1 + len(words.encode("the cat"))
    assert choice.logprobs.tokens[0] == "<s>"


def test_an_empty_prompt_is_the_beginning_of_a_document(served, serve, words):
    model = served()
    ask(serve(model), "")
    assert model.engine.requests[0].tokens == words.document_start


def test_ids_that_end_a_response(served, serve, words):
    model = served("the cat ran")
    url = serve(model)
    stop = words.encode("the cat ran")[1]
    extra = {"stop_token_ids": [stop]}
    (choice,) = ask(url, "a", extra_body=extra).choices
    assert choice.text == words.decode(words.encode("the cat ran")[:1])
    assert choice.finish_reason == "stop"
    (choice,) = ask(url, "a", extra_body={"ignore_eos": True}).choices
    assert choice.finish_reason == "length"
    assert model.engine.requests[1].stop_ids == frozenset()


def test_a_long_response_is_cut_to_the_room_and_to_the_limit(served, serve):
    model = served(length=24)
    ask(serve(model), [9] * 20, max_tokens=100)
    assert model.engine.requests[0].max_tokens == 4
    ask(serve(model), [9] * 20, max_tokens=100, extra_body={"min_room": 4})
    ask(serve(model), [9] * 20, max_tokens=3, extra_body={"min_room": 5})
    with pytest.raises(
        openai.BadRequestError, match="prompt has 20, and min_room=5"
    ) as e:
        ask(serve(model), [9] * 20, extra_body={"min_room": 5})
    assert e.value.code == "context_length_exceeded"
    limited = served(most_tokens=3)
    ask(serve(limited), [9] * 20, max_tokens=100)
    assert limited.engine.requests[0].max_tokens == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": [9999]}, "prompt: expected ids >= 0 and < 314"),
        ({"prompt": [-1]}, "prompt: expected ids"),
        ({"prompt": [[]]}, "prompt: expected ids"),
        ({"prompt": []}, "prompt: expected at least one"),
        ({"prompt": {"a": 1}}, "prompt: input should be"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens=0: needs echo=true"),
        ({"prompt": "a", "logprobs": 21}, "logprobs: input should be less than or"),
        ({"prompt": "a", "suffix": "b"}, "suffix: not supported here"),
        ({"prompt": ["a"] * 257}, "prompt: at most 256 at a time, got 257"),
        ({"prompt": [9] * 256}, "this model has room for 256 tokens of prompt"),
    ],
)
def test_a_request_that_is_refused(served, serve, body, message):
    reply = httpx.post(f"{serve(served())}/v1/completions", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(message)


def test_a_probability_of_zero_is_a_number(served, serve, words):
    model = served("a")
    submit = model.engine.submit

    def without(request, emit):
        def changed(event):
            if hasattr(event, "logprob"):
                event = event._replace(logprob=-math.inf)
            emit(event)

        return submit(request, changed)

    model.engine.submit = without
    (choice,) = ask(serve(model), "a", logprobs=0).choices
    assert choice.logprobs.token_logprobs == [-9999.0, -9999.0]


def test_an_unknown_model_is_404(served, serve):
    with pytest.raises(openai.NotFoundError, match="model 'x' is unknown; known: tiny"):
        client(serve(served())).completions.create(model="x", prompt="a")
