"""Lanes, each with its own length, against whole rows at once: every family, any order of chunks
and decode steps, few entries read, quantized caches.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models import Model
from rlhfjax.models.lanes import decode_lanes, empty_lanes, prefill_lane
from tests.models.families import (
    CONFIGS,
    MOSTLY_SLOW,
    random_params,
    tokens,
)

LANES, ENTRIES, CHUNK, LENGTH = 3, 24, 4, 17

decode = jax.jit(decode_lanes, static_argnums=(0, 6))
prefill = jax.jit(prefill_lane, static_argnums=(0, 6))


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, rows):
    return model.hidden(params, rows)


@pytest.fixture(scope="module", params=MOSTLY_SLOW)
def made(request):
    return ready(request.param)


def ready(name, **options):
    model = dataclasses.replace(Model(CONFIGS[name]), **options)
    return model, random_params(model)


def padded(ids):
    return jnp.asarray(np.pad(ids, (0, CHUNK - len(ids)), constant_values=9))


def decoded(made, cache, rows, lengths, entries=LENGTH):
    """One step of the lanes with a length; the others write to the last entry."""
    model, params = made
    lane = np.arange(LANES)
    is_live = lengths < LENGTH
    position = np.where(is_live, lengths, 0)
    token = np.asarray(rows)[lane, position]
    entry = np.where(is_live, lengths, ENTRIES - 1)
    step = (jnp.asarray(x, jnp.int32) for x in (token, position, entry))
    return decode(model, params, cache, *step, entries)


def test_any_order_of_chunks_and_steps_gives_the_hidden_states_of_the_whole_row(made):
    model, params = made
    rows = tokens(LANES, LENGTH)
    expected = np.asarray(whole(model, params, rows))
    rng = np.random.default_rng(4)
    cache = empty_lanes(model, LANES, ENTRIES, begins_again=True)
    lengths = np.zeros(LANES, int)
    while lengths.min() < LENGTH:
        # A chunk of one lane, padded with other tokens, then a step of all lanes that are longer.
        lane, count = rng.integers(LANES), rng.integers(1, CHUNK + 1)
        start = lengths[lane]
        ids = np.asarray(rows)[lane, start : min(start + count, LENGTH)]
        if len(ids):
            where = jnp.int32(lane), padded(ids), jnp.int32(start)
            hidden, cache = prefill(model, params, cache, *where, LENGTH)
            np.testing.assert_allclose(
                hidden[: len(ids)], expected[lane, start:][: len(ids)], atol=2e-5
            )
            lengths[lane] += len(ids)
        before = lengths.copy()
        hidden, cache = decoded(made, cache, rows, lengths)
        for i in np.flatnonzero(before < LENGTH):
            np.testing.assert_allclose(hidden[i], expected[i, before[i]], atol=2e-5)
            lengths[i] += 1


def test_a_lane_begins_again_behind_any_of_its_tokens():
    # A window layer too: its entries before the new beginning are all there.
    model, params = ready("gemma-like")
    rows = tokens(2, LENGTH)
    other = rows.at[1, :9].set(rows[0, :9])
    expected = np.asarray(whole(model, params, other))[1]
    cache = empty_lanes(model, LANES, ENTRIES, begins_again=True)
    for row, start in ((0, 0), (1, 9)):
        ids = np.asarray(other)[row]
        for at in range(start, LENGTH, CHUNK):
            some = ids[at : at + CHUNK]
            where = jnp.int32(2), padded(some), jnp.int32(at)
            hidden, cache = prefill(model, params, cache, *where, LENGTH)
            if row:
                np.testing.assert_allclose(
                    hidden[: len(some)], expected[at:][: len(some)], atol=2e-5
                )


def test_positions_are_each_lanes_own_and_few_entries_are_read():
    made = ready("llama-gqa")
    rows = tokens(LANES, LENGTH)
    cache = empty_lanes(made[0], LANES, ENTRIES, begins_again=True)
    lengths = np.zeros(LANES, int)
    hidden, cache = decoded(made, cache, rows, lengths, 5)
    # Entries behind those that are read do not matter, whatever they are.
    cache = jax.tree.map(lambda x: x.at[:, :, 5:].set(jnp.nan), cache)
    expected = np.asarray(whole(*made, rows))
    hidden, cache = decoded(made, cache, rows, lengths + 1, 5)
    np.testing.assert_allclose(hidden, expected[:, 1], atol=2e-5)


def test_an_int8_cache_gives_the_same_whatever_the_chunks():
    # Tokens see quantized entries in chunks as in decode steps, their own included.
    made = model, _ = ready("llama-gqa", int8_cache=True)
    rows = tokens(LANES, LENGTH)
    cache = empty_lanes(model, LANES, ENTRIES, begins_again=True)
    one_by_one = []
    for length in range(LENGTH):
        hidden, cache = decoded(made, cache, rows, np.full(LANES, length))
        one_by_one.append(np.asarray(hidden[1]))
    again = empty_lanes(model, LANES, ENTRIES, begins_again=True)
    chunks = []
    for at in range(0, LENGTH, CHUNK):
        ids = np.asarray(rows)[1, at : at + CHUNK]
        where = jnp.int32(1), padded(ids), jnp.int32(at)
        hidden, again = prefill(*made, again, *where, LENGTH)
        chunks.append(np.asarray(hidden)[: len(ids)])
    np.testing.assert_allclose(np.concatenate(chunks), one_by_one, atol=2e-5)
    assert again.k[0].values.dtype == jnp.int8
    exact = np.asarray(whole(*made, rows))[1]
    gap = np.abs(one_by_one - exact).max()
    assert 1e-5 < gap < 0.2


@pytest.mark.parametrize("lane", range(LANES))
def test_a_lane_that_is_run_alone_gives_what_it_gives_among_all(lane):
    """And the entries of the others stay as they were."""
    model, params = ready("llama-gqa")
    rows = tokens(LANES, LENGTH)
    cache = empty_lanes(model, LANES, ENTRIES, begins_again=True)
    for i in range(LANES):
        ids = padded(np.asarray(rows)[i, :CHUNK])
        cache = prefill(model, params, cache, i, ids, 0, LENGTH)[1]
    step = np.stack([np.asarray(rows)[:, CHUNK], *np.full((2, LANES), CHUNK)])
    hidden, whole_cache = decode(model, params, cache, *step.astype(np.int32), LENGTH)
    one = step[:, lane : lane + 1].astype(np.int32)
    alone, own = decode(model, params, cache, *one, LENGTH, jnp.int32(lane))
    np.testing.assert_allclose(alone[0], hidden[lane], atol=1e-5)
    for before, after, among_all in zip(cache.k, own.k, whole_cache.k, strict=True):
        np.testing.assert_allclose(after[lane], among_all[lane], atol=1e-5)
        others = np.arange(LANES) != lane
        np.testing.assert_array_equal(after[others], before[others])
        assert not np.array_equal(after[lane], before[lane])
