"""Attention and RoPE by their defining properties, across the query blocks and in the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models import attention
from rlhfjax.models.attention import causal_attention, dropout
from rlhfjax.models.rope import rope_tables, rotate


def plain(q, k, v, segments):
    """Textbook attention on whole [t, t] matrices, for autodiff to differentiate."""
    h, t, d = q.shape[1:]
    k, v = (jnp.repeat(x, h // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k) / np.sqrt(d)
    i, j = jnp.arange(t)[:, None], jnp.arange(t)[None]
    same = (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0)
    allowed = ((j <= i) & same) | (i == j)
    return jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1) @ v


@pytest.mark.parametrize(("block", "kv_heads"), [(3, 2), (4, 4), (64, 1)])
def test_blocks_and_their_gradient_are_plain_attention(monkeypatch, kv_heads, block):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 4, 11, 6))
    k, v = (jax.random.normal(key, (2, kv_heads, 11, 6)) for key in keys[1:3])
    weight = jax.random.normal(keys[3], q.shape)
    segments = jnp.array([[1] * 4 + [2] * 5 + [0] * 2, [0] * 3 + [1] * 8])

    @jax.jit
    def both(q, k, v):
        def value_and_pull(attend):
            out, pull = jax.vjp(lambda *x: attend(*x, segments), q, k, v)
            return out, pull(weight)

        return value_and_pull(causal_attention), value_and_pull(plain)

    with jax.default_matmul_precision("highest"):
        (got, pulled), (expected, pulled_plain) = both(q, k, v)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(pulled, pulled_plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dropped_weights_in_value_and_gradient():
    """With values = identity the output is the weights: each is 0 or the undropped one / (1 -
    rate).
    """
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, direction = (jax.random.normal(key, (1, 1, 8, 8)) for key in keys)
    step = 1e-2

    def weights(q, **dropping):
        return causal_attention(q, k, jnp.eye(8)[None, None], **dropping)

    @jax.jit
    def values_and_slopes(q):
        def out(q):
            return (dropped(q) ** 2).sum()

        dropped = functools.partial(weights, rate=0.5, key=jax.random.key(1))
        numeric = (out(q + step * direction) - out(q - step * direction)) / (2 * step)
        return weights(q), dropped(q), (jax.grad(out)(q) * direction).sum(), numeric

    kept, dropped, slope, numeric = values_and_slopes(q)
    seen = np.tril_indices(8)
    ratio = np.asarray(dropped)[0, 0][seen] / np.asarray(kept)[0, 0][seen]
    assert set(np.round(ratio, 4)) == {0.0, 2.0}
    np.testing.assert_allclose(slope, numeric, rtol=1e-2)


def test_query_blocks_drop_different_weights(monkeypatch):
    """One query per block, values = identity: one mask makes rows beginnings of the last."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 1)
    zeros, v = jnp.zeros((1, 1, 5, 5)), jnp.eye(5)[None, None]
    attend = jax.jit(lambda key: causal_attention(zeros, zeros, v, rate=0.5, key=key))
    dropped = attend(jax.random.key(1))
    kept = np.asarray(dropped[0, 0]) > 0
    assert len({tuple(row[:3]) for row in kept[2:]}) > 1


def test_dropout_keeps_the_mean_and_the_rate():
    x = jnp.full((200, 200), 3.0)
    got = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(got)) == {0.0, 4.0}
    np.testing.assert_allclose(
        (got == 0).mean(), 0.25, atol=0.01
    )  # 40,000 draws: standard error 0.002
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)


def test_rope_depends_on_distance_only():
    """<R(m) q, R(n) k> is a function of m - n (Su et al.

    2021, eq. 11); a rotation keeps the norm.
    """
    q, k = (
        jax.random.normal(key, (1, 1, 1, 16))
        for key in jax.random.split(jax.random.key(0))
    )

    @jax.jit
    def turn(x, at):
        return rotate(x, rope_tables(jnp.full((1, 1), at), 16, 10000.0))

    def product(m, n):
        return float((np.asarray(turn(q, m)) * np.asarray(turn(k, n))).sum())

    np.testing.assert_allclose(
        [product(9, 4), product(105, 100)], product(5, 0), rtol=1e-4
    )
    assert abs(product(6, 0) - product(5, 0)) > 1e-3
    np.testing.assert_allclose(
        np.linalg.norm(turn(q, 77)), np.linalg.norm(q), rtol=1e-6
    )
    np.testing.assert_array_equal(turn(q, 0), q)


def test_rope_by_hand():
    """Position 2, width 4, theta 100: pairs (x0, x2) by 2 rad and (x1, x3) by 2 / 10 rad."""
    x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    got = rotate(x, rope_tables(jnp.array([[2]]), 4, 100.0)).ravel()
    np.testing.assert_allclose(
        got, [np.cos(2), -np.sin(0.2), np.sin(2), np.cos(0.2)], rtol=1e-6
    )


def test_a_part_of_a_head_is_rotated():
    """Tables for 4 of 6 dimensions: the first 4 turn as a head of 4 would, the last 2 stay."""
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 6))
    tables = rope_tables(jnp.array([[3]]), 4, 100.0)
    got = rotate(x, tables)
    np.testing.assert_array_equal(got[..., :4], rotate(x[..., :4], tables))
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    assert float(jnp.abs(got - x)[..., :4].min()) > 1e-3
