"""What the engine does with its lanes and queue: no compilation, cancels, ends, errors, reuse."""

import logging
import random
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.models import Model
from rlhfjax.serve import programs
from rlhfjax.serve.device import Device
from rlhfjax.serve.engine import Engine
from rlhfjax.serve.requests import Closed, End, Full, Token
from tests.models.families import FAMILIES, random_params
from tests.serve.received import PATIENCE, Received, generated, request, served

LENGTH, CHUNK = 28, 4
COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED = "/jax/core/compile/jaxpr_trace_duration"


@pytest.fixture(scope="module")
def made():
    model = Model(FAMILIES["llama-gqa"])
    return model, random_params(model)


def engine_of(made, lanes=3, **settings):
    own = {"length": LENGTH, "chunk": CHUNK} | settings
    return Engine(*made, lanes=lanes, **own)


def expected(made, wanted):
    return generated(*made, [wanted], LENGTH - 8, temperature=0.0)[0][0]


class Allowed:
    """Allows one set of ids after the other, then nothing."""

    def __init__(self, *steps, packed=False, fails_at=None):
        self.steps, self.packed, self.fails_at = list(steps), packed, fails_at
        self.accepted = []

    def mask(self):
        mask = np.zeros(61, bool)
        mask[list(self.steps[len(self.accepted)])] = True
        if not self.packed:
            return mask
        padded = np.pad(mask, (0, 3))
        return np.packbits(padded, bitorder="little").view(np.int32)

    def accept(self, token):
        if len(self.accepted) == self.fails_at:
            raise ValueError("no such token\nin this grammar")
        self.accepted.append(token)

    @property
    def is_complete(self):
        return len(self.accepted) == len(self.steps)


class Gate(Received):
    """Holds the engine's thread at the first event until it is opened."""

    def __init__(self):
        super().__init__()
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, event):
        super().__call__(event)
        self.reached.set()
        assert self.open.wait(PATIENCE)


def until(condition):
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


# ------------------------------------------------------------------ compilation


def test_nothing_is_compiled_after_the_warm_up(made, monkeypatch):
    monkeypatch.setattr(programs, "FEWEST_ENTRIES", 8)
    rng = random.Random(0)
    with engine_of(made) as engine:
        engine.warm_up()
        counted = []

        def count(name, *_, **__):
            if name in (COMPILED, TRACED):
                counted.append(name)

        jax.monitoring.register_event_duration_secs_listener(count)
        jax.jit(lambda x: x * 3 + 1)(np.ones(7))
        assert set(counted) == {COMPILED, TRACED}
        counted.clear()
        for n in (1, 2, 5, 6, 13, 20):
            tokens = [rng.randrange(61) for _ in range(n)]
            served(
                engine,
                request(tokens, 8),
                request(tokens, 1, logprobs=20),
                request(tokens, 8, temperature=1.0, top_k=3, seed=-5),
                request(tokens, 8, temperature=0.1, top_p=0.5, seed=2**70),
                request(tokens, 8, temperature=3, min_p=0.1, stop_ids=frozenset({3})),
                request(tokens, 0, prompt_logprobs=True, logprobs=1),
                request(tokens, 2, prompt_logprobs=True),
                request(tokens, 2, constraint=Allowed({1, 2}, {3})),
                request(tokens, 2, constraint=Allowed({60}, {9}, packed=True)),
            )
            gone = Received()
            engine.submit(request(tokens, 8), gone).cancel()
            gone.wait()
        assert not counted


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize("n", [1, 2, 20])
def test_prompt_logprobs_are_those_of_one_pass_over_the_prompt(made, n):
    model, params = made
    tokens = np.random.default_rng(n).integers(0, 61, n)
    wanted = request(tokens, 2, prompt_logprobs=True, logprobs=3)
    with engine_of(made) as engine:
        warm, again = served(engine, wanted, wanted)
        # The prompt is in the cache now, and is run again.
        last = served(engine, wanted)[0]
    logits = model.logits(params, model.hidden(params, jnp.asarray(tokens)[None]))[0]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    for received in (warm, again, last):
        assert [type(e) for e in received.events][1:] == [Token, Token, End]
        assert [t.id for t in received.prompt] == tokens.tolist()
        assert np.isnan(received.prompt[0].logprob) and received.prompt[0].top == ()
        for i, token in enumerate(received.prompt[1:]):
            np.testing.assert_allclose(token.logprob, log_p[i][token.id], atol=1e-5)
            order = np.argsort(-log_p[i])[:3]
            assert [id for id, _ in token.top] == order.tolist()
        assert received.tokens == expected(made, request(tokens, 2))


