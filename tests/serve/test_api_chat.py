"""The HTTP API with the official client, over an engine that writes what the test says."""

import asyncio
import time

import httpx
import openai
import pytest

from rlhfjax.data.chat import render_prompt
from rlhfjax.serve.app import Settings

NAMES = ["a", "cat", "dog", "ran", "it"]
HI = [{"role": "user", "content": "hi"}]


def client(url, **options):
    options = {"api_key": "none", "max_retries": 0, **options}
    return openai.OpenAI(base_url=f"{url}/v1", **options)


def ask(url, messages=HI, **options):
    create = client(url).chat.completions.create
    return create(**{"model": "tiny", "messages": messages, **options})


def test_a_chat_completion(served, serve, words):
    model = served("the cat ran")
    reply = ask(serve(model))
    (choice,) = reply.choices
    assert choice.message.content == "the cat ran"
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert (reply.object, reply.model) == ("chat.completion", "tiny")
    prompt = render_prompt(words, HI).tolist()
    (request,) = model.engine.requests
    assert request.tokens == tuple(prompt)
    sampled = len(words.encode("the cat ran")) + 1
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), sampled)
    assert usage.total_tokens == len(prompt) + sampled


def test_a_stream_has_the_same_text_and_counts(served, serve):
    url = serve(served("the cat é🌧 ran"))
    whole = ask(url)
    chunks = list(ask(url, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [c.choices[0].delta.content or "" for c in chunks[:-1]]
    assert "".join(parts) == whole.choices[0].message.content == "the cat é🌧 ran"
    assert not any("\ufffd" in part for part in parts) and len(parts) > 4
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done(served, serve):
    url = serve(served("a"))
    body = {"messages": HI, "stream": True}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert "usage" not in reply.text


def test_fields_reach_the_engine_and_others_come_from_the_model(served, serve):
    model = served(sampling={"temperature": 0.25, "top_p": 0.5, "min_p": 0.125})
    url = serve(model)
    ask(url)
    extra = {"top_k": 7, "min_p": 0.5}
    ask(url, temperature=2, top_p=0.75, seed=9, max_tokens=3, n=2, extra_body=extra)
    first, *others = model.engine.requests
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (
        *(0.25, 0.5, 0, 0.125),
    )
    assert first.max_tokens == 256 - len(first.tokens)
    assert [request.seed for request in others] == [9, 10]
    for request in others:
        assert (request.temperature, request.top_p, request.top_k, request.min_p) == (
            *(2.0, 0.75, 7, 0.5),
        )
        assert request.max_tokens == 3


def test_a_seed_of_any_64_bits_is_taken(served, serve):
    model = served()
    ask(serve(model), seed=-1, n=2)
    assert [request.seed for request in model.engine.requests] == [2**32 - 1, 0]


def test_n_choices_in_order(served, serve):
    model = served(lambda request: NAMES[request.seed])
    reply = ask(serve(model), seed=0, n=5)
    assert [c.message.content for c in reply.choices] == NAMES
    chunks = list(ask(serve(model), seed=0, n=5, stream=True))
    texts = [""] * 5
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == NAMES


def test_a_stop_text_across_tokens_ends_the_response_and_its_lane(served, serve, words):
    model = served("the cat ran under it", seconds=0.002)
    url = serve(model)
    for stream in (False, True):
        if stream:
            chunks = list(ask(url, stop=["n un", "zzz"], stream=True))
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            (choice,) = ask(url, stop=["n un", "zzz"]).choices
            text, reason = choice.message.content, choice.finish_reason
        assert (text, reason) == ("the cat ra", "stop")
    until(lambda: model.engine.busy == 0)


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_length_is_the_reason_of_a_cut_response(served, serve, words):
    text = "the cat ran under it"
    (choice,) = ask(serve(served(text)), max_completion_tokens=2).choices
    assert choice.finish_reason == "length"
    assert choice.message.content == words.decode(words.encode(text)[:2])


def test_log_probabilities_of_a_chat(served, serve, words):
    text = "the é"
    url = serve(served(text))
    (choice,) = ask(url, logprobs=True, top_logprobs=2).choices
    content = choice.logprobs.content
    ids = words.encode(text)
    assert [token.logprob for token in content] == [
        -(j + 1) / 4 for j in range(len(ids))
    ]
    assert bytes(b for token in content for b in token.bytes) == text.encode()
    assert content[-1].token == "bytes:\\xa9"
    first = content[0].top_logprobs
    assert [token.logprob for token in first] == [-0.25, -1.25]
    assert first[0].token == content[0].token
    streamed = [
        token
        for chunk in ask(url, logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == content


def test_tokens_after_a_stop_text_have_no_log_probabilities(served, serve, words):
    (choice,) = ask(serve(served("the cat ran")), logprobs=True, stop=" cat").choices
    assert choice.message.content == "the"
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == "the"


def test_special_tokens_that_a_user_types_are_text(served, serve, words):
    model = served()
    ask(serve(model), [{"role": "user", "content": "<|assistant|></s>"}])
    tokens = model.engine.requests[0].tokens
    assert tokens.count(words.token_id("<|assistant|>")) == 1  # the cue
    assert "<|assistant|></s>" in words.decode(tokens)


def test_messages_of_parts_and_of_a_developer(served, serve, words):
    model = served()
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [
        {"role": "developer", "content": "a dog"},
        {"role": "user", "content": parts, "name": "Bo"},
    ]
    ask(serve(model), messages)
    expected = render_prompt(words, [{"role": "system", "content": "a dog"}, *HI])
    assert model.engine.requests[0].tokens == tuple(expected.tolist())


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "other"}, 404, "model 'other' is unknown; known: tiny"),
        ({"temperature": -1}, 400, "temperature: input should be greater than or equal"),
        ({"temperature": "hot"}, 400, "temperature: input should be a valid number, got"),
        ({"n": 17}, 400, "n: input should be less than or equal to 16, got 17"),
        ({"n": True}, 400, "n: input should be a valid integer, got True"),
        ({"messages": []}, 400, "messages: list should have at least 1 item"),
        ({"messages": [{"role": "x", "content": ""}]}, 400, "messages: role 'x' is none"),
        ({"messages": [{"role": "user"}]}, 400, "messages: a message needs 'role' and"),
        ({"tools": [{"type": "function"}]}, 400, "tools: not supported here; expected None"),
        ({"logit_bias": {"1": 2}}, 400, "logit_bias: not supported here"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty: not supported here"),
        ({"temprature": 1}, 400, "unknown field 'temprature'; did you mean temperature?"),
        ({"top_logprobs": 2}, 400, "top_logprobs: needs logprobs=true"),
        ({"max_tokens": 0}, 400, "max_tokens=0: must be >= 1"),
        ({"stop": ["a", 1]}, 400, "stop"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type: input should"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    ],
)  # fmt: skip
def test_a_request_that_is_refused(served, serve, change, status, message):
    url = serve(served())
    body = {"model": "tiny", "messages": HI, **change}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert reply.status_code == status
    assert error["message"].startswith(message) and "\n" not in error["message"]


def test_harmless_fields_and_values_are_taken(served, serve):
    options = {"user": "x", "frequency_penalty": 0, "tools": [], "logit_bias": {}}
    reply = ask(serve(served()), **options, extra_body={"service_tier": "auto"})
    assert reply.choices[0].message.content == "the cat ran"


def test_the_errors_of_the_official_client(served, serve):
    url = serve(served(), token="0123456789abcdef")
    with pytest.raises(openai.AuthenticationError):
        ask(url)
    models = client(url, api_key="0123456789abcdef")
    assert [model.id for model in models.models.list()] == ["tiny"]
    assert models.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        models.chat.completions.create(model="x", messages=HI)
    assert error.value.code == "model_not_found"
    long = [{"role": "user", "content": "cat " * 300}]
    with pytest.raises(openai.BadRequestError) as error:
        models.chat.completions.create(model="tiny", messages=long)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/score", 404)],
)  # fmt: skip
def test_paths_that_are_not_there_are_error_objects(
    served, serve, method, path, status
):
    reply = httpx.request(method, serve(served()) + path)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_not_json_is_refused(served, serve):
    url = serve(served()) + "/v1/chat/completions"
    for content in (b"{", b"[1]", b'{"messages": NaN}', b""):
        reply = httpx.post(url, content=content)
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_full_engine_is_429_with_retry_after(served, serve):
    url = serve(served(most=0))
    with pytest.raises(openai.RateLimitError) as error:
        ask(url)
    assert error.value.response.headers["retry-after"] == "1"


def test_more_choices_than_the_engine_takes_come_one_after_the_other(served, serve):
    model = served(lambda request: f"{request.seed}", most=2)
    reply = ask(serve(model), seed=0, n=9)
    assert [c.message.content for c in reply.choices] == list("012345678")


def test_an_engine_that_fails_is_500_and_an_error_in_a_stream(served, serve):
    url = serve(served(crash="no memory"))
    with pytest.raises(openai.InternalServerError, match="no memory"):
        ask(url)
    with pytest.raises(openai.APIError, match="no memory"):
        list(ask(url, stream=True))


def test_a_response_that_takes_too_long_is_503(served, serve):
    model = served("the cat ran " * 20, seconds=0.02)
    url = serve(model, settings=Settings(seconds=0.2))
    with pytest.raises(openai.InternalServerError, match=r"longer than 0\.2 seconds"):
        ask(url)
    with pytest.raises(openai.APIError, match="longer than"):
        list(ask(url, stream=True))
    until(lambda: model.engine.busy == 0)


def test_a_client_that_goes_away_frees_its_lanes(served, serve):
    model = served("the cat ran " * 20, seconds=0.01)
    url = serve(model)
    with httpx.Client() as http:
        body = {"messages": HI, "stream": True, "n": 3}
        with http.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
            next(reply.iter_lines())
            assert model.engine.busy == 3
        until(lambda: model.engine.busy == 0)
        with pytest.raises(httpx.ReadTimeout):
            http.post(f"{url}/v1/chat/completions", json={"messages": HI}, timeout=0.1)
        until(lambda: model.engine.busy == 0)


def test_32_streams_at_a_time(served, serve):
    model = served(lambda request: f"{request.seed} cat", seconds=0.001)
    url = serve(model)

    async def one(http, seed):
        stream = await http.chat.completions.create(
            model="tiny", messages=HI, stream=True, seed=seed
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as http:
            return await asyncio.gather(*(one(http, seed) for seed in range(32)))

    assert asyncio.run(all_of_them()) == [f"{seed} cat" for seed in range(32)]
    assert model.engine.busy == 0


def test_prompts_are_logged_only_if_asked_for(served, serve, caplog):
    caplog.set_level("INFO", "rlhfjax")
    secret = [{"role": "user", "content": "the secret"}]
    ask(serve(served()), secret)
    assert "prompt tokens" in caplog.text and "secret" not in caplog.text
    ask(serve(served(), settings=Settings(log_prompts=True)), secret)
    assert "the secret" in caplog.text


def test_health_and_the_end_of_the_server(served, serve, words):
    from rlhfjax.serve.app import Api
    from rlhfjax.web.server import Server

    model = served()
    with Server(Api([model]).app(), "127.0.0.1", 0) as server:
        about = httpx.get(f"{server.url}/health").json()
        assert about == {"status": "ok", "models": {"tiny": {"busy": 0}}}
        assert not model.engine.is_closed
    assert model.engine.is_closed
