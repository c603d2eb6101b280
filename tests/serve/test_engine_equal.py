"""What the engine emits is what `generate` returns, whatever else runs.

Random schedules of requests that share beginnings, among others that are cancelled; seeds alone and
in company; int8 and adapters.
"""

import dataclasses
import random

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models import Model, quantized
from rlhfjax.models.lora import LoraConfig
from rlhfjax.serve import programs
from rlhfjax.serve.engine import Engine
from rlhfjax.serve.requests import Full
from tests.models.families import CONFIGS, random_params, random_trained
from tests.serve.received import Received, generated, request, served

WIDTH, NEW, LENGTH = 20, 8, 28
STOP = frozenset({7, 12, 30})
SLOW = [
    pytest.param(name, marks=[] if name == "gemma-like" else pytest.mark.slow)
    for name in CONFIGS
]


@pytest.fixture(autouse=True)
def few_entries(monkeypatch):
    """Decode steps read 8, 16 or all entries."""
    monkeypatch.setattr(programs, "FEWEST_ENTRIES", 8)


def plain(name):
    model = Model(CONFIGS[name])
    return model, random_params(model)


def int8():
    model, params = plain("llama-gqa")
    return model, quantized.weights(params, model.axes())


def adapted():
    model = Model(CONFIGS["llama-gqa"], lora=LoraConfig(rank=3, alpha=4.0))
    base, adapters = random_params(model), random_trained(model)

    def merge(tree, other):
        both = {k: merge(tree[k], other[k]) for k in tree.keys() & other.keys()}
        return {**tree, **other, **both}

    return model, merge(base, adapters)


def scanned():
    config = dataclasses.replace(CONFIGS["llama-gqa"], scan_layers=True)
    model = Model(config)
    return model, random_params(model)


def prompts(rng, n, earlier=()):
    """Prompts of 1 to WIDTH tokens; many begin as an earlier sequence does."""
    pool, found = list(earlier), []
    for _ in range(n):
        length = rng.randint(1, WIDTH)
        beginning = rng.choice(pool)[: rng.randint(0, WIDTH)] if pool else []
        tail = [rng.randrange(2, 61) for _ in range(length)]
        found.append((list(beginning) + tail)[:length])
        pool.append(found[-1])
    return found


def submit(engine, wanted, emit):
    while True:
        try:
            return engine.submit(wanted, emit)
        except Full:
            emit.wait_for_room()


class Patient(Received):
    def wait_for_room(self):
        self.ended.wait(0.002)


def run_schedule(engine, requests, rng):
    """Submits requests at random moments, among others that are cancelled at random moments."""
    received, others = [], []
    for wanted in requests:
        received.append(Patient())
        submit(engine, wanted, received[-1])
        if rng.random() < 0.4:
            tokens = wanted.tokens[: rng.randint(1, WIDTH)]
            noise = request(tokens, 8, temperature=1.5, top_k=5, seed=rng.randrange(99))
            others.append(submit(engine, noise, Patient()))
        if rng.random() < 0.5:
            received[rng.randrange(len(received))].ended.wait(rng.random() * 0.02)
        if others and rng.random() < 0.7:
            others.pop(rng.randrange(len(others))).cancel()
    return [emit.wait() for emit in received]


def assert_equal(received, expected):
    for emit, (tokens, logprobs) in zip(received, expected, strict=True):
        assert emit.tokens == tokens
        np.testing.assert_allclose(emit.logprobs, logprobs, atol=1e-5)