def test_a_prompt_is_scored_without_a_response(made):
    with engine_of(made) as engine:
        scored, empty = served(
            engine,
            request(range(2, 11), 0, prompt_logprobs=True),
            request([5], 0),
        )
    assert [t.id for t in scored.prompt] == list(range(2, 11))
    assert scored.tokens == [] and scored.end == End("length")
    assert empty.events == [End("length")]


# ------------------------------------------------------------------ lanes


def test_a_conversation_goes_on_in_the_lane_that_has_its_earlier_turns(made):
    with engine_of(made) as engine:
        story, other, third = (list(range(i, i + 10)) for i in (2, 30, 40))
        first = served(engine, request(story, 4))[0]
        served(engine, request(other, 4))
        served(engine, request(third, 4))
        assert engine.stats().reused_tokens == 0
        # All turns but the last token of the response, which was not run.
        turn = [*story, *first.tokens, 50, 51]
        second = request(turn, 4)
        assert served(engine, second)[0].tokens == expected(made, second)
        assert engine.stats().reused_tokens == 13
        # The other conversation is still there; of the same prompt all but one token are reused.
        served(engine, request(other, 1))
        assert engine.stats().reused_tokens == 13 + 9
        # A new one takes the lane that was unused for longest: the third is gone then.
        served(engine, request([60, 59, 58], 1))
        served(engine, request(third, 1))
        assert engine.stats().reused_tokens == 13 + 9
        assert engine.stats().prompt_tokens == 10 + 10 + 10 + 16 + 10 + 3 + 10


def test_the_choices_of_a_request_run_its_prompt_once(made, monkeypatch):
    run, prefill = [], programs.prefill

    def counted(*arguments):
        run.append(arguments[-1].size)
        return prefill(*arguments)

    monkeypatch.setattr(programs, "prefill", counted)
    with engine_of(made) as engine:
        prompt = list(range(2, 19))
        wanted = [request(prompt, 8), request(prompt, 8), request([*prompt, 5], 8)]
        gate, received = Gate(), [Received() for _ in wanted]
        engine.submit(request([4], 1), gate)
        assert gate.reached.wait(PATIENCE)
        for one, emit in zip(wanted, received, strict=True):
            engine.submit(one, emit)
        gate.open.set()
        for one, emit in zip(wanted, received, strict=True):
            emit.wait()
            assert emit.tokens == expected(made, one)
        # 16 tokens by the first one, and the 17th by its first step.
        assert run == [4, 4, 4, 4]
        assert engine.stats().reused_tokens == 16 + 17


def test_a_copied_prompt_is_no_longer_that_of_its_source(made):
    """Source and copy go on with different tokens."""
    with engine_of(made, lanes=2) as engine:
        prompt = list(range(2, 12))
        first = served(engine, request(prompt, 6))[0]
        both = [request([*prompt, 50], 8), request([*prompt, *first.tokens, 7], 8)]
        for one, got in zip(both, served(engine, *both), strict=True):
            assert got.tokens == expected(made, one)


def test_a_long_prompt_stops_the_others_for_one_chunk_per_token(made, monkeypatch):
    order = []
    for name in ("decode", "prefill"):
        program = getattr(programs, name)

        def run(*arguments, name=name, program=program):
            order.append(name)
            return program(*arguments)

        monkeypatch.setattr(programs, name, run)
    with engine_of(made) as engine:
        gate, late = Gate(), Received()
        engine.submit(request([4], 8), gate)
        assert gate.reached.wait(PATIENCE)
        engine.submit(request(range(2, 19), 4), late)  # 16 tokens are 4 chunks
        gate.open.set()
        late.wait()
    text = "".join(name[0] for name in order)
    assert "pdpdpdpd" in text and "pp" not in text


def test_a_chunk_begins_when_the_one_before_has_ended(made, monkeypatch):
    order = []
    for owner, name in ((programs, "prefill"), (programs, "decode"), (Device, "wait")):
        function = getattr(owner, name)

        def run(*arguments, name=name, function=function):
            order.append(name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, run)
    with engine_of(made) as engine:
        served(engine, request(range(2, 19), 1))
    assert "".join(name[0] for name in order).startswith("pwpwpwpd")


