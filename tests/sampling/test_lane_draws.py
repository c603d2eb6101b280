"""Tokens of lanes that each have their own settings, against `choose`, lane by lane."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.sampling.choose import choose
from rlhfjax.sampling.config import Sampling
from rlhfjax.sampling.lanes import Settings, draw, words

V = 70
SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 1.2, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
)
SEEDS = (0, 7, 2**31 - 1, 12345, 5, 99)
draw_jitted = jax.jit(draw, static_argnums=4)


def logits(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0, 3, (len(SETTINGS), V)), jnp.float32)


def settings_of(rows, wants_top=False):
    def column(name, default, dtype):
        return jnp.asarray([row.get(name, default) for row in rows], dtype)

    return Settings(
        seed=jnp.asarray(SEEDS, jnp.uint32),
        temperature=column("temperature", 1.0, jnp.float32),
        top_k=column("top_k", 0, jnp.int32),
        top_p=column("top_p", 1.0, jnp.float32),
        log_min_p=jnp.log(column("min_p", 0.0, jnp.float32)),
        wants_top=jnp.full(len(rows), wants_top),
    )


def all_ids():
    return jnp.full((len(SETTINGS), words(V)), 2**32 - 1, jnp.uint32)


@pytest.mark.parametrize("index", [0, 1, 40])
def test_a_lane_draws_what_choose_draws_with_its_settings(index):
    x = logits(index)
    at = jnp.full(len(SETTINGS), index)
    drawn = draw_jitted(x, at, settings_of(SETTINGS), all_ids(), 4)
    for i, row in enumerate(SETTINGS):
        sampling = Sampling(max_new_tokens=1, eos_id=1, pad_id=0, **row)
        key = jax.random.fold_in(jax.random.key(SEEDS[i]), index)
        u = jax.random.uniform(key)[None]
        token, _ = choose(x[i : i + 1], u, sampling)
        assert drawn.token[i] == token[0]
        # Of the model: before temperature and truncation.
        expected = jax.nn.log_softmax(x[i])[token[0]]
        np.testing.assert_allclose(drawn.logprob[i], expected, atol=1e-6)


def test_only_ids_of_the_mask_are_drawn_and_logprobs_are_those_of_all_ids():
    x = logits(3)
    allowed = np.zeros((len(SETTINGS), 32 * words(V)), bool)
    allowed[:, 33], allowed[:, 64], allowed[2:, 69] = True, True, True
    mask = np.packbits(allowed, axis=1, bitorder="little").view(np.uint32)
    seen = set()
    for index in range(60):
        at = jnp.full(len(SETTINGS), index)
        rows = settings_of(SETTINGS)
        drawn = draw_jitted(x, at, rows, jnp.asarray(mask), 4)
        assert all(allowed[i, token] for i, token in enumerate(drawn.token))
        seen |= set(drawn.token.tolist())
        picked = jax.nn.log_softmax(x)[jnp.arange(len(SETTINGS)), drawn.token]
        np.testing.assert_allclose(drawn.logprob, picked, atol=1e-6)
    assert seen == {33, 64, 69}
    assert drawn.token[0] == max((33, 64), key=lambda i: float(x[0, i]))


def test_alternatives_are_the_likeliest_in_their_order():
    x = logits(5)
    at = jnp.zeros(len(SETTINGS), jnp.int32)
    drawn = draw_jitted(x, at, settings_of(SETTINGS, wants_top=True), all_ids(), 4)
    order = np.argsort(-np.asarray(x), axis=1)[:, :4]
    np.testing.assert_array_equal(drawn.top, order)
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(x)), order, 1)
    np.testing.assert_allclose(drawn.top_logprob, expected, atol=1e-6)
    none = draw_jitted(x, at, settings_of(SETTINGS), all_ids(), 4)
    assert not none.top.any()
