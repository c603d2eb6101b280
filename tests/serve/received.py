"""What a request's receiver gets from the engine, and the responses that `generate` gives."""

import functools
import threading

import jax
import numpy as np

from rlhfjax.sampling import Sampling, generate
from rlhfjax.serve.requests import End, Prompt, Request, Token

PATIENCE = 120  # seconds


class Received:
    """The events of one request; it is the `emit` of `Engine.submit`."""

    def __init__(self):
        self.events = []
        self.ended = threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, End):
            self.ended.set()

    def wait(self):
        assert self.ended.wait(PATIENCE), "the request has not ended"
        return self

    @property
    def tokens(self):
        return [e.id for e in self.events if isinstance(e, Token)]

    @property
    def logprobs(self):
        return [e.logprob for e in self.events if isinstance(e, Token)]

    @property
    def tops(self):
        return [e.top for e in self.events if isinstance(e, Token)]

    @property
    def prompt(self):
        (prompt,) = [e for e in self.events if isinstance(e, Prompt)]
        return prompt.tokens

    @property
    def end(self):
        *others, end = self.events
        assert isinstance(end, End)
        assert not any(isinstance(e, End) for e in others)
        return end


def served(engine, *requests):
    """The events of requests that are submitted at once, when all have ended."""
    received = [Received() for _ in requests]
    for request, emit in zip(requests, received, strict=True):
        engine.submit(request, emit)
    return [emit.wait() for emit in received]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _generate(model, params, tokens, attention_mask, keys, sampling):
    return generate(model, params, tokens, attention_mask, keys, sampling)


def generated(model, params, requests, width, **settings):
    """(tokens, logprobs) of `generate` for each request.

    Their temperature and limits are those of `settings`; each has its own seed and number of
    tokens.
    """
    stop_ids = sorted(requests[0].stop_ids)
    sampling = Sampling(
        max_new_tokens=max(r.max_tokens for r in requests),
        eos_id=stop_ids[0] if stop_ids else -1,
        extra_eos_ids=tuple(stop_ids[1:]),
        pad_id=0,
        **settings,
    )
    tokens = np.zeros((len(requests), width), np.int32)
    mask = np.zeros((len(requests), width), np.int32)
    for i, request in enumerate(requests):
        n = len(request.tokens)
        tokens[i, width - n :], mask[i, width - n :] = request.tokens, 1
    keys = jax.vmap(jax.random.key)(np.array([r.seed for r in requests], np.uint32))
    samples = jax.device_get(_generate(model, params, tokens, mask, keys, sampling))
    responses = []
    for i, request in enumerate(requests):
        n = min(int(samples.mask[i].sum()), request.max_tokens)
        responses.append((samples.tokens[i, :n].tolist(), samples.logprobs[i, :n]))
    return responses


def request(tokens, max_tokens=8, **settings):
    """A greedy request."""
    own = {"temperature": 0.0} | settings
    return Request(tuple(int(t) for t in tokens), max_tokens, **own)