def test_the_statistics_count_lanes_requests_and_tokens(made):
    with engine_of(made) as engine:
        gate, waiting = Gate(), [Received() for _ in range(4)]
        engine.submit(request([4, 5], 3), gate)
        assert gate.reached.wait(PATIENCE)
        for emit in waiting:
            engine.submit(request([6], 2), emit)
        stats = engine.stats()
        assert (stats.lanes, stats.busy, stats.queued) == (3, 1, 4)
        gate.open.set()
        for emit in waiting:
            emit.wait()
        stats = engine.stats()
        assert (stats.busy, stats.queued, stats.response_tokens) == (0, 0, 11)
        assert stats.prompt_tokens == 6 and 3 <= stats.steps <= 11


# ------------------------------------------------------------------ cancels, limits


@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_after_cancels_at_random_moments_no_lane_is_busy(made, n):
    rng = random.Random(1)
    received, tickets = [], []
    with engine_of(made, queue=40) as engine:
        engine.warm_up()
        while len(received) < n:
            tokens = [rng.randrange(61) for _ in range(rng.randint(1, 20))]
            try:
                wanted = request(tokens, 8, prompt_logprobs=rng.random() < 0.2)
                tickets.append(engine.submit(wanted, emit := Received()))
            except Full:
                time.sleep(0.001)
                continue
            received.append(emit)
            if rng.random() < 0.3:
                rng.choice(received).ended.wait(rng.random() * 0.005)
            if rng.random() < 0.6:
                tickets.pop(rng.randrange(len(tickets))).cancel()
        for ticket in tickets:
            ticket.cancel()
        reasons = [emit.wait().end.reason for emit in received]
        assert set(reasons) == {"length", "cancelled"}
        assert reasons.count("cancelled") > n / 5
        assert engine.stats()[1:3] == (0, 0)
        wanted = request(range(3, 12), 8)
        assert served(engine, wanted)[0].tokens == expected(made, wanted)


def test_a_full_queue_takes_no_request_and_then_takes_one_again(made):
    with engine_of(made, queue=2) as engine:
        gate, waiting = Gate(), [Received(), Received()]
        engine.submit(request([4], 4), gate)
        assert gate.reached.wait(PATIENCE)
        tickets = [engine.submit(request([5], 2), emit) for emit in waiting]
        with pytest.raises(Full, match=r"^2 requests are waiting already$"):
            engine.submit(request([6], 2), Received())
        tickets[0].cancel()
        gate.open.set()
        assert waiting[0].wait().events == [End("cancelled")]
        assert waiting[1].wait().end == End("length")
        assert served(engine, request([6], 2))[0].end == End("length")


def test_closing_cancels_what_runs_or_lets_it_end(made):
    for seconds, reason in ((0.0, "cancelled"), (60.0, "length")):
        engine = engine_of(made)
        gate, waiting = Gate(), Received()
        engine.submit(request([4], 8), gate)
        assert gate.reached.wait(PATIENCE)
        engine.submit(request([5], 8), waiting)
        closing = threading.Thread(target=engine.close, args=(seconds,))
        closing.start()
        until(lambda engine=engine: engine._closes_at is not None)
        with pytest.raises(Closed, match=r"^the engine is shutting down$"):
            engine.submit(request([6], 8), Received())
        gate.open.set()
        closing.join(PATIENCE)
        assert not closing.is_alive()
        assert gate.end.reason == waiting.end.reason == reason
        engine.close()


# ------------------------------------------------------------------ constraints, errors


@pytest.mark.parametrize("packed", [False, True])
def test_a_constraint_says_which_tokens_follow_and_when_the_response_ends(made, packed):
    prompt = list(range(2, 9))
    free = request(prompt, 4)
    constraint = Allowed({8, 40}, {60}, {0, 1, 2}, packed=packed)
    wanted = request(prompt, 8, constraint=constraint, temperature=2.0, logprobs=1)
    with engine_of(made) as engine:
        bound, other = served(engine, wanted, free)
    assert bound.end == End("stop")
    first, second, third = bound.tokens
    assert first in {8, 40} and second == 60 and third in {0, 1, 2}
    assert constraint.accepted == bound.tokens
    # The model's own distribution, in which other tokens are likelier.
    assert bound.tops[0][0][0] == other.tokens[0]
    assert bound.logprobs[0] < bound.tops[0][0][1]
    assert other.tokens == expected(made, free)


def test_a_token_that_stops_is_not_accepted_by_the_constraint(made):
    constraint = Allowed({8}, {9}, {10})
    wanted = request([2], 8, constraint=constraint, stop_ids=frozenset({9}))
    with engine_of(made) as engine:
        received = served(engine, wanted)[0]
    assert received.tokens == [8, 9] and received.end == End("stop")
    assert constraint.accepted == [8]


