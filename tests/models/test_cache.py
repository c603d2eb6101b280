"""Prefill and decode against the whole row at once, in every family; the same for the last position
alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models import Model
from rlhfjax.models.size import kv_cache_bytes
from tests.models.families import (
    CONFIGS,
    FAMILIES,
    FEATURES,
    MOSTLY_SLOW,
    random_params,
    tokens,
)

PROMPT, NEW = 7, 6
LENGTHS = (7, 1, 4, 2)


@pytest.fixture(scope="module", params=MOSTLY_SLOW)
def model(request):
    return Model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


@pytest.fixture(scope="module")
def llama():
    model = Model(FAMILIES["llama-gqa"])
    return model, random_params(model)


def batch(lengths=LENGTHS, seed=1, width=PROMPT):
    """Left-padded prompts with NEW tokens after each, and their segments; what pads is not one id
    but any.
    """
    positions = jnp.arange(width + NEW)[None]
    return tokens(len(lengths), width + NEW, seed), (
        positions >= width - jnp.array(lengths)[:, None]
    ).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, rows, segments):
    """Log-probabilities [b, NEW, v] of every token at the positions of the continuation, by one
    pass over the rows.
    """
    hidden = model.hidden(params, rows, segment_ids=segments)[:, -NEW - 1 : -1]
    return jax.nn.log_softmax(model.logits(params, hidden))


@functools.partial(jax.jit, static_argnums=0)
def cached(model, params, rows, segments):
    """The same by prefill over the prompts and decode over the tokens after them."""
    width = rows.shape[1] - NEW
    length = segments[:, :width].sum(1)
    cache = model.init_cache(len(rows), rows.shape[1])
    first, cache = model.prefill(params, rows[:, :width], segments[:, :width], cache)

    def step(cache, i):
        hidden, cache = model.decode(
            params, rows[:, width + i], length + i, width + i, cache
        )
        return cache, hidden

    rest = jax.lax.scan(step, cache, jnp.arange(NEW - 1))[1]
    hidden = jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)
    return jax.nn.log_softmax(model.logits(params, hidden))


@pytest.mark.parametrize("lengths", [LENGTHS, (1, 1, 1, 1), (3, 7, 7, 5)])
def test_cached_is_uncached(model, params, lengths):
    rows, segments = batch(lengths)
    got, expected = (f(model, params, rows, segments) for f in (cached, whole))
    # Every token's, down to -11 nats, of which float32 itself keeps 1e-6.
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)


def test_cached_is_uncached_in_bf16(llama):
    """Less apart than bf16 is from float32: XLA leaves out roundings within what it fuses, and
    fuses the two otherwise.

    Over 6 seeds the mean was 0.0008 nats at most (0.015 in "llama"), the largest 0.03 (0.16);
    bf16's own 0.02 and 0.25.
    """
    model, params = llama
    narrow = Model(dataclasses.replace(model.config, dtype="bfloat16"))
    rows, segments = batch()
    got, expected = (f(narrow, params, rows, segments) for f in (cached, whole))
    apart = np.abs(got - expected)
    assert (
        apart.mean() < np.abs(expected - whole(model, params, rows, segments)).mean()
        and apart.max() < 0.3
    )


def test_cached_is_uncached_in_bf16_where_every_rounding_is_done():
    """...

    To the bit on one machine; elsewhere a sum in another order may turn a rounding here and there.
    """
    model = Model(dataclasses.replace(FAMILIES["llama"], dtype="bfloat16"))
    params = random_params(model)
    options = {"compiler_options": {"xla_allow_excess_precision": False}}
    got, expected = (
        jax.jit(f.__wrapped__, static_argnums=0, **options)(model, params, *batch())
        for f in (cached, whole)
    )
    apart = np.abs(got - expected)
    assert apart.mean() < 1e-3 and apart.max() < 0.05


def test_a_row_does_not_depend_on_its_neighbors(llama):
    """Among others, of other lengths: equal to the bit. In another place, alone, with more padding:
    to rounding.
    """
    model, params = llama
    rows, segments = batch()
    together = np.asarray(cached(model, params, rows, segments))
    other_rows, other_segments = batch((4, 6, 1, 7), seed=9)
    for i in range(4):
        among = cached(
            model,
            params,
            other_rows.at[i].set(rows[i]),
            other_segments.at[i].set(segments[i]),
        )
        np.testing.assert_array_equal(among[i], together[i])
    order = jnp.array([2, 0, 3, 1])
    moved = cached(model, params, rows[order], segments[order])
    np.testing.assert_allclose(moved, together[order], rtol=1e-6, atol=1e-5)
    alone = cached(model, params, rows[1:2], segments[1:2])
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-6, atol=1e-5)
    wider = cached(
        model, params, *(jnp.pad(x, ((0, 0), (3, 0))) for x in (rows, segments))
    )
    np.testing.assert_allclose(wider, together, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["llama-gqa", "gpt1", "neox"]
)  # the three residual forms
def test_the_last_position_is_that_of_the_whole_row(family):
    """Value and gradient, of rows padded on either side; the last layer is computed at that
    position alone.
    """
    model = Model(CONFIGS[family])
    params = random_params(model)
    rows = tokens(3, 9)
    segments = jnp.array([[0] * 4 + [1] * 5, [1] * 3 + [0] * 6, [1] * 9])
    last = jnp.array([8, 2, 8])
    weights = jax.random.normal(jax.random.key(4), (3, model.config.d_model))

    @jax.jit
    def value_and_grads(params):
        def picked(p):
            hidden = model.hidden(p, rows, segment_ids=segments)[jnp.arange(3), last]
            return (hidden * weights).sum(), hidden

        def alone(p):
            hidden = model.last_hidden(p, rows, segments)
            return (hidden * weights).sum(), hidden

        return [jax.value_and_grad(f, has_aux=True)(params) for f in (picked, alone)]

    expected, got = value_and_grads(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        got,
        expected,
    )


def test_a_window_bounds_its_layers_cache():
    """Three layers, two key heads of 8: 5 entries in the window layer, 13 in the others."""
    config = FEATURES["gemma-like"]
    cache = Model(config).init_cache(2, 13)
    shapes = [(2, 2, 5, 8), (2, 2, 13, 8), (2, 2, 13, 8)]
    assert [x.shape for x in cache.k] == [x.shape for x in cache.v] == shapes
    per_row = 2 * 2 * 8 * (5 + 13 + 13)
    assert kv_cache_bytes(config, 2, 13, 4) == 2 * per_row * 4
    # A window as long as the cache is no window.
    assert Model(config).init_cache(1, 5).window_valid is None


def test_a_long_prompt_leaves_its_last_tokens_in_the_window():
    """Seven tokens in a ring of five: token e is at place e mod 5."""
    model = Model(FEATURES["gemma-like"])
    rows, segments = batch()
    _, cache = jax.jit(model.prefill)(
        random_params(model),
        rows[:, :PROMPT],
        segments[:, :PROMPT],
        model.init_cache(4, 13),
    )
    whole, window = np.asarray(cache.valid), np.asarray(cache.window_valid)
    for e in range(2, 7):
        np.testing.assert_array_equal(window[:, e % 5], whole[:, e])
