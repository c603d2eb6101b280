"""The API over the engine: the model's numbers, forms that are kept, and clients that go away."""

import asyncio
import contextlib
import gc
import os
import random

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import json_text
from rlhfjax.data.chat import render_prompt
from rlhfjax.sampling import Sampling, generate
from rlhfjax.serve.app import Api
from rlhfjax.web.guard import guarded
from rlhfjax.web.server import Server
from tests.serve.real import real_served, tiny_model
from tests.serve.test_api_chat import HI, ask, client, until
from tests.serve.test_api_structured import SCHEMA


@pytest.fixture(scope="module")
def tiny(words):
    return real_served(words)


@pytest.fixture(scope="module")
def url(tiny):
    app = guarded(Api([tiny]).app(), host="127.0.0.1")
    with Server(app, "127.0.0.1", 0, grace=1) as server:
        yield server.url


def test_a_greedy_response_is_that_of_generate(url, words):
    model, params = tiny_model(words.vocab_size)
    ids = render_prompt(words, HI)
    sampling = Sampling(
        max_new_tokens=12, eos_id=words.eos_id, pad_id=words.pad_id, temperature=0.0
    )
    rows = jnp.asarray(ids)[None], jnp.ones((1, len(ids)), jnp.int32)
    keys = jax.random.key(0)[None]
    out = jax.jit(generate, static_argnums=(0, 5))(model, params, *rows, keys, sampling)
    kept = out.mask[0] > 0
    expected = [i for i in out.tokens[0][kept].tolist() if i != words.eos_id]
    (choice,) = ask(url, temperature=0, max_tokens=12, logprobs=True).choices
    assert choice.message.content == words.decode(expected)
    found = [token.logprob for token in choice.logprobs.content]
    np.testing.assert_allclose(found, out.logprobs[0][: len(expected)], atol=1e-5)


def test_echoed_log_probabilities_are_those_of_the_model(url, words):
    model, params = tiny_model(words.vocab_size)
    ids = words.encode("the cat ran under it, 12, 345")
    row = jnp.asarray(ids)[None]
    hidden = model.hidden(params, row)
    logprobs = jax.nn.log_softmax(model.logits(params, hidden))[0]
    picked = np.take_along_axis(np.asarray(logprobs[:-1]), np.array(ids)[1:, None], 1)
    create = client(url).completions.create
    options = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    (choice,) = create(model="tiny", prompt=ids, **options).choices
    found = choice.logprobs.token_logprobs
    assert found[0] is None
    np.testing.assert_allclose(found[1:-1], picked[:, 0], atol=1e-5)
    best = np.asarray(logprobs.max(1))
    tops = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    np.testing.assert_allclose(tops, best, atol=1e-5)
    # lm-evaluation-harness compares them for equality.
    is_greedy = [x == y for x, y in zip(found[1:], tops, strict=True)]
    expected = [
        int(i) == token for i, token in zip(logprobs.argmax(1), ids[1:], strict=False)
    ]
    assert is_greedy == [*expected, True]


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_knows_no_json_writes_what_the_schema_says(url, seed):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    (choice,) = ask(url, response_format=form, seed=seed, temperature=2).choices
    assert choice.finish_reason == "stop"
    value = json_text.parse(choice.message.content)
    assert list(value) == ["tall"] and isinstance(value["tall"], bool)


def test_a_stop_text_frees_the_lane_of_the_engine(url, tiny):
    (choice,) = ask(url, stop=["a", "e", "t", " "], seed=1).choices
    assert not set("aet ") & set(choice.message.content)
    until(lambda: tiny.engine.stats().busy == 0)


async def leave(url, count, rng, at_once):
    """Sends requests and closes each connection at a random moment."""
    limit = asyncio.Semaphore(at_once)

    async def one(http, seed, seconds):
        body = {
            "messages": HI,
            "stream": seed % 2 == 0,
            "seed": seed,
            "n": 1 + seed % 3,
            "ignore_eos": True,
        }
        request = http.post(f"{url}/v1/chat/completions", json=body)
        async with limit:
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                await asyncio.wait_for(request, seconds)

    async with httpx.AsyncClient(timeout=60) as http:
        moments = [rng.random() * 0.6 for _ in range(count)]
        await asyncio.gather(*(one(http, i, s) for i, s in enumerate(moments)))


def test_clients_that_go_away_at_random_moments_leave_no_lane_busy(url, tiny):
    asyncio.run(leave(url, 40, random.Random(0), at_once=8))
    until(lambda: tiny.engine.stats()[1:3] == (0, 0))
    assert ask(url, max_tokens=1).choices[0].finish_reason


@pytest.mark.nightly
def test_1000_clients_that_go_away_leave_memory_and_files_as_they_were(url, tiny):
    rng = random.Random(0)

    def settled():
        until(lambda: tiny.engine.stats()[1:3] == (0, 0), 30)
        ask(url, max_tokens=1)
        gc.collect()

    # Buffers, threads and arenas of the allocator: without a leak, memory stays after as many.
    asyncio.run(leave(url, 1500, rng, at_once=32))
    settled()
    files, memory = len(os.listdir("/proc/self/fd")), resident()
    before = tiny.engine.stats()
    asyncio.run(leave(url, 1000, rng, at_once=32))
    settled()
    after = tiny.engine.stats()
    assert after.prompt_tokens - before.prompt_tokens > 1000  # many had a lane
    assert after.response_tokens - before.response_tokens > 1000
    assert len(os.listdir("/proc/self/fd")) <= files * 1.02
    assert resident() <= memory * 1.02


def resident() -> int:
    """Returns the pages of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