def test_a_constraint_that_fails_ends_its_own_request(made):
    free = request(range(2, 9), 8)
    with engine_of(made) as engine:
        empty, failing, other = served(
            engine,
            request([2], 8, constraint=Allowed({8}, set(), {3})),
            request([2], 8, constraint=Allowed({8}, {9}, fails_at=1)),
            free,
        )
        assert engine.stats().busy == 0
    assert empty.tokens == [8]
    assert empty.end == End("error", "the constraint allows no token")
    assert failing.end == End("error", "no such token")
    assert other.tokens == expected(made, free)


def test_after_a_program_failed_the_engine_serves_with_an_empty_cache(
    made, monkeypatch
):
    wanted = request(range(2, 12), 6)
    decode, calls = programs.decode, []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            jax.tree.map(lambda x: x.delete(), arguments[4])
            raise RuntimeError("out of memory\nsomewhere")
        return decode(*arguments)

    with engine_of(made) as engine:
        monkeypatch.setattr(programs, "decode", fail_once)
        received = served(engine, wanted)[0]
        assert received.end == End("error", "out of memory")
        assert len(received.tokens) == 2
        assert served(engine, wanted)[0].tokens == expected(made, wanted)
        assert engine.stats().reused_tokens == 0


def test_a_receiver_that_fails_ends_its_own_request(made, caplog):
    class Failing(Received):
        def __call__(self, event):
            super().__call__(event)
            if len(self.events) == 2:
                raise OSError("the client has gone")

    free = request(range(2, 9), 8)
    with engine_of(made) as engine, caplog.at_level(logging.WARNING, "rlhfjax"):
        failing, other = Failing(), Received()
        engine.submit(request([3], 20), failing)
        engine.submit(free, other)
        other.wait()
        assert failing.wait().end.reason == "cancelled"
        assert len(failing.events) < 8
    assert "the client has gone" in caplog.text
    assert other.tokens == expected(made, free)


def test_output_that_is_not_finite_is_an_error(made):
    model, params = made
    broken = jax.tree.map(lambda x: x, params)
    broken["backbone"]["norm"]["scale"] = jnp.full_like(
        broken["backbone"]["norm"]["scale"], jnp.nan
    )
    with engine_of((model, broken)) as engine:
        received = served(engine, request([3, 4], 4))[0]
    assert received.events == [End("error", "the model's output is not finite")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ()}, "tokens: the prompt is empty"),
        ({"tokens": (3, 61)}, "tokens: every id must be >= 0 and < 61"),
        ({"tokens": (-1,)}, "tokens: every id must be >= 0 and < 61"),
        ({"max_tokens": -1}, "max_tokens=-1: must be >= 0"),
        (
            {"tokens": (2,) * 20, "max_tokens": 9},
            "a prompt of 20 and a response of 9 tokens exceed the 28 tokens",
        ),
        ({"temperature": -0.5}, "temperature=-0.5: must be >= 0"),
        ({"temperature": float("nan")}, "temperature=nan: must be >= 0"),
        ({"top_p": 0.0}, "top_p=0.0: must be > 0 and <= 1"),
        ({"top_k": -1}, "top_k=-1: must be >= 0"),
        ({"min_p": 1.5}, "min_p=1.5: must be >= 0 and <= 1"),
        ({"logprobs": 21}, "logprobs=21: must be >= 0 and <= 20"),
    ],
)
def test_an_invalid_request_is_one_line(made, changes, message):
    with engine_of(made) as engine:
        with pytest.raises(ConfigError) as error:
            engine.submit(request([2], 4)._replace(**changes), Received())
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
        longest = request([2] * 20, 8)
        assert served(engine, longest)[0].tokens == expected(made, longest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 0}, "lanes=0: must be >= 1"),
        ({"chunk": 0}, "chunk=0: must be >= 1"),
        ({"queue": 0}, "queue=0: must be >= 1"),
        ({"length": 33}, "length=33: must be <= the model's context of 32 tokens"),
    ],
)
def test_an_invalid_size_is_one_line(made, changes, message):
    with pytest.raises(ConfigError) as error:
        engine_of(made, **changes)
    assert str(error.value) == message


def test_the_model_must_be_a_language_model():
    model = Model(FAMILIES["llama-gqa"], head="scalar")
    with pytest.raises(ConfigError, match="needs a language model"):
        engine_of((model, {}))
