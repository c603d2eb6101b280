"""Rules that behave and rules that do not, imported by name in worker processes."""

import functools
import os
import time


def words(prompt, response, metadata):
    return len(response.split()) + metadata.get("bonus", 0.0)


def misbehave(prompt, response, metadata):
    if response == "raise":
        raise ValueError("no\nnumber  here")
    if response == "hang":
        time.sleep(3600)
    if response == "die":
        os._exit(3)
    if response == "leave":
        raise SystemExit(1)
    if response == "sleep":
        time.sleep(0.4)
    return {
        "nan": float("nan"),
        "none": None,
        "zero": 0.0,
        "half": 0.5,
        "true": True,
    }.get(response, 1.0)


def letters(prompt, response, metadata):
    return float(response.count("o"))


def where_tea(prompt, response, metadata):
    return float("tea" in prompt)


def fits(prompt, response, metadata, scale=1.0):
    return scale


def two(prompt, response):
    return 1.0


def four(prompt, response, metadata, more):
    return 1.0


def keywords(*, prompt, response, metadata):
    return 1.0


async def coroutine(prompt, response, metadata):
    return 1.0


def generator(prompt, response, metadata):
    yield 1.0


class Callable:
    def __init__(self, prompt="", response="", metadata=""):
        pass

    def __call__(self, prompt, response, metadata):
        return 1.0

    method = __call__


class Async:
    async def __call__(self, prompt, response, metadata):
        return 1.0


class Unreadable:
    __signature__ = 3

    def __call__(self, prompt, response, metadata):
        return 1.0


instance, asynchronous, unreadable = Callable(), Async(), Unreadable()
method = instance.method
short = lambda prompt, response, metadata: 1.0  # noqa: E731
anything = lambda *texts: 1.0  # noqa: E731
partial = functools.partial(fits, scale=2.0)
one_bound = functools.partial(two, "prompt")
decorated = functools.wraps(two)(lambda *texts: two(*texts))
NUMBER = 3


def fails_on_bad(prompt, response, metadata):
    if response == "bad":
        raise ValueError("no number here")
    return 1.0
