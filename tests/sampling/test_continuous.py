"""Continuous batching and shared prefixes against static batches of repeated prompts: the same
responses.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.models import Model
from rlhfjax.models.lanes import decode_lanes
from rlhfjax.sampling import Samples, generate
from rlhfjax.sampling.continuous import refill_size
from tests.models.families import CONFIGS, FAMILIES, random_params
from tests.sampling.test_generate import (
    EOS,
    NEW,
    PAD,
    decided,
    keys,
    left_padded,
    rigged,
    run,
    sampling,
    teacher_forced,
)

FIRST = [
    pytest.param(name, marks=[] if name == "llama-gqa" else pytest.mark.slow)
    for name in CONFIGS
]


@pytest.fixture(scope="module")
def gpt2():
    """Of one layer: each has a cache of its own, and `test_continuous_is_static` has two."""
    model = Model(dataclasses.replace(FAMILIES["gpt2"], n_layers=1))
    return model, random_params(model)


def repeated(rows, n):
    return tuple(jnp.repeat(x, n, axis=0) for x in rows)


def assert_same(got, expected, sure, atol=1e-5):
    """The same responses, but for those that `decided` leaves to rounding."""
    np.testing.assert_array_equal(got.tokens[sure], expected.tokens[sure])
    np.testing.assert_array_equal(got.mask[sure], expected.mask[sure])
    np.testing.assert_allclose(got.logprobs[sure], expected.logprobs[sure], atol=atol)


def ended_by(samples, eos):
    """Samples without an end, as they are when the token `eos` is one."""
    tokens = np.asarray(samples.tokens)
    mask = (np.cumsum(tokens == eos, axis=1) - (tokens == eos)) == 0
    return Samples(
        np.where(mask, tokens, PAD),
        mask.astype(np.float32),
        np.where(mask, samples.logprobs, 0),
    )


def eos_that_ends(samples):
    """The token that ends the most responses at different places: lengths with a spread, whatever
    the parameters.
    """
    lengths = {
        t: ended_by(samples, t).mask.sum(1).astype(int).tolist() for t in range(2, 61)
    }
    return max(
        lengths,
        key=lambda t: len(set(lengths[t])) + 0.01 * sum(x < NEW for x in lengths[t]),
    )


LENGTHS = (7, 1, 4, 6, 2, 5, 3, 7, 1, 1, 6)


@pytest.mark.parametrize("family", FIRST)
def test_continuous_is_static(family):
    """11 prompts of every length through 3 slots: with responses of different lengths, the same
    tokens.
    """
    model = Model(CONFIGS[family])
    params, rows, drawn = random_params(model), left_padded(LENGTHS), keys(len(LENGTHS))
    endless = run(model, params, *rows, drawn, eos_id=-1)
    eos = eos_that_ends(endless)
    expected = ended_by(endless, eos)
    assert len(set(expected.mask.sum(1))) >= 4  # lengths do differ
    sure = decided(model, params, *rows, drawn, expected)
    assert_same(
        run(model, params, *rows, drawn, eos_id=eos, decode_batch=3), expected, sure
    )


def test_with_an_int8_cache_too(gpt2):
    model, params = dataclasses.replace(gpt2[0], int8_cache=True), gpt2[1]
    rows, drawn = left_padded(LENGTHS), keys(len(LENGTHS))
    expected = run(model, params, *rows, drawn, temperature=0.0)
    got = run(model, params, *rows, drawn, temperature=0.0, decode_batch=3)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


def test_pitfall_05_continuous_logprobs_are_teacher_forced(gpt2):
    model, params = gpt2
    prompts, segments = left_padded(LENGTHS)
    samples = run(model, params, prompts, segments, keys(len(LENGTHS)), decode_batch=4)
    expected = teacher_forced(model, params, prompts, segments, samples, 0.8)
    np.testing.assert_allclose(samples.logprobs, expected, atol=1e-5)


def test_a_shared_prefix_is_a_repeated_prompt(gpt2):
    model, params = gpt2
    rows, drawn = left_padded((7, 1, 4)), keys(9)
    expected = run(model, params, *repeated(rows, 3), drawn)
    sure = decided(model, params, *repeated(rows, 3), drawn, expected)
    assert_same(run(model, params, *rows, drawn, samples_per_prompt=3), expected, sure)
    assert_same(
        run(model, params, *rows, drawn, samples_per_prompt=3, decode_batch=4),
        expected,
        sure,
    )
    assert len({tuple(row) for row in np.asarray(expected.tokens)[:3].tolist()}) == 3


def test_random_lengths_are_the_static_ones(gpt2):
    """A property, ten times: prompts and responses of random lengths, refilled by pairs; a group of
    two has one prompt.

    Prompts are in the order they came, whatever the order in which they end.
    """
    model, params = gpt2
    settings = {
        "eos_id": 52,
        "samples_per_prompt": 2,
        "temperature": 2.0,
    }  # a token that comes at every place
    ended = set()
    for seed in range(10):
        lengths = np.random.default_rng(seed).integers(1, 8, 12)
        rows, drawn = left_padded(tuple(lengths)), keys(24, seed)
        expected = run(model, params, *rows, drawn, **settings)
        sure = decided(
            model, params, *repeated(rows, 2), drawn, expected, temperature=2.0
        )
        assert_same(
            run(model, params, *rows, drawn, decode_batch=16, **settings),
            expected,
            sure,
        )
        ended |= set(np.asarray(expected.mask).sum(1).tolist())
    assert ended == set(range(1, NEW + 1))
    assert refill_size(16, 2) == 2


@pytest.mark.parametrize(
    ("decode_batch", "max_new_tokens"), [(7, NEW), (2, 1), (100, NEW)]
)
def test_every_number_of_slots_gives_the_same(gpt2, decode_batch, max_new_tokens):
    """Rows not divisible by lanes, responses of one token, more lanes than rows."""
    model, params = gpt2
    rows, drawn = left_padded((7, 1, 4, 6, 2, 5, 3, 7)), keys(8)
    expected = run(model, params, *rows, drawn, max_new_tokens=max_new_tokens)
    sure = decided(model, params, *rows, drawn, expected)
    assert_same(
        run(
            model,
            params,
            *rows,
            drawn,
            max_new_tokens=max_new_tokens,
            decode_batch=decode_batch,
        ),
        expected,
        sure,
    )


def test_a_slot_that_ends_takes_the_next_prompt_at_once(gpt2, monkeypatch):
    """Decode steps counted as they run. A row of length L is rigged to end with its token number 7
    - L: 6 - L steps.

    Two slots: the row of length 1 takes 5 steps, meanwhile five of length 5 take 1 each beside it.
    5 steps are all; static batches of two would take 5 + 1 + 1. Nothing is decoded once the last
    row has ended.
    """
    model, params = rigged(gpt2, [10, 11, 12, 13, 14, EOS, 16, 17])
    rows = left_padded((1, 5, 5, 5, 5, 5))
    calls, decode = [], decode_lanes

    def counted(*given):
        jax.debug.callback(lambda x: calls.append(x), given[3])
        return decode(*given)

    monkeypatch.setattr("rlhfjax.sampling.continuous.decode_lanes", counted)
    settings = sampling(temperature=0.0, decode_batch=2)
    samples = jax.jit(lambda *x: generate(model, *x, settings))(params, *rows, keys(6))
    jax.block_until_ready(samples)
    jax.effects_barrier()
    assert len(calls) == 5
    assert samples.mask.sum(1).tolist() == [6, 2, 2, 2, 2, 2]
    assert samples.tokens[:, :2].tolist() == [[10, 11], *[[14, EOS]] * 5]


def test_a_group_needs_slots_for_all_of_it(gpt2):
    with pytest.raises(
        ConfigError, match=r"decode_batch=2: .* at least samples_per_prompt=3"
    ):
        run(*gpt2, *left_padded((7, 1)), keys(6), samples_per_prompt=3, decode_batch=2)


@pytest.mark.slow
def test_eight_devices_sample_what_one_does():
    """Rows split over 8 devices, and heads over 4 of them; static and continuous. The cache stays
    split.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "tests.sampling.eight_devices"]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line["tokens"]
        assert line["logprobs"] < 1e-5
        assert line["lengths"] > 3
        assert not line["whole"]