def assert_greedy_is_equal(model, params, n=24, seed=0):
    rng = random.Random(seed)
    first = [
        request(p, rng.randint(1, NEW), stop_ids=STOP) for p in prompts(rng, n // 2)
    ]
    expected = generated(model, params, first, WIDTH, temperature=0.0)
    # Conversations that go on, and prompts that begin as others do.
    turns = [list(r.tokens) + e[0] for r, e in zip(first, expected, strict=True)]
    second = [
        request(p, rng.randint(1, NEW), stop_ids=STOP)
        for p in prompts(rng, n // 2, turns)
    ]
    expected += generated(model, params, second, WIDTH, temperature=0.0)
    with Engine(model, params, lanes=3, length=LENGTH, chunk=4, queue=4) as engine:
        received = run_schedule(engine, first + second, rng)
        assert_equal(received, expected)
        assert engine.stats().reused_tokens > 0
    for emit, wanted in zip(received, first + second, strict=True):
        stopped = emit.tokens[-1] in STOP
        assert emit.end.reason == ("stop" if stopped else "length")
        assert stopped or len(emit.tokens) == wanted.max_tokens


@pytest.mark.parametrize("name", SLOW)
def test_greedy_tokens_and_logprobs_are_those_of_generate(name):
    assert_greedy_is_equal(*plain(name))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_in_other_schedules_too(seed):
    assert_greedy_is_equal(*plain("llama-gqa"), n=48, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("make", [int8, adapted, scanned])
def test_of_int8_weights_adapters_and_scanned_layers(make):
    assert_greedy_is_equal(*make(), n=12)


def test_a_seed_gives_the_sample_of_generate_alone_and_in_company():
    model, params = plain("llama-gqa")
    rng = random.Random(5)
    settings = {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.01}
    requests = [
        request(p, NEW, seed=1000 + i, **settings)
        for i, p in enumerate(prompts(rng, 10))
    ]
    expected = generated(model, params, requests, WIDTH, **settings)
    with Engine(model, params, lanes=3, length=LENGTH, chunk=4) as engine:
        company = run_schedule(engine, requests, rng)
        alone = [served(engine, wanted)[0] for wanted in requests]
    for emit, other, (tokens, _) in zip(company, alone, expected, strict=True):
        assert emit.tokens == tokens == other.tokens
        np.testing.assert_allclose(emit.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.slow
def test_with_an_int8_cache_a_response_does_not_depend_on_the_others():
    # `generate` attends to the prompt's exact keys and values, so that it is not the reference.
    model, params = plain("gemma-like")
    model = dataclasses.replace(model, int8_cache=True)
    rng = random.Random(3)
    requests = [request(p, NEW) for p in prompts(rng, 16)]
    with Engine(model, params, lanes=3, length=LENGTH, chunk=4) as engine:
        company = run_schedule(engine, requests, rng)
        assert engine.stats().reused_tokens > 0
    with Engine(model, params, lanes=1, length=LENGTH, chunk=LENGTH) as engine:
        alone = [served(engine, wanted)[0] for wanted in requests]
    assert_equal(company, [(emit.tokens, emit.logprobs) for emit in alone])


def test_logprobs_are_the_models_whatever_the_temperature():
    model, params = plain("llama-gqa")
    prompt = prompts(random.Random(2), 1)[0]
    sampled = request(prompt, NEW, temperature=1.0, seed=4)
    expected = generated(model, params, [sampled], WIDTH, temperature=1.0)[0]
    hot = request(prompt, NEW, temperature=2.5, seed=4, logprobs=5)
    with Engine(model, params, lanes=3, length=LENGTH, chunk=4) as engine:
        at_1, at_hot = served(engine, sampled, hot)
    assert at_1.tokens == expected[0]
    np.testing.assert_allclose(at_1.logprobs, expected[1], atol=1e-5)
    row = jnp.array([[*prompt, *at_hot.tokens]], jnp.int32)
    logits = np.asarray(model.logits(params, model.hidden(params, row)))[0]
    log_p = logits - np.log(np.exp(logits.astype(float)).sum(-1, keepdims=True))
    for i, (token, logprob) in enumerate(
        zip(at_hot.tokens, at_hot.logprobs, strict=True)
    ):
        here = log_p[len(prompt) - 1 + i]
        assert abs(logprob - here[token]) < 1e-5
        order = np.argsort(-here)[:5]
        assert [id for id, _ in at_hot.tops[i]] == order.tolist()
        np.testing.assert_allclose(
            [p for _, p in at_hot.tops[i]], here[order], atol=1e-5
        )
